"""Draws the groups of examples/recipe.sh, and tables the scores of its stages.

    python examples/stages.py draw groups.jsonl.gz --number 1920 --output drawn.jsonl
    python examples/stages.py scores base=MODEL tuned=runs/tuned --data beir/mine --output runs/scores --rerank tuned RERANKER

`scores` runs `bge_ds.evaluate` for each stage and keeps its figures in the output folder. A stage whose figures are there is
not evaluated again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gzip
import io
import json
import os
import random
import sys
from importlib.metadata import version
from pathlib import Path

from bge_ds import evaluate

MEASURES = ("nDCG@10", "MRR@10", "Recall@100")

Rows = list[tuple[str, str, dict[str, float]]]  # stage, set, measures


def draw(source: Path, number: int, seed: int) -> list[str]:
    """Lines of a file, or of the files of a folder: that many at random, in their order."""
    files = sorted(p for p in source.iterdir() if ".json" in p.name) if source.is_dir() else [source]
    if not files:
        raise ValueError(f"{source} holds no file of JSON lines")
    lines: list[str] = []
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as text:
            lines += [line.rstrip("\n") + "\n" for line in text if line.strip()]
    taken = sorted(random.Random(seed).sample(range(len(lines)), min(number, len(lines))))
    return [lines[i] for i in taken]


def evaluated(args: argparse.Namespace) -> Rows:
    """The rows of all stages, from `bge_ds.evaluate` or from an earlier run's files."""
    from transformers import logging

    logging.disable_progress_bar()
    rows: Rows = []
    for stage, model in args.stages:
        file = args.output / f"{stage}.json"
        if not file.is_file():
            words = ["--model_name_or_path", model, "--data", *map(str, args.data), "--output", str(file), *args.flags.split()]
            words += ["--query_max_len", "32", "--passage_max_len", str(args.passage_max_len)]
            if args.rerank and args.rerank[0] == stage:
                words += ["--rerank", args.rerank[1], "--rerank_depth", str(args.depth)]
                words += ["--rerank_max_len", str(32 + args.passage_max_len)]
            with contextlib.redirect_stdout(io.StringIO()):
                if status := evaluate.main(words):
                    sys.exit(status)
        for name, values in json.loads(file.read_text(encoding="utf-8"))["results"].items():
            plain = name.removesuffix(", reranked")
            rows.append((stage if plain == name else f"{stage}, reranked", plain, values))
    return rows


def say(rows: Rows) -> str:
    """nDCG@10: a line a stage, a column a set."""
    stages, sets = (list(dict.fromkeys(row[i] for row in rows)) for i in (0, 1))
    found = {(stage, name): values["nDCG@10"] for stage, name, values in rows}
    width = max(len(stage) for stage in [*stages, "nDCG@10"])
    lines = [f"{'nDCG@10':<{width}}  " + "  ".join(f"{name:>10}" for name in sets)]
    for stage in stages:
        lines.append(f"{stage:<{width}}  " + "  ".join(f"{found[stage, name]:>{max(10, len(name))}.4f}" for name in sets))
    return "\n".join(lines)


def append(path: Path, rows: Rows, note: str) -> None:
    import torch

    new = not path.exists()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    date, hardware = datetime.date.today().isoformat(), gpu or f"{os.cpu_count()} CPU cores"
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    with path.open("a", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        if new:
            writer.writerow(["date", "hardware", "versions", "settings", "stage", "set", *MEASURES])
        for stage, name, values in rows:
            writer.writerow([date, hardware, versions, note, stage, name, *(f"{values[m]:.4f}" for m in MEASURES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("draw")
    p.add_argument("source", type=Path, help="file of JSON lines (.gz), or folder of such")
    p.add_argument("--number", type=int, required=True, help="lines to draw")
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--output", type=Path, required=True)
    p = commands.add_parser("scores")
    p.add_argument("stages", nargs="+", metavar="NAME=MODEL", help="stages in the order of the table")
    p.add_argument("--data", type=Path, nargs="+", required=True, metavar="FOLDER", help="folders in BEIR's form")
    p.add_argument("--output", type=Path, required=True, help="folder of the figures")
    p.add_argument("--passage_max_len", type=int, default=64, help="tokens of a passage (64)")
    p.add_argument("--rerank", nargs=2, metavar=("NAME", "MODEL"), help="a stage, and the reranker of its rankings")
    p.add_argument("--depth", type=int, default=10, help="passages of a query that are reranked (10)")
    p.add_argument("--flags", default="", help="further flags of bge_ds.evaluate")
    p.add_argument("--csv", type=Path, help="CSV file that the rows are appended to")
    p.add_argument("--note", default="", help="settings, for the CSV file")
    args = parser.parse_args()
    try:
        if args.command == "draw":
            args.output.write_text("".join(draw(args.source, args.number, args.seed)), encoding="utf-8")
            return
        args.stages = [tuple(entry.split("=", 1)) for entry in args.stages]
        rows = evaluated(args)
        print(say(rows))
        if args.csv:
            append(args.csv, rows, args.note)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
