"""What a run is about to do, for a person."""

from __future__ import annotations

import textwrap

from bge_ds.config.arguments import TrainArguments, changed, describe
from bge_ds.data.sampling.token_batching import TokenBatchSampler
from bge_ds.deepspeed_engine import ds_config as configs
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.training.metrics import slow_precision
from bge_ds.training.objective import Engine
from bge_ds.training.step_plan import Order, StepPlan


def summary(
    args: TrainArguments, plan: StepPlan, order: Order, engine: Engine, config: dict, facts: list[tuple[str, str]]
) -> str:
    """What the run is about to do, for a person: facts, memory, the settings that differ from the default, all settings."""
    model = engine.module
    elements, trainable = engines.count_elements(model), engines.count_elements(model, trainable=True)
    memory = configs.memory_estimate(elements, trainable, config, collectives.world_size())
    zero = config.get("zero_optimization", {}).get("stage", 0)
    batch = f"a rank x {collectives.world_size()} ranks x {args.gradient_accumulation_steps} accumulation"
    if isinstance(order, TokenBatchSampler):
        batch = f"{args.per_device_train_tokens} tokens {batch}, {len(order) / plan.epoch_steps:.1f} texts a step on average"
    else:
        batch = f"{order.global_batch} = {args.per_device_train_batch_size} {batch}"
    rows = [
        ("parameters", f"{elements / 1e6:.1f} M, {trainable / 1e6:.1f} M trained"),
        ("engine", f"ZeRO {zero}, {str(engines.precision(engine)).removeprefix('torch.')}, {engines.optimizer_name(engine)}"),
        ("batch", batch),
        ("steps", f"{plan.total} ({plan.epoch(plan.total):.2f} epochs of {len(order)} rows)"),
        *facts,
        ("memory a rank", f"{sum(memory.values()) / 2**20:,.0f} MiB and activations ("
                          + ", ".join(f"{k} {v / 2**20:,.0f}" for k, v in memory.items()) + ")"),
    ]  # fmt: skip
    if collectives.rank() == 0 and (words := slow_precision(next(model.parameters()).device, engines.precision(engine))):
        rows.insert(2, ("warning", words))
    differing = changed(args)
    lines = [f"  {name:<18}{value}".replace("\n", "\n" + " " * 20) for name, value in rows]
    lines += ["settings that differ from the default"]
    lines += [f"  {name} = {value!r} (default {default!r})" for name, value, default in differing]
    others = ", ".join(f"{name}={value!r}" for name, value in describe(args) if name not in {d[0] for d in differing})
    lines += ["other settings", textwrap.fill(others, 118, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(lines)
