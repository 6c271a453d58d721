"""Ranks that write what a few steps have learned, or read what other ranks and ZeRO stages wrote, and step on.

Arguments: folder, JSON of kinds ("STAGE-PRECISION-ADAM-OFFLOAD"), JSON of what was written: none to write.
"""

import json
from pathlib import Path

import deepspeed
import torch
from torch import nn

from bge_ds.checkpoint import optimizer_files
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.deepspeed_engine import optimizer_state
from bge_ds.distributed import collectives


def build(kind: str, seed: int):
    torch.manual_seed(seed)
    stage, precision, optim, offload = kind.split("-")
    # Odd sizes, so that shares need padding; the last layer never gets a gradient.
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3), nn.Linear(2, 3))
    model.forward = lambda x: model[2](torch.tanh(model[1](model[0](x))))
    zero = {"stage": int(stage), "stage3_param_persistence_threshold": 8}
    if offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
              "zero_optimization": zero, "steps_per_print": 1 << 60}  # fmt: skip
    if precision != "fp32":
        config[precision] = {"enabled": True}
    groups = engines.parameter_groups(model, 0.1)
    adam = {"lr": 1e-2, "betas": (0.8, 0.9)}
    return engines.build(model, config, groups, adam=adam, optim=f"adamw_{optim}", schedule=schedule)


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def steps(engine, first: int, end: int) -> list[list[float]]:
    found = []
    for step in range(first, end):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(engines.precision(engine))
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        found.append([loss.item(), engine.get_lr()[0]])
    return found


def write(engine, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = collectives.rank(), collectives.world_size()
    content = optimizer_files.entries(optimizer_files.share(optimizer_state.fragments(engine), rank, world))
    file = folder / optimizer_files.file_name(rank, world)
    size, _ = optimizer_files.write(content, file)
    assert size == optimizer_files.size_of(content) == file.stat().st_size
    if rank == 0:
        (folder / optimizer_files.ENGINE).write_text(json.dumps(optimizer_state.describe(engine)))
    collectives.barrier()


def read(kind: str, folder: Path, source: str, again: str) -> list[list[float]]:
    """Losses and rates of the steps after what `source` holds, which is written once more as `again`."""
    engine = build(kind, seed=1)
    optimizer_files.load(engine, folder / source)
    write(engine, folder / again)
    masters = engines.full_parameters(engine)
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if collectives.rank() == 0:
                assert torch.equal(parameter.detach().float(), masters[name].to(parameter.dtype).float()), (again, name)
    assert (engine.global_steps, engine.global_samples) == (3, 6 * int(source[0])), source
    return steps(engine, 3, 5)


def main(folder: str, given: str, written: str) -> None:
    engines.start(use_cpu=True)
    base, kinds, sources = Path(folder), json.loads(given), json.loads(written)
    world, results = collectives.world_size(), {}
    for number, kind in enumerate(kinds):
        if not sources:
            engine = build(kind, seed=0)
            steps(engine, 0, 3)
            write(engine, base / f"{world}-{kind}")
            results[f"{world}-{kind}"] = steps(engine, 3, 5)
            continue
        # Every kind reads every other once, which the test asserts; each number of ranks is read by each, too.
        own = [f"{1 + (k + 2 * number) % 3}-{other}" for k, other in enumerate(kinds) if 1 + (k + number) % 3 == world]
        for source in own:
            again = f"{source}--{world}-{kind}"
            results[again] = read(kind, base, source, again)
    if collectives.rank() == 0:
        (base / f"results-{world}-{len(sources)}.json").write_text(json.dumps(results))
