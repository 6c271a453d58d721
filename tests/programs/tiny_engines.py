"""Ranks that check what a DeepSpeed engine does with a tiny layer. Arguments: the check, its own arguments."""

import deepspeed
import torch
from torch import nn

from bge_ds.deepspeed_engine import engine as engines


def build(model: nn.Module, stage: int, *, bf16=True, clip=0.0, learning_rate=1e-4, optim="adamw_torch", weight_decay=None):
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": clip,
              "bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage},
              "zero_allow_untested_optimizer": True}  # fmt: skip
    groups = [{"params": list(model.parameters())} | ({} if weight_decay is None else {"weight_decay": weight_decay})]
    return engines.build(model, config, groups, adam={"lr": learning_rate}, optim=optim, schedule=None)


def sum_of_gradients(stage: str) -> None:
    """Print the mean of a gradient that is the sum of 1 and of 256 times 1/512."""
    engine = build(nn.Linear(8, 8, bias=False), int(stage), learning_rate=0.0)
    x = torch.eye(8, dtype=torch.bfloat16)
    with engines.one_reduction(engine, 257) as run_backward:
        for k in range(257):
            run_backward((engine(x) * (1.0 if k == 0 else 2.0**-9)).float().sum())
    full = deepspeed.utils.safe_get_full_grad(engine.module.weight)
    if full is None:
        full = engine.module.weight.grad
    print("sum", full.float().mean().item())


def masters(stage: str) -> None:
    """Print the share of the saved weights that bf16 holds exactly."""
    engine = build(nn.Linear(16, 16), int(stage), optim="adamw_torch_fused")
    for _ in range(3):
        engine.backward(engine(torch.randn(2, 16).bfloat16()).float().square().sum())
        engine.step()
    weight = engines.full_parameters(engine)["weight"]
    print("exact in bf16:", (weight == weight.bfloat16().float()).float().mean().item())
    assert torch.equal(weight.bfloat16(), engine.module.weight.detach()) or stage == "3"


def buffers() -> None:
    for stage in range(4):
        model = nn.Linear(16, 16)
        model.register_buffer("frequencies", torch.full((3,), 1 / 3), persistent=False)
        model.register_buffer("count", torch.arange(3), persistent=False)
        engine = build(model, stage)
        assert engines.precision(engine) == torch.bfloat16
        assert torch.equal(engine.module.frequencies, torch.full((3,), 1 / 3)), stage
        assert torch.equal(engine.module.count, torch.arange(3))


def adams() -> None:
    """Print the name of each Adam; their weights after three steps are the same."""
    weights = []
    for optim in ("adamw_torch", "adamw_torch_fused", "adamw_deepspeed"):
        torch.manual_seed(0)
        model = nn.Linear(16, 16)
        engine = build(model, 0, bf16=False, clip=1.0, learning_rate=1e-2, optim=optim, weight_decay=0.1)
        print(engines.optimizer_name(engine))
        for _ in range(3):
            engine.backward(engine(torch.randn(4, 16)).square().sum())
            engine.step()
        weights.append(model.weight.detach().clone())
    assert (weights[0] - weights[1]).abs().max() < 1e-6 and (weights[0] - weights[2]).abs().max() < 1e-6


def main(check: str, *args: str) -> None:
    engines.start(use_cpu=True)
    {"sum_of_gradients": sum_of_gradients, "masters": masters, "buffers": buffers, "adams": adams}[check](*args)
