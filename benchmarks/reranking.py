"""Training a reranker against its peers: the same model, pairs, batches, precision and cores, in the same run.

    benchmarks/make_environments.sh .bench flagembedding sentence_transformers
    python benchmarks/reranking.py --data groups.jsonl.gz --model MODEL --envs .bench --repeats 3

Every side runs in a process of its own, one after the other. bge_ds is measured by its real command, the peers by their own
trainers with a callback. A side whose tokens differ from the others' is an error. Prints a table and appends its rows to a CSV
file.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from comparing import add_shared_flags, compare, parse_steps, run_sets
from rows import COLUMNS, hardware, rows_of
from sides import Run, Setting, ask_parts, run_command, run_peer, write_groups


@dataclass(frozen=True)
class Reranking(Setting):
    """A pair has query_max_len + passage_max_len tokens at most. With so small a query_max_len all sides cut alike:
    FlagEmbedding lets a query take passage_max_len / 4 more, and a passage query_max_len / 2."""

    query_max_len: int = 8
    passage_max_len: int = 248


def ours(setting: Reranking, run: Run) -> dict:
    flags = {
        "train_data": setting.data, "cache_dir": run.work / "cache", "train_group_size": setting.group,
        "query_max_len": setting.query_max_len, "passage_max_len": setting.passage_max_len,
    }  # fmt: skip
    return run_command("bge_ds.rerank", flags, setting, run)


def flagembedding(setting: Reranking, run: Run) -> dict:
    return run_peer(setting, run, "flagembedding", "run_flagembedding.py", what="rerank")


def sentence_transformers(setting: Reranking, run: Run) -> dict:
    return run_peer(setting, run, "sentence_transformers", "run_cross_encoder.py")


def run_set(name: str, args: argparse.Namespace, run: Run) -> list[dict]:
    setting = Reranking("reranking", args.batch, args.steps, args.warmup, group=args.group, bf16=name == "bf16")
    folder = run.fresh("data")
    write_groups(args.data, folder / "groups.jsonl", args.batch * args.steps, args.group - 1)
    asked = {"what": "cross_encoder", "model": str(args.model.absolute()), "output": str(folder / "model")}
    ask_parts(run, asked, script="own_inference.py")
    setting = replace(setting, data=str(folder / "groups.jsonl"), model=str(folder / "model"))
    sides = {"bge_ds": ours, "FlagEmbedding": flagembedding, "sentence-transformers": sentence_transformers}
    return rows_of(setting, compare(setting, run, sides, args.repeats), hardware(setting, run.threads))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shared_flags(parser, "reranking")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON lines of groups (query, pos, neg), may be .gz")
    add("--sets", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    add("--batch", type=int, default=8, help="queries a step")
    add("--group", type=int, default=8, help="passages a query")
    return run_sets(parse_steps(parser, argv, ("steps",)), run_set, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
