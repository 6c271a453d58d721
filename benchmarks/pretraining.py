"""RetroMAE pre-training against the existing trainer: the same model, texts, batches, precision and cores, in the same run.

    benchmarks/make_environments.sh .bench
    python benchmarks/pretraining.py --data groups.jsonl --model MODEL --envs .bench --sets natural full input vocabulary

As in contrastive.py, every side runs in a process of its own, bge_ds by its real command and FlagEmbedding by its own; each
step is timed from the end of one to the end of the next, and a side whose real tokens differ from the others' is an error.
The headline is texts a second. Prints a table and appends its rows to a CSV file.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from comparing import FAILED, add_shared_flags, compare, has_gpu, parse_steps, run_sets
from rows import PRETRAINING_COLUMNS, hardware, rows_of
from sides import Result, Run, Shared, ask_parts, make_shards, run_command, run_peer

SETS = ("natural", "natural_bf16", "full", "full_bf16", "input", "vocabulary", "gpu")
FULL_LOGITS_BATCHES = (1, 2)  # texts a step at which the existing trainer fits with a large vocabulary
SCRIPT = "own_pretraining.py"


@dataclass(frozen=True)
class Pretraining(Shared):
    """RetroMAE. full: texts of at least max_seq_length tokens; workers: processes that build batches, on both sides."""

    counts: ClassVar[str] = "texts"

    max_seq_length: int = 512
    full: bool = False
    workers: int = 1


# ----------------------------------------------------------------------------------------------- the sides


def shards_of(setting: Pretraining, run: Run) -> Path:
    return make_shards("pretrain", setting, run, max_seq_length=setting.max_seq_length)


def ours(setting: Pretraining, run: Run) -> dict:
    flags = {
        "train_data": shards_of(setting, run), "max_seq_length": setting.max_seq_length,
        "dataloader_num_workers": setting.workers,
    }  # fmt: skip
    return run_command("bge_ds.pretrain", flags, setting, run)


def flagembedding(setting: Pretraining, run: Run, **more) -> dict:
    return run_peer(setting, run, "retromae", "run_retromae.py", **more)


def ask_own(what: str, setting: Pretraining, run: Run, **more) -> dict:
    asked = {**asdict(setting), "what": what, "shards": str(shards_of(setting, run)), **more}
    return ask_parts(run, asked, script=SCRIPT)


def plain(setting: Pretraining, run: Run) -> dict:
    return ask_own("plain", setting, run)


# ----------------------------------------------------------------------------------------------- the sets


def with_data(setting: Pretraining, args: argparse.Namespace, run: Run) -> Pretraining:
    """The setting with its data file: exactly the texts its steps take, in order."""
    count, model = setting.batch * setting.steps, setting.model or str(args.model.absolute())
    file = run.fresh(f"data_{'full' if setting.full else 'natural'}_{count}") / "texts.jsonl"
    least_tokens = setting.max_seq_length if setting.full else 0
    asked = {"source": str(args.data.absolute()), "target": str(file), "count": count, "least_tokens": least_tokens}
    ask_parts(run, {"what": "texts", "model": model, **asked}, script=SCRIPT)
    return replace(setting, data=str(file), model=model)


def check_full(setting: Pretraining, results: list[Result]) -> list[Result]:
    """Every text of a full set must have been cut, on every side."""
    wanted = setting.batch * setting.max_seq_length
    for result in results:
        if setting.full and set(result.tokens) - {wanted}:
            raise ValueError(
                f"{result.side} computed {result.tokens} tokens a step, full texts give {wanted}; look into the logs in --work"
            )
    return results


def training_set(name: str, args: argparse.Namespace, run: Run) -> list[dict]:
    full, bf16 = name.startswith("full"), name.endswith("bf16")
    setting = Pretraining(
        name.removesuffix("_bf16"), args.batch, args.steps, args.warmup, bf16=bf16, full=full,
        max_seq_length=args.max_seq_length, workers=args.workers,
    )  # fmt: skip
    setting = with_data(setting, args, run)
    results = compare(setting, run, {"bge_ds": ours, "FlagEmbedding": flagembedding}, args.repeats)
    return rows_of(setting, check_full(setting, results), hardware(setting, run.threads))


def input_set(args: argparse.Namespace, run: Run) -> list[dict]:
    """The input pipelines alone, one thread."""
    run = replace(run, threads=1)
    setting = Pretraining("input", args.batch, args.input_steps, args.warmup, full=True, max_seq_length=args.max_seq_length)
    setting = with_data(setting, args, run)

    def own(**how: bool):
        return lambda setting, run: ask_own("input", setting, run, rounds=args.input_rounds, **how)

    def peer(tokenized: bool):
        return lambda setting, run: flagembedding(setting, run, what="input", tokenized=tokenized)

    sides = {
        "bge_ds": own(),
        "bge_ds, through a worker": own(worker=True),
        "bge_ds, its masks drawn too": own(masks=True),
        "FlagEmbedding": peer(tokenized=False),
        "FlagEmbedding, tokenized before": peer(tokenized=True),
    }
    return rows_of(setting, check_full(setting, compare(setting, run, sides, args.repeats)), hardware(setting, 1))


def vocabulary_set(args: argparse.Namespace, run: Run) -> list[dict]:
    """Peak memory with XLM-R's vocabulary, 250,002: both sides at batches that full logits fit, ours at the real one.

    What full logits would take at the real batch is a line through the two small ones, and its row says so.
    """
    folder = run.work / "vocabulary"
    ask_parts(run, {"what": "model", "shape": "vocabulary", "model": str(args.model.absolute()), "output": str(folder)})
    shared = Pretraining(
        "vocabulary", args.batch, args.steps, args.warmup, model=str(folder), full=True, max_seq_length=args.max_seq_length,
        workers=args.workers,
    )  # fmt: skip
    rows, peaks = [], []
    for batch in FULL_LOGITS_BATCHES:
        setting = with_data(replace(shared, batch=batch), args, run)
        results = compare(setting, run, {"bge_ds": ours, "FlagEmbedding": flagembedding}, args.repeats)
        peaks.append(results[-1].peak_bytes)
        rows += rows_of(setting, check_full(setting, results), hardware(setting, run.threads))
    setting = with_data(shared, args, run)
    results = check_full(setting, compare(setting, run, {"bge_ds": ours}, args.repeats))
    if all(peaks):
        results.append(extrapolated(setting.batch, peaks))
    return rows + rows_of(setting, results, hardware(setting, run.threads))


def extrapolated(batch: int, peaks: list[float]) -> Result:
    (fewer, more), (low, high) = FULL_LOGITS_BATCHES, peaks
    peak = low + (high - low) / (more - fewer) * (batch - fewer)
    note = f"NOT MEASURED: memory on a line through {fewer} and {more} texts, {low / 2**20:.0f} and {high / 2**20:.0f} MiB"
    return Result("FlagEmbedding, extrapolated", peak_bytes=peak, note=note)


def gpu_set(args: argparse.Namespace, run: Run) -> list[dict]:
    """bge-base's and bge-large's shapes on one GPU, full texts, bf16: bge_ds and a plain padded trainer."""
    if not has_gpu():
        return []
    rows = []
    for shape in ("base", "large"):
        folder = run.work / shape
        ask_parts(run, {"what": "model", "shape": shape, "model": str(args.model.absolute()), "output": str(folder)})
        setting = Pretraining(
            f"bge-{shape}", args.gpu_batch, args.gpu_steps, args.warmup, bf16=True, cuda=True, model=str(folder), full=True,
            max_seq_length=args.max_seq_length, workers=args.workers,
        )  # fmt: skip
        setting = with_data(setting, args, run)
        results = check_full(setting, compare(setting, run, {"bge_ds": ours, "plain, padded": plain}, args.repeats))
        shares = shares_of_rate(results, ask_own("needed", setting, run))
        rows += rows_of(setting, results + shares, hardware(setting, run.threads))
    return rows


def shares_of_rate(results: list[Result], needed: dict) -> list[Result]:
    """A figure a side: the products that its texts need, by its time, by the rate of a large square product (MFU)."""
    flops = sum(needed["flops"]) / len(needed["flops"])  # full texts: every step needs the same
    note = f"square {needed['square_rate'] / 1e9:,.0f} GFLOP/s"
    return [
        Result(f"{done.side}: share of the best matrix rate (MFU)", note=note,
               figure=flops * len(done.seconds) / sum(done.seconds) / needed["square_rate"])
        for done in results if done.note != FAILED
    ]  # fmt: skip


def run_set(name: str, args: argparse.Namespace, run: Run) -> list[dict]:
    if name in ("input", "vocabulary", "gpu"):
        return {"input": input_set, "vocabulary": vocabulary_set, "gpu": gpu_set}[name](args, run)
    return training_set(name, args, run)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_shared_flags(parser, "pretraining")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON lines of passages (text) or groups (pos), may be .gz")
    add("--sets", nargs="+", choices=SETS, default=["natural", "full", "natural_bf16", "full_bf16", "input", "vocabulary"])
    add("--batch", type=int, default=16, help="texts a step")
    add("--max_seq_length", type=int, default=512, help="tokens at which a text is cut")
    add("--workers", type=int, default=1, help="processes that build batches, on both sides")
    add("--input_steps", type=int, default=8, help="as --steps, for the input set")
    add("--input_rounds", type=int, default=50, help="batches of ours for one figure of the input set")
    add("--gpu_batch", type=int, default=32, help="texts a step of the gpu set")
    add("--gpu_steps", type=int, default=13, help="as --steps, for the gpu set")
    return parse_steps(parser, argv, ("steps", "input_steps", "gpu_steps"))


def main(argv: list[str] | None = None) -> int:
    return run_sets(parse(argv), run_set, PRETRAINING_COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
