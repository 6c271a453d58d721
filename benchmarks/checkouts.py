"""Two checkouts of bge_ds against each other: steps of both training commands, and preprocessing.

    git worktree add /tmp/before COMMIT
    python benchmarks/checkouts.py --before /tmp/before --after . --groups groups.jsonl.gz --model MODEL

Both read shards made by `--before`. The sides take turns (before, after; after, before; ...), so that a machine that slows
down or warms up weighs on both alike. The ratio is the median of the turns' ratios; a turn is two runs, one after the other.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from comparing import say
from rows import append_rows, hardware, print_table
from sides import HERE, Setting, environment, launch, words_of

COLUMNS = (
    "date", "hardware", "versions", "what", "before", "after", "unit", "turns", "before_figure", "after_figure",
    "after_to_before", "lowest", "highest",
)  # fmt: skip
LENGTHS = {"finetune": {"query_max_len": 64, "passage_max_len": 256}, "pretrain": {"max_seq_length": 256}}
TRAINING = {
    "finetune": {"train_group_size": 8, "sentence_pooling_method": "mean", "temperature": 0.02},
    "pretrain": {"encoder_mlm_probability": 0.3, "decoder_mlm_probability": 0.5},
}


def run(checkout: Path, module: str, words: list[str], log: Path, threads: int) -> float:
    """Seconds that a command of a checkout took, from start to end."""
    began = time.perf_counter()
    launch([[sys.executable, "-m", module, *words]], log, [environment(threads)], folder=checkout)
    return time.perf_counter() - began


def preprocess(kind: str, checkout: Path, source: Path, output: Path, args: argparse.Namespace) -> float:
    shutil.rmtree(output, ignore_errors=True)
    words = [kind, *words_of({"input": source, "output": output, "tokenizer": args.model, **LENGTHS[kind]})]
    return run(checkout, "bge_ds.preprocess", words, args.work / "preprocess.log", args.threads)


def step(kind: str, checkout: Path, shards: Path, args: argparse.Namespace) -> float:
    """The median time of a run's steps, the first ones left out; from its metrics.jsonl."""
    output = args.work / "run"
    flags = {
        "train_data": shards, "output_dir": output, "model_name_or_path": args.model, "max_steps": args.steps, "use_cpu": True,
        "per_device_train_batch_size": args.batch * (1 if kind == "finetune" else 8), "logging_steps": 1, "save_strategy": "no",
        "train_sampling_strategy": "sequential", "overwrite_output_dir": True, **LENGTHS[kind], **TRAINING[kind],
    }  # fmt: skip
    run(checkout, f"bge_ds.{kind}", words_of(flags), args.work / "train.log", args.threads)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [step["seconds_per_step"] for step in map(json.loads, lines) if "seconds_per_step" in step]
    return statistics.median(seconds[args.warmup :])


def texts_of(groups: Path, target: Path, count: int) -> tuple[Path, Path]:
    """(the first groups, their positives as lines of text)."""
    target.mkdir(parents=True, exist_ok=True)
    with (gzip.open if groups.suffix == ".gz" else open)(groups, "rt", encoding="utf-8") as lines:
        taken = list(itertools.islice(lines, count))
    (target / "groups.jsonl").write_text("".join(taken), encoding="utf-8")
    texts = [json.dumps({"text": json.loads(line)["pos"][0]}, ensure_ascii=False) + "\n" for line in taken]
    (target / "texts.jsonl").write_text("".join(texts), encoding="utf-8")
    return target / "groups.jsonl", target / "texts.jsonl"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--before", type=Path, required=True, help="a checkout of bge_ds")
    add("--after", type=Path, default=HERE.parent, help="the checkout that is compared with it")
    add("--groups", type=Path, required=True, help="fine-tuning groups, JSON lines")
    add("--model", type=Path, required=True, help="folder of the encoder")
    add("--work", type=Path, default=HERE.parent / "runs" / "checkouts", help="folder for data and logs")
    add("--output", type=Path, default=HERE / "checkouts.csv", help="CSV file the rows are appended to")
    add("--lines", type=int, default=20000, help="groups that are preprocessed and trained on")
    add("--batch", type=int, default=8, help="queries a step; eight times as many texts in pre-training")
    add("--warmup", type=int, default=2, help="first steps of each run that are not timed")
    add("--steps", type=int, default=10, help="steps of a run, warm-up included")
    add("--turns", type=int, default=5, help="times that both sides run")
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    args.work, args.model = args.work.absolute(), args.model.absolute()
    sides = {"before": args.before.absolute(), "after": args.after.absolute()}
    groups, texts = texts_of(args.groups, args.work / "data", args.lines)
    sources = {"finetune": groups, "pretrain": texts}
    for kind, source in sources.items():
        preprocess(kind, sides["before"], source, args.work / kind, args)
    measured = {f"{kind}, a step": (step, kind, args.work / kind) for kind in sources}
    measured |= {f"preprocess {kind}": (preprocess, kind, source) for kind, source in sources.items()}
    rows = []
    for what, (measure, kind, source) in measured.items():
        figures: dict[str, list[float]] = {"before": [], "after": []}
        for turn in range(args.turns):
            for side in list(figures)[:: 1 if turn % 2 == 0 else -1]:
                more = (args.work / "made", args) if measure is preprocess else (args,)
                figures[side].append(measure(kind, sides[side], source, *more))
            say(f"{what}, turn {turn + 1} of {args.turns}: " + ", ".join(f"{s} {v[-1]:.3f} s" for s, v in figures.items()))
        ratios = [after / before for before, after in zip(*figures.values(), strict=True)]
        rows.append({
            "date": datetime.date.today().isoformat(), "hardware": hardware(Setting("", 1, 1, 0), args.threads),
            "versions": " ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers")),
            "what": what, **{side: commit_of(path) for side, path in sides.items()}, "unit": "s", "turns": args.turns,
            **{f"{side}_figure": f"{statistics.median(v):.4g}" for side, v in figures.items()},
            "after_to_before": f"{statistics.median(ratios):.3f}", "lowest": f"{min(ratios):.3f}",
            "highest": f"{max(ratios):.3f}",
        })  # fmt: skip
    print_table(rows, COLUMNS)
    append_rows(args.output, rows, COLUMNS)
    return 0


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
