"""Ranks that write the gradients of one step of a reranker's training, for each case.

Arguments: model, lines of groups, folder to write into, ZeRO stage, JSON of {case: flags}.
"""

import json

import numpy as np
import torch

from bge_ds.config.arguments import RerankArguments
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.objectives.reranking import RerankingObjective
from bge_ds.training import data_order, setup
from bge_ds.training.step_plan import StepPlan
from programs.gradients import gradients


def gradients_of(flags: dict, groups: int) -> dict[str, np.ndarray]:
    rank, world, accumulation = collectives.rank(), collectives.world_size(), flags.get("gradient_accumulation_steps", 1)
    args = RerankArguments.build(
        output_dir="unused", max_grad_norm=0.0, max_steps=2, use_cpu=True, dataloader_num_workers=0,
        per_device_train_batch_size=groups // world // accumulation, **flags,
    )  # fmt: skip
    objective = RerankingObjective(args)
    torch.manual_seed(0)
    model = objective.build_model(torch.device("cpu"))
    order = data_order.make_order(objective.args, objective.data)
    engine = setup.build_engine(objective.args, model, StepPlan.make(objective.args, order))[0]
    objective.check()
    make, options = objective.collate(order.seed)
    parts = [make(objective.data, *rows, **options) for rows in order.micro_batches(0, accumulation, rank, world)]
    ((_, counts),) = collectives.exchange_ahead([parts], objective.counts_to_exchange, engine.device)
    for micro, (batch, share) in enumerate(zip(parts, objective.shares(parts, counts), strict=True)):
        objective.backward(engine, batch, share, lambda piece: None)
        if micro < accumulation - 1:
            engine.step()
    return gradients(engine)


def main(model: str, lines: str, out: str, stage: str, cases: str) -> None:
    engines.start(use_cpu=True)
    common = {"model_name_or_path": model, "train_data": lines, "cache_dir": f"{out}/cache", "deepspeed": "zero" + stage}
    with open(lines) as file:
        groups = sum(1 for _ in file)
    for case, flags in json.loads(cases).items():
        found = gradients_of({**common, **flags}, groups)
        if collectives.rank() == 0:
            np.savez(f"{out}/{case}.npz", **found)
