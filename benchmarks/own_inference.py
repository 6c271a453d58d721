"""Our side of the inference benchmark: takes one JSON text, prints one line of JSON.

`"what"`: encode, mine, search or score, as the commands do it, imports excepted; vectors (random ones, in the form of
`bge_ds.encode`) and cross_encoder (a model with a new head), which are inputs; compare, how far a peer's result is from ours.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bge_ds.encoding import output
from bge_ds.encoding.manifest import InputEntry, Job, Settings
from bge_ds.encoding.vectors import open_vectors

KEPT = 210  # passages that a search keeps: the ranks that are mined by default
SEARCHED_BLOCK = 2048  # queries at a time, as mining has them


def measured(work: Callable[[], int]) -> dict:
    """Seconds of the work, which returns its tokens, and the peak of this process."""
    began = time.perf_counter()
    tokens = work()
    seconds = time.perf_counter() - began
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"seconds": seconds, "tokens": tokens, "peak_bytes": peak, "versions": versions}


def encode(asked: dict) -> dict:
    from bge_ds.encoding import run  # torch, which `compare` can do without

    folder = Path(asked["output"]) / "vectors"
    options = run.Options(asked["model"], [asked["data"]], folder, max_len=asked["max_len"], use_cpu=True)
    return measured(lambda: run.encode(options).counts["tokens"])


def mine(asked: dict) -> dict:
    from bge_ds.mining.run import Options
    from bge_ds.mining.run import mine as mined
    from bge_ds.mining.selection import Rules

    rules = Rules(range_for_sampling=tuple(asked["range"]), negative_number=asked["negatives"], no_fill=True)
    lengths = {"query_max_len": asked["max_len"], "passage_max_len": asked["max_len"]}
    options = Options(
        asked["model"], [asked["data"]], Path(asked["output"]) / "mined.jsonl", candidate_pool=[asked["pool"]], rules=rules,
        use_cpu=True, **lengths,
    )  # fmt: skip
    return measured(lambda: mined(options).counts["pool"])


def score(asked: dict) -> dict:
    from bge_ds.scoring.run import Options
    from bge_ds.scoring.run import score as scored

    file = Path(asked["output"]) / "scored.jsonl"
    options = Options(asked["model"], [asked["data"]], file, max_len=asked["max_len"], use_cpu=True)
    return measured(lambda: scored(options).counts["tokens"])


def search(asked: dict) -> dict:
    import torch

    from bge_ds.mining.search import ExactSearch

    vectors = open_vectors(asked["vectors"])
    queries_QD = np.random.default_rng(1).standard_normal((asked["queries"], vectors.shape[1]), np.float32)
    exact = ExactSearch(vectors, len(vectors), KEPT, torch.device("cpu"))

    def work() -> int:
        for first in range(0, len(queries_QD), SEARCHED_BLOCK):
            exact(queries_QD[first : first + SEARCHED_BLOCK])
        return 0

    return measured(work)


def vectors(asked: dict) -> dict:
    from bge_ds.encoding.run import BLOCK

    folder, random = Path(asked["output"]), np.random.default_rng(0)
    how = Settings(
        model="random", model_hash="", side="passage", prompt="", max_len=0, pooling="mean", normalize=False, bf16=False,
        dim=asked["width"], dtype="float32",
    )  # fmt: skip
    texts = InputEntry(fingerprint="", identity=[], sources=[], texts=asked["passages"])
    job = Job(bge_ds_version=version("bge_ds"), settings=how, input=texts, block_texts=BLOCK)
    (folder / output.BLOCKS).mkdir(parents=True)
    output.files.write(folder / output.JOB, job)
    for block in range(job.num_blocks):
        vectors_ND = random.standard_normal((len(job.rows(block)), asked["width"]), np.float32)
        output.write_block(folder, job, block, vectors_ND, None, 0)
    output.finish(folder, job)
    return {}


def cross_encoder(asked: dict) -> dict:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(asked.get("seed", 0))
    AutoModelForSequenceClassification.from_pretrained(asked["model"], num_labels=1).save_pretrained(asked["output"])
    AutoTokenizer.from_pretrained(asked["model"]).save_pretrained(asked["output"])
    return {}


def compare(asked: dict) -> dict:
    ours, theirs = Path(asked["ours"]), Path(asked["theirs"])
    if asked["kind"] == "encode":
        return {"difference": float(np.abs(open_vectors(ours / "vectors")[:] - np.load(theirs / "vectors.npy")).max())}
    lines = (ours / {"mine": "mined.jsonl", "score": "scored.jsonl"}[asked["kind"]]).read_text(encoding="utf-8").splitlines()
    groups = [json.loads(line) for line in lines]
    if asked["kind"] == "score":
        scores = np.array([value for group in groups for value in (*group["pos_scores"], *group["neg_scores"])])
        return {"difference": float(np.abs(scores - np.load(theirs / "scores.npy")).max())}
    negatives = json.loads((theirs / "negatives.json").read_text(encoding="utf-8"))
    same = [len({*group["neg"]} & {*found}) for group, found in zip(groups, negatives, strict=True)]
    return {"difference": 1 - sum(same) / sum(len(group["neg"]) for group in groups)}


def work(asked: dict) -> dict:
    known = (encode, mine, search, score, vectors, cross_encoder, compare)
    return {function.__name__: function for function in known}[asked["what"]](asked)


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))), flush=True)
