"""What pre-training is worth: a small BERT from scratch, then the same fine-tuning, after each objective.

    python benchmarks/objectives.py --data DATA

DATA holds pretrain/train.jsonl.gz, debian/train.jsonl.gz and the BEIR-form folders debian/dev and xquad_en. Every objective
sees the same texts in the same order, token for token (`--per_device_train_tokens`); "none" is the same random model. What
is done is not repeated, so a run that was stopped goes on. Appends its rows to objectives.csv.
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
from pathlib import Path

HERE = Path(__file__).resolve().parent
OBJECTIVES = ("none", "mlm", "retromae", "dupmae")
COLUMNS = ("date", "model", "objective", "steps", "tokens", "finetune_steps", "set", "when", "nDCG@10", "mean")


def run(command: list[object], log: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        result = subprocess.run([sys.executable, *map(str, command)], stdout=out, stderr=out, env=environment)
    if result.returncode:
        raise SystemExit(f"failed, see {log}: {' '.join(map(str, command))}")


def flags(**values: object) -> list[object]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def make_start(args: argparse.Namespace) -> Path:
    """Tokenizer and config of the small BERT."""
    folder = args.work / "small"
    if (folder / "config.json").exists():
        return folder
    texts = args.work / "texts.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    with gzip.open(args.data / "pretrain/train.jsonl.gz") as source, open(texts, "wb") as out:
        out.write(source.read())
    script = HERE.parent / "examples" / "make_tokenizer.py"
    run([script, *flags(input=texts, output=folder, vocabulary=args.vocabulary)], args.work / "tokenizer.log")
    texts.unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_attention_heads": args.width // 32}
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 4 * args.width}, indent=2))
    return folder


def pretrained(objective: str, seed: int, start: Path, args: argparse.Namespace) -> Path:
    """The folder of the encoder after its pre-training."""
    output = args.work / f"{objective}_{seed}"
    if objective == "none":
        if not (output / "config.json").exists():
            script = HERE.parent / "examples" / "random_model.py"
            run([script, *flags(config=start, output=output, seed=seed)], output.with_suffix(".log"))
        return output
    if not (output / "encoder_model" / "config.json").exists():
        settings = flags(
            objective=objective, model_name_or_path="", config_name=start, tokenizer_name=start, output_dir=output,
            train_data=args.data / "pretrain/train.jsonl.gz", max_seq_length=args.length, max_steps=args.steps,
            per_device_train_tokens=args.tokens, learning_rate=args.learning_rate, warmup_steps=0.1, seed=seed,
            save_strategy="no", logging_steps=50,
        )  # fmt: skip
        run(["-m", "bge_ds.pretrain", "--overwrite_output_dir", *settings], output.with_suffix(".log"))
    return output / "encoder_model"


def finetuned(name: str, seed: int, model: Path, args: argparse.Namespace) -> Path:
    output = args.work / f"{name}_{seed}_finetuned"
    if not (output / "model.safetensors").exists():
        settings = flags(
            model_name_or_path=model, output_dir=output, train_data=args.data / "debian/train.jsonl.gz", train_group_size=2,
            query_max_len=32, passage_max_len=args.length, per_device_train_batch_size=64, max_steps=args.finetune_steps,
            learning_rate=args.finetune_rate, warmup_steps=0.1, temperature=0.05, seed=seed, save_strategy="no",
        )  # fmt: skip
        run(["-m", "bge_ds.finetune", "--overwrite_output_dir", *settings], output.with_suffix(".log"))
    return output


def scores(model: Path, file: Path, args: argparse.Namespace) -> dict[str, float]:
    """nDCG@10 of each set."""
    if not file.exists():
        sets = [args.data / "debian/dev", args.data / "xquad_en"]
        settings = flags(
            model_name_or_path=model, query_max_len=32, passage_max_len=args.length, output=file, sentence_pooling_method="cls"
        )
        run(["-m", "bge_ds.evaluate", *settings, "--data", *sets], file.with_suffix(".log"))
    return {name: values["nDCG@10"] for name, values in json.loads(file.read_text())["results"].items()}


def rows_of(objective: str, found: dict[str, list[dict[str, float]]], model: str, args: argparse.Namespace) -> list[dict]:
    rows, today = [], datetime.date.today().isoformat()
    steps = 0 if objective == "none" else args.steps
    for when, runs in found.items():
        for name in runs[0]:
            values = [run[name] for run in runs]
            rows.append(dict(zip(COLUMNS, (
                today, model, objective, steps, steps * args.tokens, args.finetune_steps, name, when,
                " ".join(f"{value:.4f}" for value in values), f"{statistics.mean(values):.4f}",
            ), strict=True)))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the data sets")
    add("--work", type=Path, default=HERE.parent / "runs" / "objectives", help="folder for models and logs")
    add("--output", type=Path, default=HERE / "objectives.csv", help="CSV file the rows are appended to")
    add("--seeds", type=int, nargs="+", default=[1, 2])
    add("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    add("--vocabulary", type=int, default=4096, help="word pieces of the tokenizer")
    add("--width", type=int, default=128, help="features of the encoder")
    add("--layers", type=int, default=2)
    add("--length", type=int, default=64, help="tokens of a text, in both trainings")
    add("--tokens", type=int, default=2048, help="tokens a step of pre-training")
    add("--steps", type=int, default=1200, help="steps of pre-training")
    add("--learning_rate", type=float, default=2e-3)
    add("--finetune_steps", type=int, default=300)
    add("--finetune_rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.data, args.work = args.data.absolute(), args.work.absolute()
    start = make_start(args)
    model = f"BERT {args.layers} x {args.width}, {args.vocabulary} words, {args.length} tokens"
    found: dict[str, dict[str, list]] = {name: {"before": [], "fine-tuned": []} for name in args.objectives}
    for seed in args.seeds:
        for name in args.objectives:
            encoder = pretrained(name, seed, start, args)
            found[name]["before"].append(scores(encoder, args.work / f"{name}_{seed}_before.json", args))
            tuned = finetuned(name, seed, encoder, args)
            found[name]["fine-tuned"].append(scores(tuned, args.work / f"{name}_{seed}_after.json", args))
            print(name, seed, {when: values[-1] for when, values in found[name].items()}, flush=True)
    rows = [row for name in args.objectives for row in rows_of(name, found[name], model, args)]
    new = not args.output.exists()
    with args.output.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(str(row[name]).ljust(12) for name in COLUMNS[2:]))


if __name__ == "__main__":
    main()
