"""Scores several models on one retrieval set: a table, and a picture of their nDCG@10 beside the losses of their training.

python examples/report.py --data quickstart/data/test --bm25 0.25 "before=MODEL" "after=quickstart/model" \
    --losses quickstart/model --picture report.png
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
from pathlib import Path

from transformers import logging

from bge_ds import api
from bge_ds.data.beir import read_folder
from bge_ds.evaluate import table
from bge_ds.evaluation.retrieval import NAMES, VECTORS, evaluate_with

CURVES = ("loss", "encoder_loss", "decoder_loss")

Table = list[tuple[str, dict[str, float]]]  # (name of a model, its measures), from above


def scores(models: list[tuple[str, str]], folders: list[Path], bm25: float | None, lengths: dict[str, int]) -> dict[str, Table]:
    """Set -> table. Where a weight of BM25 is given, its first row is BM25 and its last the last model together with BM25."""
    sets = [read_folder(folder) for folder in folders]
    tables: dict[str, Table] = {held_out.name: [] for held_out in sets}
    for at, (name, folder) in enumerate(models):
        embedder = api.load(folder, **lengths)
        for held_out in sets:
            found = evaluate_with(held_out, embedder, bm25 if at == len(models) - 1 else None)
            rows = tables[held_out.name]
            rows.append((name, found[VECTORS]))
            if "BM25" in found:
                rows.insert(0, ("BM25 (words alone)", found["BM25"]))
                rows.append((f"{name} + BM25", found["hybrid"]))
    return tables


def read_curves(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Curve name -> (steps, values), for the losses that the run's `metrics.jsonl` holds."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    curves = {}
    for name in CURVES:
        points = [(row["step"], row[name]) for row in rows if "step" in row and row.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            curves[name] = (list(steps), list(values))
    if not curves:
        raise ValueError(f"{path} holds none of {', '.join(CURVES)}")
    return curves


def draw(tables: dict[str, Table], runs: list[Path], output: Path) -> None:
    """One panel of nDCG@10 by model for each set, then one of losses for each run."""
    import matplotlib

    matplotlib.use("Agg")  # write files; no screen is needed
    import matplotlib.pyplot as plt

    panels = len(tables) + len(runs)
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3.6), squeeze=False, layout="constrained")
    for (name, rows), panel in zip(tables.items(), axes[0], strict=False):
        bars = panel.barh([row for row, _ in rows], [values["nDCG@10"] for _, values in rows], color="tab:blue")
        panel.bar_label(bars, fmt="%.3f", padding=2)
        panel.invert_yaxis()
        panel.set(title=f"nDCG@10 on {name}", xlim=(0, 1.1))
    for run, panel in zip(runs, axes[0][len(tables) :], strict=True):
        for name, (steps, values) in read_curves(run).items():
            panel.plot(steps, values, label=name.replace("_", " "))
        panel.set(title=run.name.replace("_", " "), xlabel="optimizer step", ylabel="loss (nats)")
        panel.grid(alpha=0.3)
        panel.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def append(path: Path, set_name: str, rows: Table) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        if new:
            writer.writerow(["date", "set", "model", *NAMES])
        for name, values in rows:
            writer.writerow([datetime.date.today().isoformat(), set_name, name, *(f"{values[n]:.4f}" for n in NAMES)])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Scores models on retrieval sets and draws the result.")
    p.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="models in the order of the table")
    p.add_argument("--data", type=Path, nargs="+", required=True, metavar="FOLDER", help="folders in BEIR's form")
    p.add_argument("--query_max_len", type=int, default=32, help="tokens of a query (32)")
    p.add_argument("--passage_max_len", type=int, default=64, help="tokens of a passage (64)")
    p.add_argument("--bm25", type=float, metavar="WEIGHT", help="also BM25, and the last model with it (try 0.25)")
    p.add_argument("--losses", type=Path, nargs="+", default=[], metavar="RUN", help="folders with a metrics.jsonl")
    p.add_argument("--csv", type=Path, help="CSV file that the rows are appended to, with the set's name")
    p.add_argument("--picture", type=Path, help="picture to write (.png, .svg, .pdf)")
    return p


def main() -> None:
    args = parser().parse_args()
    models = []
    for entry in args.models:
        name, equals, folder = entry.partition("=")
        if not equals:
            parser().error(f"{entry!r} is not NAME=FOLDER")
        models.append((name, folder))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        lengths = {"query_max_len": args.query_max_len, "passage_max_len": args.passage_max_len}
        tables = scores(models, args.data, args.bm25, lengths)
        for name, rows in tables.items():
            print(table(rows, head="model"))
            print(f"{name}: {rows[0][1]['queries']} queries, {rows[0][1]['passages']} passages\n")
            if args.csv:
                append(args.csv, name, rows)
        if args.picture:
            draw(tables, args.losses, args.picture)
            print(f"picture: {args.picture}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
