"""Training quality against FlagEmbedding: the same model, data, steps and flags, some seeds each, nDCG@10 after training.

    python benchmarks/quality.py --data groups.jsonl.gz --eval_data BEIR_FOLDER --model MODEL --envs .bench

Each trainer draws its own order and negatives from the seed: the figures agree up to that noise, or one of them is wrong.
A row is written as soon as it is measured, and what --output or --work has already is not run again, so a comparison that was
stopped continues; give other settings another --work. `reranking_quality.py` does the same for rerankers.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import json
import os
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETTINGS = ("trained", "steps", "batch", "group", "lengths", "learning_rate", "precision")
SIDES = ("bge_ds", "FlagEmbedding")
COLUMNS = ("date", *SETTINGS, "side", "set", "seed", "nDCG@10")


class Rows:
    """The rows of one setting in a CSV file, a figure each."""

    def __init__(self, path: Path, **settings: object):
        self.path, self.settings = path, {name: str(value) for name, value in settings.items()}

    def values(self, side: str, name: str) -> dict[str, float]:
        """nDCG@10 by seed."""
        if not self.path.exists():
            return {}
        wanted = self.settings | {"side": side, "set": name}
        with self.path.open(newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if wanted.items() <= row.items()]
        return {row["seed"]: float(row["nDCG@10"]) for row in rows}

    def append(self, side: str, seed: object, scores: dict[str, float]) -> None:
        """scores: nDCG@10 by set."""
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            for name, value in scores.items():
                at = {"date": datetime.date.today().isoformat(), "side": side, "set": name, "seed": seed}
                writer.writerow(at | self.settings | {"nDCG@10": f"{value:.4f}"})
                print(f"{side}, seed {seed or '-'}, {name}: {value:.4f}", flush=True)

    def summary(self, sides: tuple[str, ...], names: list[str]) -> None:
        for name in names:
            for side in sides:
                if values := list(self.values(side, name).values()):
                    spread = f", deviation {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                    print(f"{name}, {side}: mean of {len(values)} {statistics.mean(values):.4f}{spread}")


def run(command: list[object], log: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    with open(log, "w") as out:
        # In a folder of its own: a folder named FlagEmbedding in the working directory would hide the package.
        result = subprocess.run([*map(str, command)], stdout=out, stderr=out, cwd=log.parent, env=environment)
    if result.returncode:
        raise SystemExit(f"failed, see {log}: {' '.join(map(str, command))}")


def train(side: str, args: argparse.Namespace, data: Path, seed: int, output: Path) -> None:
    flags = {
        "model_name_or_path": args.model, "train_data": data, "output_dir": output, "train_group_size": args.group,
        "query_max_len": args.query_max_len, "passage_max_len": args.passage_max_len, "max_steps": args.steps,
        "per_device_train_batch_size": args.batch, "learning_rate": args.learning_rate, "temperature": 0.02,
        "sentence_pooling_method": "mean", "normalize_embeddings": True, "bf16": args.bf16, "use_cpu": True, "seed": seed,
        "save_strategy": "no", "report_to": "none", "logging_steps": 1,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    if side == "bge_ds":
        run([sys.executable, "-m", "bge_ds.finetune", *words], output.with_suffix(".log"))
    else:
        python = args.envs / "flagembedding" / "bin" / "python"
        run([python, "-m", "FlagEmbedding.finetune.embedder.encoder_only.base", *words], output.with_suffix(".log"))


def score(model: Path, args: argparse.Namespace, output: Path) -> dict[str, float]:
    """nDCG@10 of each folder of --eval_data; read from `output` where that is there."""
    if output.exists():
        return read_scores(output)
    words: list[object] = ["--sentence_pooling_method", "mean", "--normalize_embeddings", "True"]
    words += ["--output", output, "--use_cpu", "--query_max_len", args.query_max_len, "--passage_max_len", args.passage_max_len]
    words += ["--bf16"] if args.bf16 else []
    command = [sys.executable, "-m", "bge_ds.evaluate", "--model_name_or_path", model, *words, "--data", *args.eval_data]
    run(command, output.with_suffix(".log"))
    return read_scores(output)


def read_scores(file: Path) -> dict[str, float]:
    return {name: values["nDCG@10"] for name, values in json.loads(file.read_text())["results"].items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", type=Path, required=True, help="JSON lines of groups, may be .gz")
    p.add_argument("--eval_data", type=Path, nargs="+", required=True, help="folders in BEIR's form")
    p.add_argument("--model", type=Path, required=True, help="folder of the encoder, mean pooling")
    p.add_argument("--envs", type=Path, default=HERE.parent / ".bench", help="folder that make_environments.sh filled")
    p.add_argument("--work", type=Path, default=HERE.parent / ".bench" / "quality")
    p.add_argument("--output", type=Path, default=HERE / "quality.csv", help="CSV file the rows are appended to")
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    for name, default in (("steps", 40), ("batch", 16), ("group", 4), ("query_max_len", 32), ("passage_max_len", 96)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--groups", type=int, default=20000, help="lines of --data that are used")
    p.add_argument("--learning_rate", type=float, default=2e-5)
    args = p.parse_args()
    args.data, args.model, args.eval_data = args.data.resolve(), args.model.resolve(), [p.resolve() for p in args.eval_data]
    args.envs, args.work = args.envs.resolve(), args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    measure(args)


def measure(args: argparse.Namespace) -> None:
    data, names = args.work / "groups.jsonl", [folder.name for folder in args.eval_data]
    opener = gzip.open if args.data.suffix == ".gz" else open
    with opener(args.data, "rt", encoding="utf-8") as source:
        data.write_text("".join(islice(source, args.groups)), encoding="utf-8")
    rows = Rows(
        args.output, trained="embedder", steps=args.steps, batch=args.batch, group=args.group,
        lengths=f"{args.query_max_len}/{args.passage_max_len}", learning_rate=args.learning_rate,
        precision="bf16" if args.bf16 else "fp32",
    )  # fmt: skip

    def missing(side: str, seed: object) -> bool:
        return any(str(seed) not in rows.values(side, name) for name in names)

    if missing("before", ""):
        rows.append("before", "", score(args.model, args, args.work / "before.json"))
    for seed in args.seeds:
        for side in SIDES:
            if missing(side, seed):
                output = args.work / f"{side}_{seed}"
                scores = output.with_suffix(".json")
                if not scores.exists():
                    train(side, args, data, seed, output)
                rows.append(side, seed, score(output, args, scores))
    rows.summary(("before", *SIDES), names)


if __name__ == "__main__":
    main()
