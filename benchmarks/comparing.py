"""What the drivers share: all sides in turn on the same texts, sets one after the other, the flags of every driver."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rows import append_rows, print_table
from sides import HERE, Result, Run, Shared, SideFailed

FAILED = "failed"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compare(setting: Shared, run: Run, sides: dict[str, Callable], repeats: int) -> list[Result]:
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


def has_gpu() -> bool:
    """Asked in a process of its own: this one stays small."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code]).returncode:
        say("gpu: skipped, torch finds no CUDA device here")
        return False
    return True


def add_shared_flags(parser: argparse.ArgumentParser, name: str, stepped: bool = True) -> None:
    """stepped: its sides are runs of training steps."""
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the encoder")
    add("--envs", type=Path, default=HERE.parent / ".bench", help="folder that make_environments.sh filled")
    add("--work", type=Path, default=HERE.parent / "runs" / name, help="folder for data, models and logs")
    add("--output", type=Path, default=HERE / f"{name}.csv", help="CSV file the rows are appended to")
    if stepped:
        add("--warmup", type=int, default=1, help="first steps of each run that are not timed")
        add("--steps", type=int, default=3, help="steps of a run, warm-up included")
    add("--repeats", type=int, default=1, help="times that all sides of a set run in turn")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--threads", type=int, default=cores, help="threads of every side (all cores)")


def parse_steps(parser: argparse.ArgumentParser, argv: list[str] | None, names: tuple[str, ...]) -> argparse.Namespace:
    """The arguments; each of `names`, numbers of steps, must leave one to time."""
    args = parser.parse_args(argv)
    for name in names:
        if getattr(args, name) <= args.warmup:
            parser.error(f"--{name} {getattr(args, name)} leaves no timed step after --warmup {args.warmup}; raise it")
    return args


def run_sets(args: argparse.Namespace, run_set: Callable, columns: tuple[str, ...]) -> int:
    """Every set in turn, its rows appended to the file; the exit status."""
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
        append_rows(args.output, rows, columns)  # at once: a later set that is stopped loses nothing
        all_rows += rows
    print_table(all_rows, columns)
    return int(failed or any(row["note"] == FAILED for row in all_rows))
