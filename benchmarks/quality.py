"""Training quality against FlagEmbedding: the same model, data, steps and flags, some seeds each, nDCG@10 after training.

    python benchmarks/quality.py --data groups.jsonl.gz --eval_data BEIR_FOLDER --model MODEL --envs .bench

Each trainer draws its own order and negatives from the seed: the figures agree up to that noise, or one of them is wrong.
What --work holds already is not run again, so a comparison that was stopped continues; give other settings another folder.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent


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
    for name, default in (
        ("seeds", 3),
        ("steps", 40),
        ("batch", 16),
        ("group", 4),
        ("query_max_len", 32),
        ("passage_max_len", 96),
    ):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--groups", type=int, default=20000, help="lines of --data that are used")
    p.add_argument("--learning_rate", type=float, default=2e-5)
    args = p.parse_args()
    args.data, args.model, args.eval_data = args.data.resolve(), args.model.resolve(), [p.resolve() for p in args.eval_data]
    args.envs, args.work = args.envs.resolve(), args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)

    data = args.work / "groups.jsonl"
    opener = gzip.open if args.data.suffix == ".gz" else open
    with opener(args.data, "rt", encoding="utf-8") as source:
        data.write_text("".join(islice(source, args.groups)), encoding="utf-8")
    found = {"before": [score(args.model, args, args.work / "before.json")]}
    print(f"before training: {found['before'][0]}", flush=True)
    for seed in range(1, args.seeds + 1):
        for side in ("bge_ds", "FlagEmbedding"):
            output = args.work / f"{side}_{seed}"
            scores = output.with_suffix(".json")
            if not scores.exists():
                train(side, args, data, seed, output)
            found.setdefault(side, []).append(score(output, args, scores))
            print(f"{side}, seed {seed}: {found[side][-1]}", flush=True)
    write(args, found)


def write(args: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    """A row for each trainer and set. found: of each trainer, the scores of its seeds."""
    lengths, precision = f"{args.query_max_len}/{args.passage_max_len}", "bf16" if args.bf16 else "fp32"
    new = not args.output.exists()
    with open(args.output, "a", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        if new:
            writer.writerow(["side", "data", "steps", "batch", "group", "lengths", "precision", "nDCG@10", "mean", "deviation"])
        for name in found["before"][0]:
            for side, seeds in found.items():
                values = [scores[name] for scores in seeds]
                spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
                each = " ".join(f"{v:.4f}" for v in values)
                settings = (args.steps, args.batch, args.group, lengths, precision)
                writer.writerow([side, name, *settings, each, f"{statistics.mean(values):.4f}", spread])


if __name__ == "__main__":
    main()
