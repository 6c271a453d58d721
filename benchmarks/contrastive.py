"""Fine-tuning against its peers: the same model, texts, batches, precision and cores, in the same run.

    benchmarks/make_environments.sh .bench
    python benchmarks/contrastive.py --data groups.jsonl --model MODEL --envs .bench --sets fp32 cached bf16 cached_bf16 parts

Every side runs in a process of its own with its own interpreter, one after the other; with --repeats, all of them again.
bge_ds is measured by its real command, whose metrics.jsonl holds the figures; the peers by their own trainers with a
callback. Each step is timed from the end of one to the end of the next, so that fetching batches counts. A side whose
tokens differ from the others' is an error. Prints a table and appends its rows to a CSV file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from rows import append_rows, hardware, print_table, rows_of
from sides import (
    HERE,
    Result,
    Run,
    Setting,
    SideFailed,
    ask_parts,
    flagembedding,
    run_ours,
    sentence_transformers,
    shards_of,
    write_groups,
)

SETS = ("fp32", "bf16", "cached", "cached_bf16", "parts", "gpu")
FAILED = "failed"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compare(setting: Setting, run: Run, sides: dict[str, Callable], repeats: int) -> list[Result]:
    """All sides in turn, `repeats` times; every side must have seen the same tokens. One that fails is said and left out."""
    results = {name: Result(name) for name in sides}
    for turn in range(repeats):
        for name in sides:
            if results[name].note == FAILED:
                continue
            say(f"{setting.what}, {setting.precision}: {name}, turn {turn + 1} of {repeats}")
            try:
                results[name].extend(sides[name](setting, run), setting.warmup)
            except SideFailed as error:
                say(str(error))
                results[name] = Result(name, note=FAILED)
    done = [result for result in results.values() if result.note != FAILED]
    for result in done[1:]:
        same_tokens(result.side, result.tokens, done[0])
    return list(results.values())


def same_tokens(side: str, tokens: list[int], base: Result) -> None:
    if tokens != base.tokens:
        raise ValueError(
            f"{side} computed {tokens} real tokens a step, {base.side} {base.tokens}: not the same texts, so their times mean "
            "nothing; take data whose queries all fit the length, or look into the logs in --work"
        )


def step_parts(setting: Setting, run: Run, repeats: int) -> list[Result]:
    """The step of the command against the encoder alone on the same batches, and against its matrix products."""
    ours, alone = Result("bge_ds"), {"seconds": [], "tokens": [], "flops": [], "needed": []}
    for _ in range(repeats):
        say(f"{setting.what}, {setting.precision}: the command, then its encoder alone")
        ours.extend(run_ours(setting, run), setting.warmup)
        parts = ask_parts(run, {**asdict(setting), "what": "step", "shards": str(shards_of(setting, run))})
        parts["needed"] = [flops / parts["layer_rate"] for flops in parts["flops"]]
        for name, values in alone.items():
            values.extend(parts[name][setting.warmup :])
    same_tokens("the encoder alone", alone["tokens"], ours)
    step, best = sum(ours.seconds), max(parts["layer_rate"], parts["square_rate"])
    rates = f"layers {parts['layer_rate'] / 1e9:,.0f}, square {parts['square_rate'] / 1e9:,.0f} GFLOP/s"
    return [
        ours,
        Result("the encoder's forward and backward: share of the step", figure=sum(alone["seconds"]) / step),
        Result("step: times its matrix products", figure=step / sum(alone["needed"]), note=rates),
        Result("step: share of the best matrix rate (MFU)", figure=sum(alone["flops"]) / step / best, note=rates),
    ]


def loss_parts(setting: Setting, run: Run, width: int, times: int = 12) -> list[Result]:
    """The loss a rank, 2 ranks cross-device against 1 with the same local batch; one core a rank, as many batches."""
    rows = []
    for side, peer in (("bge_ds", None), ("FlagEmbedding", "flagembedding")):
        asked = {**asdict(setting), "what": "loss", "steps": times, "width": width}
        say(f"{setting.what}: the loss of {side} on 1 and 2 ranks")
        one, two = (
            statistics.median(ask_parts(run, asked, ranks, threads=1, peer=peer)["seconds"][times // 3 :]) for ranks in (1, 2)
        )
        note = f"{one * 1e3:.0f} and {two * 1e3:.0f} ms, {width} features, one thread a rank"
        rows.append(Result(f"{side}: loss a rank, 2 ranks against 1", figure=two / one, note=note))
    return rows


# ----------------------------------------------------------------------------------------------- the sets


def small_batch(args: argparse.Namespace, bf16: bool) -> tuple[Setting, dict[str, Callable]]:
    setting = Setting("fine-tuning", args.batch, args.group, args.steps, args.warmup, bf16=bf16)
    sides = {"bge_ds": run_ours, "FlagEmbedding": flagembedding, "sentence-transformers": sentence_transformers("plain")}
    return setting, sides


def cached_batch(args: argparse.Namespace, bf16: bool) -> tuple[Setting, dict[str, Callable]]:
    """Ours in pieces of tokens; theirs in pieces of texts, of each size asked for, and where asked in pieces of tokens."""
    setting = Setting("cached", args.cached_batch, 1 + args.negatives, args.cached_steps, args.warmup, bf16=bf16)
    sides = {"bge_ds": cached_ours(args.sub_batch_tokens)}
    for size in args.mini_batches:
        sides[f"sentence-transformers, {size} texts"] = sentence_transformers("cached", size=size)
    for tokens in args.mini_batch_tokens:
        sides[f"sentence-transformers, {tokens} tokens"] = sentence_transformers("cached", tokens=tokens)
    return setting, sides


def cached_ours(tokens: int) -> Callable:
    return lambda setting, run: run_ours(setting, run, sub_batch_tokens=tokens)


def run_set(name: str, args: argparse.Namespace, run: Run) -> list[dict]:
    bf16 = name.endswith("bf16")
    if name == "gpu":
        return gpu_set(args, run)
    if name == "parts":
        rows = []
        for precision in (False, True):
            setting, _ = small_batch(args, precision)
            setting = with_data(replace(setting, what="parts"), args, run)
            rows += rows_of(setting, step_parts(setting, run, args.repeats), hardware(setting, run.threads))
        setting = replace(setting, what="loss", batch=args.loss_batch, bf16=False)
        return rows + rows_of(setting, loss_parts(setting, run, args.loss_width), hardware(setting, run.threads))
    setting, sides = (cached_batch if name.startswith("cached") else small_batch)(args, bf16)
    setting = with_data(setting, args, run)
    return rows_of(setting, compare(setting, run, sides, args.repeats), hardware(setting, run.threads))


def with_data(setting: Setting, args: argparse.Namespace, run: Run) -> Setting:
    """The setting with its data file: exactly the groups its steps take, in order."""
    groups, negatives = setting.batch * setting.steps, max(1, setting.group - 1)
    file = run.fresh(f"data_{groups}_{negatives}") / "groups.jsonl"
    write_groups(args.data, file, groups, negatives)
    return replace(setting, data=str(file), model=setting.model or str(args.model.absolute()))


def gpu_set(args: argparse.Namespace, run: Run) -> list[dict]:
    """A model of bge-large's shape on one GPU, lengths 64 and 512, bf16."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code]).returncode:
        say("gpu: skipped, torch finds no CUDA device here")
        return []
    large = run.work / "large"
    ask_parts(run, {"what": "large", "model": str(args.model.absolute()), "output": str(large)})
    setting = Setting("bge-large", args.gpu_batch, args.group, args.gpu_steps, args.warmup, bf16=True, cuda=True)
    setting = with_data(replace(setting, model=str(large), passage_max_len=512), args, run)
    sides = {"bge_ds": run_ours, "FlagEmbedding": flagembedding}
    results = compare(setting, run, sides, args.repeats) + step_parts(setting, run, args.repeats)
    return rows_of(setting, results, hardware(setting, run.threads))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON lines of groups (query, pos, neg), may be .gz")
    add("--model", type=Path, required=True, help="folder of the encoder, mean pooling")
    add("--envs", type=Path, default=HERE.parent / ".bench", help="folder that make_environments.sh filled")
    add("--sets", nargs="+", choices=SETS, default=["fp32", "cached", "bf16", "cached_bf16", "parts"])
    add("--work", type=Path, default=HERE.parent / "runs" / "contrastive", help="folder for data, models and logs")
    add("--output", type=Path, default=HERE / "contrastive.csv", help="CSV file the rows are appended to")
    add("--warmup", type=int, default=1, help="first steps of each run that are not timed")
    add("--steps", type=int, default=3, help="steps of a run, warm-up included")
    add("--repeats", type=int, default=1, help="times that all sides of a set run in turn")
    add("--batch", type=int, default=16, help="queries a step of fp32, bf16 and parts")
    add("--group", type=int, default=8, help="passages a query")
    add("--cached_batch", type=int, default=512, help="queries a step of the cached sets")
    add("--cached_steps", type=int, default=2, help="as --steps, for the cached sets")
    add("--negatives", type=int, default=0, help="negatives a query of the cached sets")
    add("--sub_batch_tokens", type=int, default=2048, help="tokens of a piece of ours")
    add("--mini_batches", type=int, nargs="*", default=[16, 32], help="texts of a piece of sentence-transformers")
    add("--mini_batch_tokens", type=int, nargs="*", default=[], help="tokens of a piece of sentence-transformers")
    add("--loss_batch", type=int, default=512, help="queries a rank of the loss rows")
    add("--loss_width", type=int, default=384, help="features of the loss rows")
    add("--gpu_batch", type=int, default=8, help="queries a step of the gpu set")
    add("--gpu_steps", type=int, default=13, help="as --steps, for the gpu set")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--threads", type=int, default=cores, help="threads of every side (all cores)")
    args = parser.parse_args(argv)
    for name in ("steps", "cached_steps", "gpu_steps"):
        if getattr(args, name) <= args.warmup:
            parser.error(f"--{name} {getattr(args, name)} leaves no timed step after --warmup {args.warmup}; raise it")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    run = Run(args.envs.absolute(), args.work.absolute(), args.threads)
    all_rows, failed = [], False
    for name in args.sets:
        began = time.perf_counter()
        try:
            rows = run_set(name, args, run)
        except (SideFailed, ValueError) as error:
            say(f"{name}: {error}")
            failed = True
            continue
        say(f"{name}: {time.perf_counter() - began:.0f} s in all")
        append_rows(args.output, rows)  # at once: a later set that is stopped loses nothing
        all_rows += rows
    print_table(all_rows)
    return int(failed or any(row["note"] == FAILED for row in all_rows))


if __name__ == "__main__":
    sys.exit(main())
