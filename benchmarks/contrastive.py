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
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from comparing import add_shared_flags, compare, has_gpu, parse_steps, run_sets, same_tokens, say
from rows import COLUMNS, hardware, rows_of
from sides import (
    Result,
    Run,
    Setting,
    ask_parts,
    flagembedding,
    run_ours,
    sentence_transformers,
    shards_of,
    write_groups,
)

SETS = ("fp32", "bf16", "cached", "cached_bf16", "parts", "gpu")


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
    setting = Setting("fine-tuning", args.batch, args.steps, args.warmup, group=args.group, bf16=bf16)
    sides = {"bge_ds": run_ours, "FlagEmbedding": flagembedding, "sentence-transformers": sentence_transformers("plain")}
    return setting, sides


def cached_batch(args: argparse.Namespace, bf16: bool) -> tuple[Setting, dict[str, Callable]]:
    """Ours in pieces of tokens; theirs in pieces of texts, of each size asked for, and where asked in pieces of tokens."""
    setting = Setting("cached", args.cached_batch, args.cached_steps, args.warmup, bf16=bf16, group=1 + args.negatives)
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
    if not has_gpu():
        return []
    large = run.work / "large"
    ask_parts(run, {"what": "model", "shape": "large", "model": str(args.model.absolute()), "output": str(large)})
    setting = Setting("bge-large", args.gpu_batch, args.gpu_steps, args.warmup, group=args.group, bf16=True, cuda=True)
    setting = with_data(replace(setting, model=str(large), passage_max_len=512), args, run)
    sides = {"bge_ds": run_ours, "FlagEmbedding": flagembedding}
    results = compare(setting, run, sides, args.repeats) + step_parts(setting, run, args.repeats)
    return rows_of(setting, results, hardware(setting, run.threads))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_shared_flags(parser, "contrastive")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON lines of groups (query, pos, neg), may be .gz")
    add("--sets", nargs="+", choices=SETS, default=["fp32", "cached", "bf16", "cached_bf16", "parts"])
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
    return parse_steps(parser, argv, ("steps", "cached_steps", "gpu_steps"))


def main(argv: list[str] | None = None) -> int:
    return run_sets(parse(argv), run_set, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
