"""Ranks of which the second sleeps in each step; what the first finds of the pace is printed. Argument: ZeRO stage."""

import json
import time

import torch

from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives, communication_profile


def main(stage: str) -> None:
    device = engines.start(use_cpu=True)
    model = torch.nn.Linear(8, 8)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
              "zero_optimization": {"stage": int(stage)}}  # fmt: skip
    groups = engines.parameter_groups(model, 0.0)
    engine = engines.build(model, config, groups, adam={"lr": 1e-3}, optim="adamw_torch", schedule=None)
    said = []
    pace = communication_profile.Pace(device, said.append)
    for _ in range(3):
        pace.begin()
        if collectives.rank() == 1:
            time.sleep(1.0)
        engine.backward(engine(torch.ones(2, 8)).sum())
        engines.take_step(engine)
        pace.end(10 * (1 + collectives.rank()))
        time.sleep(0.5)  # no step is under way
        collectives.barrier()
    found = pace.read()
    if collectives.rank() == 0:
        print(json.dumps([found, said]))
