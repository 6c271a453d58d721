"""MosaicML Streaming on the random reads of own_data.py: `python run_streaming.py JSON`; prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from streaming import MDSWriter, StreamingDataset

GROUP = 8


def time_reads(asked: dict) -> dict:
    """A sample is a group: 8 arrays of ids, as its own column type for arrays. All shards lie on the local disk."""
    ids, lengths = np.load(Path(asked["texts"]) / "ids.npy"), np.load(Path(asked["texts"]) / "lengths.npy")
    texts = np.split(ids, np.cumsum(lengths)[:-1])
    names = [f"text_{i}" for i in range(GROUP)]
    with MDSWriter(out=asked["output"], columns=dict.fromkeys(names, f"ndarray:{ids.dtype}")) as out:
        for first in range(0, len(texts), GROUP):
            out.write(dict(zip(names, texts[first : first + GROUP], strict=True)))
    data = StreamingDataset(local=asked["output"], batch_size=1)
    chosen = np.random.default_rng(0).integers(0, len(texts) // GROUP, asked["reads"]).tolist()
    data[chosen[0]]
    began, tokens = time.perf_counter(), 0
    for row in chosen:
        sample = data[row]
        tokens += len(np.concatenate([sample[name] for name in names]))
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


if __name__ == "__main__":
    print(json.dumps(time_reads(json.loads(sys.argv[1]))), flush=True)
