"""Our side of the encoding benchmark: takes one JSON text, prints one line of JSON.

`"what"`: encode (lines to vectors on disk, as `bge_ds.encode` does it, imports excepted), or compare (the largest difference
of a feature between a folder of ours and a peer's file).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bge_ds.encoding.vectors import open_vectors


def encode(asked: dict) -> dict:
    from bge_ds.encoding import run  # torch, which `compare` can do without

    began = time.perf_counter()
    options = run.Options(asked["model"], [asked["lines"]], Path(asked["output"]), max_len=asked["max_len"], use_cpu=True)
    made = run.encode(options)
    seconds = time.perf_counter() - began
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"seconds": seconds, "tokens": made.counts["tokens"], "peak_bytes": peak, "versions": versions}


def compare(asked: dict) -> dict:
    return {"largest": float(np.abs(open_vectors(asked["ours"])[:] - np.load(asked["theirs"])).max())}


def work(asked: dict) -> dict:
    return {"encode": encode, "compare": compare}[asked["what"]](asked)


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))), flush=True)
