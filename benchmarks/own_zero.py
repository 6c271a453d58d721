"""One rank of a fine-tuning run on random texts: `python benchmarks/own_zero.py JSON`; rank 0 prints one line of JSON.

The engine, the forward pass, the gather and the loss are those of `bge_ds.finetune`; the model has random weights, so that
nothing is read. Memory on a CPU is the resident memory of the process minus what it had before the model.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, BertConfig

from bge_ds.config.arguments import FinetuneArguments
from bge_ds.data import collate
from bge_ds.data.sampling.sampler import EpochSampler
from bge_ds.deepspeed_engine import ds_config as configs
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives, communication_profile
from bge_ds.kernels import packed
from bge_ds.modeling.encoder import Encoder
from bge_ds.objectives import contrastive
from bge_ds.training import setup
from bge_ds.training.step_plan import StepPlan


def random_batch(asked: dict, vocabulary: int, rank: int) -> collate.ContrastiveBatch:
    """B queries, each with a group of G passages of its own, all texts of one length."""
    rng = np.random.default_rng(rank)
    queries, group = asked["batch"], asked["group"]
    passages = queries * group
    texts, _ = packed.pack([rng.integers(5, vocabulary, asked["length"]) for _ in range(queries + passages)])
    own_BG = torch.arange(passages).view(queries, group)
    hashes_P = torch.arange(passages) + rank * passages
    return collate.ContrastiveBatch(
        texts=texts, queries=queries, own_BG=own_BG, hashes_P=hashes_P, known_BK=hashes_P[own_BG[:, :1]],
        own_only_B=torch.zeros(queries, dtype=torch.bool), rows_B=torch.arange(queries),
    )  # fmt: skip


def resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def most_resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the kernel's way to start the high-water mark anew


def measure(asked: dict) -> dict:
    """Seconds of each timed step, memory, bytes moved and calls a step by kind of collective; what the formulas say."""
    device = engines.start(use_cpu=not asked["cuda"])
    rank, world = collectives.rank(), collectives.world_size()
    args = FinetuneArguments.build(
        output_dir="unused", train_data="unused", model_name_or_path="unused", deepspeed=asked["config"],
        per_device_train_batch_size=asked["batch"], train_group_size=asked["group"], max_steps=1000, learning_rate=1e-5,
        negatives_cross_device=True, use_cpu=not asked["cuda"], bf16=asked["bf16"], disable_tqdm=True,
    )  # fmt: skip
    shape = BertConfig(**asked["shape"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    before = resident(device)
    model = Encoder(AutoModel.from_config(shape, add_pooling_layer=False), "cls", normalize=True)
    rows = 1000 * asked["batch"] * world
    plan = StepPlan.make(args, EpochSampler(seed=0, spans=((0, rows),), global_batch=asked["batch"] * world))
    engine, config = setup.build_engine(args, model, plan)
    elements = engines.count_elements(model)
    held = resident(device) - before
    forget_peak(device)  # of building: the steps' is what a run lives with
    batch = random_batch(asked, shape.vocab_size, rank).to(device)
    objective, pace, seconds = contrastive.objective_of(args), communication_profile.Pace(device), []
    engine.train()
    for step in range(asked["warmup"] + asked["steps"]):
        if step == asked["warmup"]:
            pace.clear()
        collectives.barrier()
        began = time.perf_counter()
        pace.begin()
        contrastive.backward(engine, batch, args, objective, lambda piece: None)
        engines.take_step(engine)
        if device.type == "cuda":
            torch.cuda.synchronize()
        pace.end(batch.texts.tokens)
        seconds.append(time.perf_counter() - began)
    moved, calls = pace.traffic()
    gathered = dict(features=shape.hidden_size, passages=asked["batch"] * asked["group"])
    return {
        "seconds": seconds[asked["warmup"] :],
        "typical": statistics.median(seconds[asked["warmup"] :]),
        "share": pace.read()["communication_share"],
        "elements": elements,
        "held_bytes": held,
        "peak_bytes": most_resident(device) - before,
        "estimated": configs.memory_estimate(elements, elements, config, world),
        "moved": moved,
        "calls": calls,
        "formula": configs.traffic_estimate(elements, elements, config, world, **gathered),
        "tokens": batch.texts.tokens,
    }


def main() -> None:
    found = measure(json.loads(sys.argv[1]))
    if collectives.rank() == 0:
        print(json.dumps(found))
    collectives.leave()


if __name__ == "__main__":
    main()
