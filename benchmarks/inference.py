"""Using a model against its peers: encoding, mining and scoring, with the same model, texts, precision and cores.

    benchmarks/make_environments.sh .bench flagembedding sentence_transformers
    python benchmarks/inference.py --data texts.jsonl.gz --groups groups.jsonl.gz --model MODEL --envs .bench --repeats 3

Each side is a process of its own, all take turns, every second turn in reverse order. A peer is compared with ours of the same
turn. One whose result differs from ours is an error. Prints a table and appends its rows to a CSV file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparing import add_shared_flags, run_sets
from data import DATA_COLUMNS, Side, in_turn, rows_of
from rows import hardware
from sides import Run, Shared, ask_parts, different_texts, run_peer, write_groups

SETS = ("encode", "mine", "search", "score")
PEERS = {"sentence-transformers": "sentence_transformers", "FlagEmbedding": "flagembedding"}  # side: its environment
SCRIPT = "own_inference.py"
# How far a peer's result may be from ours: a feature of a vector of length 1, a score, the share of other negatives.
TOLERANCES = {"encode": 1e-4, "mine": 0.1, "score": 1e-3}
GROUP = 8  # passages that are scored for a query
RANGE, NEGATIVES = (10, 25), 15  # ranks that are mined, and negatives: all of the range, so that nothing is drawn
TIMES = (1, 4, 16)  # the corpora of the set search


@dataclass(frozen=True)
class Work:
    """What all sides do. count: of what the rates are about. asked: what every side is told, `data` among it. goal: of ours."""

    what: str
    size: str
    unit: str
    count: int
    asked: dict[str, Any] = field(default_factory=dict)
    goal: str = ""


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def first_texts(source: Path, count: int, flag: str) -> list[str]:
    """The first texts of a file as they are, each once. Raises ValueError where there are too few."""
    texts = list(itertools.islice(different_texts(source), count))
    if len(texts) < count:
        raise ValueError(f"{source} has {len(texts)} different texts, {flag} {count} are asked for: give more data")
    return texts


def encoding(args: argparse.Namespace, folder: Path, run: Run) -> Work:
    texts = first_texts(args.data, args.texts, "--texts")
    file = write_lines(folder / "texts.jsonl", [{"text": text} for text in texts])
    size = f"{args.texts} texts of {{tokens:.0f}} tokens, at most {args.max_len}"
    goal = "2 x sentence-transformers, 3 x FlagEmbedding, half their memory"
    return Work("texts to vectors on disk", size, "texts/s", args.texts, {"data": file}, goal)


def mining(args: argparse.Namespace, folder: Path, run: Run) -> Work:
    """The positives of the groups and then other texts are the pool."""
    write_groups(args.groups, folder / "groups.jsonl", args.queries, 0)
    own = dict.fromkeys(different_texts(folder / "groups.jsonl"))
    more = first_texts(args.data, args.pool, "--pool")
    pool = list(itertools.islice(dict.fromkeys([*own, *more]), args.pool))
    asked = {"data": str(folder / "groups.jsonl"), "pool": write_lines(folder / "pool.jsonl", [{"text": t} for t in pool])}
    asked |= {"range": RANGE, "negatives": NEGATIVES, "hn_mine": str(args.hn_mine.absolute()) if args.hn_mine else None}
    size = f"{args.queries} queries, {args.pool} passages of at most {args.max_len} tokens"
    return Work("groups to mined groups", size, "queries/s", args.queries, asked, "2 x the peers")


def scoring(args: argparse.Namespace, folder: Path, run: Run) -> Work:
    write_groups(args.groups, folder / "groups.jsonl", args.pairs // GROUP, GROUP - 1)
    model = str(folder / "cross_encoder")
    ask_parts(run, {"what": "cross_encoder", "model": str(args.model.absolute()), "output": model}, script=SCRIPT)
    pairs = args.pairs // GROUP * GROUP
    size = f"{pairs} pairs of {{tokens:.0f}} tokens, at most {args.max_len}"
    goal = "2 x sentence-transformers"
    return Work("groups to scored groups", size, "pairs/s", pairs, {"data": str(folder / "groups.jsonl"), "model": model}, goal)


def run_set(name: str, args: argparse.Namespace, run: Run) -> list[dict]:
    if name == "search":
        return search_rows(args, run)
    work = {"encode": encoding, "mine": mining, "score": scoring}[name](args, run.fresh(f"data_{name}"), run)
    asked = {"what": name, "max_len": args.max_len, "model": str(args.model.absolute())} | work.asked
    setting, records = Shared(name, work.count, 1, 0), {}

    def side(label: str, measure: Callable[[], dict]) -> Callable[[Side], None]:
        def take(side: Side) -> None:
            records[label] = record = measure()
            side.take(work.count / record["seconds"], record["peak_bytes"])

        return take

    def peer(label: str, env: str) -> Callable[[], dict]:
        return lambda: run_peer(setting, run, env, "run_inference.py", side=label, **asked)

    def ours() -> dict:
        return ask_parts(run, asked | {"output": str(run.fresh("ours"))}, script=SCRIPT)

    sides = {"bge_ds": side("bge_ds", ours)} | {label: side(label, peer(label, env)) for label, env in PEERS.items()}
    if name == "mine" and not args.hn_mine:
        del sides["FlagEmbedding"]
    results = in_turn(sides, args.repeats, name, alternate=True)
    tokens = records["bge_ds"]["tokens"] / work.count if results[0].figures else 0
    size = f"{work.size.format(tokens=tokens)}; fp32, {args.threads} threads"
    rows = rows_of(work.what, size, work.unit, results, hardware(setting, run.threads), work.goal)
    for row, result in zip(rows, results, strict=True):
        if not result.figures:
            continue
        row["versions"] = " ".join(f"{package} {number}" for package, number in records[result.name]["versions"].items())
        if result is not results[0] and results[0].figures:
            row |= compared(name, run, results[0], result)
    return rows


def compared(name: str, run: Run, ours: Side, peer: Side) -> dict[str, str]:
    """What a peer's row says of ours in the same turns. Raises ValueError where the results are not the same."""
    asked = {"what": "compare", "kind": name, "ours": str(run.work / "ours"), "theirs": str(run.work / PEERS[peer.name])}
    difference = ask_parts(run, asked, script=SCRIPT)["difference"]
    if not difference <= TOLERANCES[name]:
        raise ValueError(f"{name}: {peer.name}'s result differs from ours by {difference:.2e}: not the same work")
    ratios = [ours / theirs for ours, theirs in zip(ours.figures, peer.figures, strict=True)]
    note = f"turns: {min(ratios):.2f} to {max(ratios):.2f}; differs by {difference:.0e}"
    return {"ours_times_as_fast": f"{statistics.median(ratios):.2f}", "note": note}


def search_rows(args: argparse.Namespace, run: Run) -> list[dict]:
    """The exact search alone, over random vectors: time and peak memory of a process against the passages."""
    rows = []
    for times in TIMES:
        side, passages = Side("bge_ds"), times * args.searched
        folder = str(run.fresh("vectors") / "passages")
        ask_parts(run, {"what": "vectors", "passages": passages, "width": args.width, "output": folder}, script=SCRIPT)
        for _ in range(args.repeats):
            record = ask_parts(run, {"what": "search", "vectors": folder, "queries": args.queries}, script=SCRIPT)
            side.take(args.queries / record["seconds"], record["peak_bytes"])
        size = f"{args.queries} queries, {passages} passages of {args.width} features; fp32, {args.threads} threads"
        where = hardware(Shared("search", args.queries, 1, 0), run.threads)
        rows += rows_of("exact search of 210 passages", size, "queries/s", [side], where, "memory the same at any size")
    run.fresh("vectors")  # gigabytes
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON lines with text, or groups whose pos are taken; may be .gz")
    add("--groups", type=Path, help="JSON lines of groups, for mine and score (default: --data); may be .gz")
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--texts", type=int, default=20_000, help="texts that are encoded")
    add("--queries", type=int, default=5_000, help="queries that are mined for, and searched")
    add("--pool", type=int, default=50_000, help="passages that are mined")
    add("--pairs", type=int, default=2_000, help="pairs that are scored")
    add("--searched", type=int, default=50_000, help="passages of the smallest corpus that is searched")
    add("--width", type=int, default=384, help="features of a vector of the set search")
    add("--max_len", type=int, default=256, help="tokens of a text or pair at most")
    add("--hn_mine", type=Path, metavar="FILE", help="scripts/hn_mine.py of FlagEmbedding's repository: a side of mine")
    add_shared_flags(parser, "inference", stepped=False)
    args = parser.parse_args(argv)
    args.groups = args.groups or args.data
    return run_sets(args, run_set, DATA_COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
