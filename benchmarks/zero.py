"""What ZeRO's stages cost in practice, beside what the formulas say; and, on paper, what a large cluster would pay.

    python benchmarks/zero.py                      # a BERT of bge-base's shape, every config on 1, 2 and 4 ranks
    python benchmarks/zero.py --layers 2 --width 128 --ranks 1 2 --configs zero0 zero3 --output small.csv
    python benchmarks/zero.py --paper              # the table of 64 hosts; runs nothing

Each row is one run of `own_zero.py` on so many ranks of this machine. Memory is the most that rank 0 owned in the steps above
what it had before the model was built; on a CPU, activations and what the allocator keeps included. Bytes are those handed to
collectives, times what an algorithm that sends nothing twice moves of them (`distributed/timing.py`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from comparing import say
from rows import append_rows, hardware, print_table
from sides import HERE, Setting

from bge_ds.deepspeed_engine import ds_config as configs

CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
COLUMNS = (
    "date", "hardware", "versions", "config", "precision", "ranks", "parameters_M", "batch", "group", "length",
    "seconds_per_step", "lowest", "highest", "communication_share", "peak_MiB", "held_MiB", "estimated_MiB",
    "gradients_MB", "gradients_MB_formula", "gathered_MB", "gathered_MB_formula", "calls_a_step", "note",
)  # fmt: skip
# (name, elements, features) of the models on paper.
MODELS = (("bge-large", 335e6, 1024), ("7B", 7e9, 4096))


def run_ranks(asked: dict, ranks: int, threads: int) -> dict:
    """What rank 0 of own_zero.py prints; raises RuntimeError with the end of a failing rank's messages."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    processes = []
    for rank in range(ranks):
        own = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": threads, "PYTHONPATH": HERE.parent, "HF_HUB_OFFLINE": 1,
        }  # fmt: skip
        command = [sys.executable, str(HERE / "own_zero.py"), json.dumps(asked)]
        env = {**os.environ, **{name: str(value) for name, value in own.items()}}
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{asked['config']} on {ranks} ranks failed:\n{errors[-1500:]}")
    return json.loads(outputs[0][0].strip().splitlines()[-1])


def row_of(asked: dict, ranks: int, where: str, found: dict) -> dict:
    moved, formula, seconds = found["moved"], found["formula"], found["seconds"]
    reduced = sum(moved.get(kind, 0) for kind in ("all_reduce", "reduce", "reduce_scatter", "all_to_all"))
    mib = 2**20
    return {
        "date": datetime.date.today().isoformat(), "hardware": where, "config": asked["config"], "ranks": ranks,
        "versions": " ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers")),
        "precision": "bf16" if asked["bf16"] else "fp32", "parameters_M": f"{found['elements'] / 1e6:.1f}",
        **{name: asked[name] for name in ("batch", "group", "length")},
        "seconds_per_step": f"{found['typical']:.3g}", "lowest": f"{min(seconds):.3g}", "highest": f"{max(seconds):.3g}",
        "communication_share": f"{found['share']:.2f}", "peak_MiB": round(found["peak_bytes"] / mib),
        "held_MiB": round(found["held_bytes"] / mib), "estimated_MiB": round(sum(found["estimated"].values()) / mib),
        "gradients_MB": f"{reduced / 1e6:.1f}",
        "gradients_MB_formula": f"{(formula['gradients'] + formula['gradients of vectors']) / 1e6:.1f}",
        "gathered_MB": f"{moved.get('all_gather', 0) / 1e6:.1f}",
        "gathered_MB_formula": f"{(formula['weights'] + formula['vectors']) / 1e6:.1f}",
        "calls_a_step": round(sum(found["calls"].values())), "note": "",
    }  # fmt: skip


def paper(hosts: int, gpus: int, batch: int, group: int) -> list[dict]:
    """A row a model and ZeRO stage: bytes that a rank moves in a step, its memory, the size of a checkpoint; in bf16."""
    rows, world = [], hosts * gpus
    for name, elements, features in MODELS:
        for stage in range(4):
            config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
            moved = configs.traffic_estimate(elements, elements, config, world, features=features, passages=batch * group)
            memory = configs.memory_estimate(elements, elements, config, world)
            # Masters and both moments in fp32, shared out over the ranks at every stage; the model in fp32, by rank 0.
            shared, model = 12 * elements, 4 * elements
            rows.append({
                "model": name, "stage": stage, "gather_MB": f"{moved['vectors'] / 1e6:.0f}",
                "its_gradient_MB": f"{moved['gradients of vectors'] / 1e6:.0f}",
                "gradients_GB": f"{moved['gradients'] / 1e9:.2f}", "weights_GB": f"{moved['weights'] / 1e9:.2f}",
                "step_GB": f"{sum(moved.values()) / 1e9:.2f}", "memory_GB": f"{sum(memory.values()) / 1e9:.1f}",
                "vectors_held_MB": f"{world * batch * group * features * 4 / 1e6:.0f}",
                "checkpoint_GB": f"{(shared + model) / 1e9:.1f}", "of_it_a_rank_GB": f"{shared / world / 1e9:.3f}",
                "of_it_rank_0_GB": f"{(shared / world + model) / 1e9:.1f}",
            })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--configs", nargs="+", default=list(CONFIGS), help="names or files of DeepSpeed configs")
    add("--ranks", nargs="+", type=int, default=[1, 2, 4])
    add("--layers", type=int, default=12)
    add("--width", type=int, default=768, help="features; heads have 64, the inner layer four times as many")
    add("--vocabulary", type=int, default=30522)
    add("--batch", type=int, default=2, help="queries a rank")
    add("--group", type=int, default=4, help="passages a query")
    add("--length", type=int, default=64, help="tokens of every text")
    add("--warmup", type=int, default=2)
    add("--steps", type=int, default=5, help="steps that are timed, after the warm-up")
    add("--bf16", action="store_true")
    add("--cuda", action="store_true", help="a GPU a rank, in place of the CPU")
    add("--threads", type=int, default=1, help="threads of a rank")
    add("--output", type=Path, default=HERE / "zero.csv", help="CSV file the rows are appended to")
    add("--paper", action="store_true", help="print the table of a large cluster from the formulas, and run nothing")
    add("--hosts", type=int, default=64, help="for --paper")
    add("--gpus", type=int, default=8, help="of a host, for --paper")
    args = parser.parse_args(argv)
    if args.paper:
        rows = paper(args.hosts, args.gpus, batch=64, group=8)
        print(f"{args.hosts} hosts x {args.gpus} GPUs, bf16, 64 queries a GPU with 8 passages each; a step and a rank")
        print_table(rows, ("", "", "", *rows[0]))
        return 0
    if args.width % 64:
        parser.error(f"--width {args.width} is not a multiple of 64, the features of a head")
    shape = dict(
        vocab_size=args.vocabulary, hidden_size=args.width, num_hidden_layers=args.layers, intermediate_size=4 * args.width,
        num_attention_heads=args.width // 64, max_position_embeddings=512,
    )  # fmt: skip
    cuda = Setting("zero", args.batch, args.steps, args.warmup, cuda=args.cuda)
    common = {name: getattr(args, name) for name in ("batch", "group", "length", "warmup", "steps", "bf16", "cuda")}
    where, rows, failed = hardware(cuda, len(os.sched_getaffinity(0))), [], False
    for ranks in args.ranks:
        for name in args.configs:
            say(f"{name} on {ranks} ranks")
            asked = {**common, "config": name, "shape": shape}
            try:
                row = row_of(asked, ranks, where, run_ranks(asked, ranks, args.threads))
            except RuntimeError as error:
                say(str(error))
                failed = True
                continue
            append_rows(args.output, [row], COLUMNS)
            rows.append(row)
    print_table(rows, COLUMNS)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
