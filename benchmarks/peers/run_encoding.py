"""Lines of texts to a file of vectors by sentence-transformers or FlagEmbedding; runs in the peer's environment.

Takes one JSON text, prints `{"seconds": S, "peak_bytes": N, "versions": {...}}`. Timed: reading the lines, loading the model,
encoding and writing the vectors; imports are not. Batch sizes and all else are each peer's defaults.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np


def sentence_transformers() -> Callable[[dict, list[str]], np.ndarray]:
    from sentence_transformers import SentenceTransformer

    def encode(asked: dict, texts: list[str]) -> np.ndarray:
        model = SentenceTransformer(asked["model"], device="cpu")
        model.max_seq_length = asked["max_len"]
        return model.encode(texts)

    return encode


def flagembedding() -> Callable[[dict, list[str]], np.ndarray]:
    from FlagEmbedding import FlagModel

    def encode(asked: dict, texts: list[str]) -> np.ndarray:
        model = FlagModel(asked["model"], pooling_method="mean", use_fp16=False, devices="cpu")
        return model.encode_corpus(texts, max_length=asked["max_len"])

    return encode


def measure(asked: dict) -> dict:
    encode = {"sentence-transformers": sentence_transformers, "FlagEmbedding": flagembedding}[asked["side"]]()
    began = time.perf_counter()
    with open(asked["data"], encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    np.save(f"{asked['output']}/vectors.npy", encode(asked, texts))
    seconds = time.perf_counter() - began
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    versions = {name: version(name) for name in (asked["side"], "torch", "transformers")}
    return {"seconds": seconds, "peak_bytes": peak, "versions": versions}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)
