"""MosaicML Streaming on the random reads of own_data.py: `python run_streaming.py JSON`; prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np

GROUP = 8


def import_streaming() -> ModuleType:
    """It imports torchvision for its datasets of images; why that is not installed, make_environments.sh says."""
    import transformers  # noqa: F401 - looks for the real one, which must be over before there is a stand-in

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    sys.modules.update((name, ModuleType(name)) for name in names)
    sys.modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})
    sys.modules["torchvision.transforms.functional"].to_tensor = None
    import streaming

    for name in names:
        del sys.modules[name]
    return streaming


def time_reads(asked: dict) -> dict:
    """A sample is a group: 8 arrays of ids, as its own column type for arrays. All shards lie on the local disk."""
    streaming = import_streaming()
    ids, lengths = np.load(Path(asked["texts"]) / "ids.npy"), np.load(Path(asked["texts"]) / "lengths.npy")
    texts = np.split(ids, np.cumsum(lengths)[:-1])
    names = [f"text_{i}" for i in range(GROUP)]
    with streaming.MDSWriter(out=asked["output"], columns=dict.fromkeys(names, f"ndarray:{ids.dtype}")) as out:
        for first in range(0, len(texts), GROUP):
            out.write(dict(zip(names, texts[first : first + GROUP], strict=True)))
    data = streaming.StreamingDataset(local=asked["output"], batch_size=1)
    chosen = np.random.default_rng(0).integers(0, len(texts) // GROUP, asked["reads"]).tolist()
    data[chosen[0]]
    began, tokens = time.perf_counter(), 0
    for row in chosen:
        sample = data[row]
        tokens += len(np.concatenate([sample[name] for name in names]))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": tokens, "version": f"mosaicml-streaming {streaming.__version__}"}


if __name__ == "__main__":
    print(json.dumps(time_reads(json.loads(sys.argv[1]))), flush=True)
