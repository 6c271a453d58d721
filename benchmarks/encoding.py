"""Encoding against its peers: lines of texts to vectors on disk, with the same model, texts, precision and cores.

    benchmarks/make_environments.sh .bench flagembedding sentence_transformers
    python benchmarks/encoding.py --data train.jsonl.gz --model MODEL --envs .bench --threads 2 --repeats 5

Each side is a process of its own, all take turns, every second turn in reverse order. A peer is compared with ours of the same
turn. Vectors that differ from ours are an error. Prints a table and appends its rows to a CSV file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from comparing import add_shared_flags, run_sets
from data import DATA_COLUMNS, Side, in_turn, rows_of
from rows import hardware
from sides import Run, Shared, ask_parts, different_texts, run_peer

PEERS = {"sentence-transformers": "sentence_transformers", "FlagEmbedding": "flagembedding"}  # side: its environment
SCRIPT = "own_encoding.py"
TOLERANCE = 1e-4  # of a feature of a vector of length 1, between two sides in fp32


def texts_file(args: argparse.Namespace, run: Run) -> Path:
    """The first texts of the data as they are, each once. Raises ValueError where there are too few."""
    texts = list(itertools.islice(different_texts(args.data), args.texts))
    if len(texts) < args.texts:
        raise ValueError(f"{args.data} has {len(texts)} different texts, --texts {args.texts} are asked for: give more data")
    path = run.fresh("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def run_set(name: str, args: argparse.Namespace, run: Run) -> list[dict]:
    lines, model = str(texts_file(args, run)), str(args.model.absolute())
    setting, records = Shared(name, args.texts, 1, 0, model=model, data=lines), {}

    def side(label: str, measure: Callable[[], dict]) -> Callable[[Side], None]:
        def work(side: Side) -> None:
            records[label] = record = measure()
            side.take(args.texts / record["seconds"], record["peak_bytes"])

        return work

    def ours() -> dict:
        output = str(run.fresh("ours") / "vectors")
        asked = {"what": "encode", "lines": lines, "model": model, "max_len": args.max_len, "output": output}
        return ask_parts(run, asked, script=SCRIPT)

    sides = {"bge_ds": side("bge_ds", ours)}
    for label, env in PEERS.items():
        sides[label] = side(label, lambda label=label, env=env: run_peer(
            setting, run, env, "run_encoding.py", side=label, max_len=args.max_len))  # fmt: skip
    results = in_turn(sides, args.repeats, name, alternate=True)
    tokens = records["bge_ds"]["tokens"] / args.texts if results[0].figures else 0
    size = f"{args.texts} texts of {tokens:.0f} tokens, at most {args.max_len}; fp32, {args.threads} threads"
    rows = rows_of("texts to vectors on disk", size, "texts/s", results, hardware(setting, run.threads))
    for row, result in zip(rows, results, strict=True):
        if not result.figures:
            continue
        row["versions"] = " ".join(f"{package} {number}" for package, number in records[result.name]["versions"].items())
        if result is not results[0] and results[0].figures:
            row |= compared(run, results[0], result)
    return rows


def compared(run: Run, ours: Side, peer: Side) -> dict[str, str]:
    """What a peer's row says of ours in the same turns. Raises ValueError where the vectors are not the same."""
    asked = {"what": "compare", "ours": str(run.work / "ours/vectors")}
    difference = ask_parts(run, asked | {"theirs": str(run.work / PEERS[peer.name] / "vectors.npy")}, script=SCRIPT)["largest"]
    if not difference <= TOLERANCE:
        raise ValueError(f"a feature of {peer.name}'s vectors differs by {difference:.2e}: not the same work")
    ratios = [ours / theirs for ours, theirs in zip(ours.figures, peer.figures, strict=True)]
    note = f"turns: {min(ratios):.2f} to {max(ratios):.2f}; features differ by {difference:.0e} at most"
    return {"ours_times_as_fast": f"{statistics.median(ratios):.2f}", "note": note}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON lines with text, or groups whose pos are taken; may be .gz")
    add("--texts", type=int, default=20_000, help="texts that are encoded")
    add("--max_len", type=int, default=256, help="tokens of a text at most")
    add_shared_flags(parser, "encoding", stepped=False)
    parser.set_defaults(sets=["encoding"])
    return run_sets(parser.parse_args(argv), run_set, DATA_COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
