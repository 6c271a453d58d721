"""A rank that takes six steps of a tiny model in fp32, bf16 or fp16 and prints their losses, gradient norms and skipped steps.

Argument: JSON of [ZeRO stage, gradient accumulation, passes a micro batch, "bf16" or "fp16" or null].
"""

import json

import deepspeed
import torch

from bge_ds.deepspeed_engine import engine as engines


def main(settings: str) -> None:
    stage, accumulation, passes, half = json.loads(settings)
    engines.start(use_cpu=True)
    type(deepspeed.get_accelerator()).is_fp16_supported = lambda self: True
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    if half == "bf16":
        config["bf16"] = {"enabled": True}
    elif half:
        config["fp16"] = {"enabled": True, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 1000}
    # Adam's steps do not depend on the gradients' scale; with this epsilon, as large as they are, they do.
    adam, groups = {"lr": 0.05, "eps": 0.1}, engines.parameter_groups(model, 0.5)
    engine = engines.build(model, config, groups, adam=adam, optim="adamw_torch", schedule=None)
    x = torch.linspace(-1, 1, 32).reshape(4, 8).to(engines.precision(engine))
    record = []
    while len(record) < 6:
        for _ in range(accumulation):
            with engines.one_reduction(engine, passes) as run_backward:
                for _ in range(passes):
                    loss = 1e3 * (engine(x).float() - 2.0).square().mean() / passes
                    run_backward(loss)
            applied = engines.take_step(engine)
        if applied:
            record.append([float(loss.detach()) * passes, engines.gradient_norm(engine)])
    print(json.dumps([record, engine.skipped_steps]))
