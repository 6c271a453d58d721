"""Encoding, mining and scoring by sentence-transformers or FlagEmbedding; runs in the peer's environment.

Takes one JSON text, prints `{"seconds": S, "peak_bytes": N, "versions": {...}}`. Timed: reading the lines, loading the model,
the work and writing its result; imports are not. Batch sizes and all else are each peer's defaults, or a comment says why not.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np


def read(file: str) -> list[dict]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def pairs_of(groups: list[dict]) -> list[tuple[str, str]]:
    return [(group["query"], passage) for group in groups for passage in (*group["pos"], *group["neg"])]


# Each function below imports and returns the work, which is timed.


def encode_by_sentence_transformers(asked: dict) -> Callable[[], None]:
    from sentence_transformers import SentenceTransformer

    def work() -> None:
        model = SentenceTransformer(asked["model"], device="cpu")
        model.max_seq_length = asked["max_len"]
        np.save(f"{asked['output']}/vectors.npy", model.encode([row["text"] for row in read(asked["data"])]))

    return work


def encode_by_flagembedding(asked: dict) -> Callable[[], None]:
    from FlagEmbedding import FlagModel

    def work() -> None:
        model = FlagModel(asked["model"], pooling_method="mean", use_fp16=False, devices="cpu")
        vectors = model.encode_corpus([row["text"] for row in read(asked["data"])], max_length=asked["max_len"])
        np.save(f"{asked['output']}/vectors.npy", vectors)

    return work


def score_by_sentence_transformers(asked: dict) -> Callable[[], None]:
    from sentence_transformers import CrossEncoder
    from torch.nn import Identity

    def work() -> None:
        model = CrossEncoder(asked["model"], max_length=asked["max_len"], device="cpu")
        scores = model.predict(pairs_of(read(asked["data"])), activation_fn=Identity(), show_progress_bar=False)
        np.save(f"{asked['output']}/scores.npy", scores)

    return work


def score_by_flagembedding(asked: dict) -> Callable[[], None]:
    from FlagEmbedding import FlagReranker

    def work() -> None:
        model = FlagReranker(asked["model"], use_fp16=False, devices="cpu", max_length=asked["max_len"])
        np.save(f"{asked['output']}/scores.npy", np.array(model.compute_score(pairs_of(read(asked["data"])))))

    return work


def mine_by_sentence_transformers(asked: dict) -> Callable[[], None]:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    def work() -> None:
        model = SentenceTransformer(asked["model"], device="cpu")
        model.max_seq_length = asked["max_len"]
        groups, (first, last) = read(asked["data"]), asked["range"]
        columns = {"query": [group["query"] for group in groups], "positive": [group["pos"][0] for group in groups]}
        corpus = [row["text"] for row in read(asked["pool"])]
        # A row a query: its positive, then its negatives.
        found = mine_hard_negatives(
            Dataset.from_dict(columns), model, corpus=corpus, range_min=first, range_max=last,
            num_negatives=asked["negatives"], output_format="labeled-list", verbose=False,
        )  # fmt: skip
        by_query = {row["query"]: row["positive"][1:] for row in found}
        write_negatives(asked, [by_query.get(group["query"], []) for group in groups])

    return work


def mine_by_flagembedding(asked: dict) -> Callable[[], None]:
    import faiss  # noqa: F401
    import FlagEmbedding  # noqa: F401

    def work() -> None:
        mined = f"{asked['output']}/mined.jsonl"
        first, last = asked["range"]
        flags = {
            "input_file": asked["data"], "output_file": mined, "candidate_pool": asked["pool"],
            "range_for_sampling": f"{first}-{last}", "negative_number": asked["negatives"],
            "embedder_name_or_path": asked["model"], "embedder_model_class": "encoder-only-base", "pooling_method": "mean",
            "use_fp16": False, "devices": "cpu", "embedder_query_max_length": asked["max_len"],
            "embedder_passage_max_length": asked["max_len"],
            # The script's 3,000 texts a batch would take tens of gigabytes; this is the embedder's own default.
            "batch_size": 256,
        }  # fmt: skip
        sys.argv = [asked["hn_mine"], *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
        runpy.run_path(asked["hn_mine"], run_name="__main__")
        write_negatives(asked, [group["neg"] for group in read(mined)])

    return work


def write_negatives(asked: dict, negatives: list[list[str]]) -> None:
    Path(asked["output"], "negatives.json").write_text(json.dumps(negatives), encoding="utf-8")


WORKS = {
    "sentence-transformers": {
        "encode": encode_by_sentence_transformers,
        "mine": mine_by_sentence_transformers,
        "score": score_by_sentence_transformers,
    },
    "FlagEmbedding": {"encode": encode_by_flagembedding, "mine": mine_by_flagembedding, "score": score_by_flagembedding},
}


def measure(asked: dict) -> dict:
    work = WORKS[asked["side"]][asked["what"]](asked)
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    versions = {name: version(name) for name in (asked["side"], "torch", "transformers")}
    return {"seconds": seconds, "peak_bytes": peak, "versions": versions}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)
