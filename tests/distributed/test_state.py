"""What a run has learned survives any change of ZeRO stage, number of ranks and Adam, to the last bit."""

from __future__ import annotations

import json

import helpers
import pytest
import torch

from bge_ds.checkpoint import optimizer_files
from bge_ds.deepspeed_engine.optimizer_state import Fragment

RANK_SCRIPT = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from bge_ds.distributed import collectives
from bge_ds.checkpoint import optimizer_files as files
from bge_ds.deepspeed_engine import engine as engines, optimizer_state

engines.start(use_cpu=True)

def build(kind, seed):
    torch.manual_seed(seed)
    stage, precision, optim, offload = kind.split("-")
    # Odd sizes, so that shares need padding; the last layer never gets a gradient.
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3), nn.Linear(2, 3))
    model.forward = lambda x: model[2](torch.tanh(model[1](model[0](x))))
    zero = {"stage": int(stage), "stage3_param_persistence_threshold": 8}
    if offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
              "zero_optimization": zero, "steps_per_print": 1 << 60}
    if precision != "fp32":
        config[precision] = {"enabled": True}
    groups = engines.parameter_groups(model, 0.1)
    schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    adam = {"lr": 1e-2, "betas": (0.8, 0.9)}
    return engines.build(model, config, groups, adam=adam, optim=f"adamw_{optim}", schedule=schedule)

def steps(engine, first, end):
    found = []
    for step in range(first, end):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(engines.precision(engine))
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        found.append([loss.item(), engine.get_lr()[0]])
    return found

def write(engine, folder):
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = collectives.rank(), collectives.world_size()
    content = files.entries(files.share(optimizer_state.fragments(engine), rank, world))
    size, _ = files.write(content, folder / files.file_name(rank, world))
    assert size == files.size_of(content) == (folder / files.file_name(rank, world)).stat().st_size
    if rank == 0:
        (folder / files.ENGINE).write_text(json.dumps(optimizer_state.describe(engine)))
    collectives.barrier()

base, kinds, sources = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
world, results = collectives.world_size(), {}
for number, kind in enumerate(kinds):
    if not sources:
        engine = build(kind, seed=0)
        steps(engine, 0, 3)
        write(engine, base / f"{world}-{kind}")
        results[f"{world}-{kind}"] = steps(engine, 3, 5)
    # Every kind reads every other once, which the test asserts; each number of ranks is read by each, too.
    read = [f"{1 + (k + 2 * number) % 3}-{other}" for k, other in enumerate(kinds) if 1 + (k + number) % 3 == world]
    for source in read if sources else ():
        engine = build(kind, seed=1)
        files.load(engine, base / source)
        again = f"{source}--{world}-{kind}"
        write(engine, base / again)
        masters = engines.full_parameters(engine)
        for name, parameter in engine.module.named_parameters():
            with engines._deepspeed().zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if collectives.rank() == 0:
                    assert torch.equal(parameter.detach().float(), masters[name].to(parameter.dtype).float()), (again, name)
        assert (engine.global_steps, engine.global_samples) == (3, 6 * int(source[0])), source
        results[again] = steps(engine, 3, 5)
if collectives.rank() == 0:
    (base / f"results-{world}-{len(sources)}.json").write_text(json.dumps(results))
"""
FP32 = ["0-fp32-torch-no", "1-fp32-torch_fused-no", "2-fp32-torch-no", "3-fp32-torch_fused-no", "1-fp32-deepspeed-no",
        "2-fp32-torch-cpu", "3-fp32-torch-cpu"]  # fmt: skip
BF16 = [f"{stage}-bf16-torch-no" for stage in range(4)]


def whole(folder) -> dict[str, torch.Tensor]:
    """Every parameter's values of every key, put together from the files of all ranks, and the counts."""
    files = optimizer_files.StateFiles(folder)
    shapes = json.loads((folder / optimizer_files.ENGINE).read_text())["parameters"]
    content = {}
    for name, keys in files.spans.items():
        for key in keys:
            content[f"{key}:{name}"] = torch.full(shapes[name], torch.nan).flatten()
            files.read(key, name, 0, content[f"{key}:{name}"])
    return content | {f"{key}:{name}": torch.tensor(v) for name, of in files.numbers.items() for key, v in of.items()}


@pytest.mark.parametrize(("kinds", "ranks"), [(FP32, (1, 2, 3)), (BF16, (1, 2, 3))], ids=["fp32", "bf16"])
def test_any_stage_and_number_of_ranks_reads_any_other(tmp_path, kinds, ranks):
    """Masters, moments, counts, rates and the computed weights are the written ones, and the next steps are those of the
    undisturbed run, whichever stage, Adam and number of ranks wrote and reads."""
    for number in ranks:
        helpers.run_ranks(RANK_SCRIPT, number, tmp_path, json.dumps(kinds), "[]")
    expected = {}
    for number in ranks:
        expected |= json.loads((tmp_path / f"results-{number}-0.json").read_text())
    pairs, numbers = set(), set()
    for number in ranks:
        helpers.run_ranks(RANK_SCRIPT, number, tmp_path, json.dumps(kinds), json.dumps(list(expected)))
        found = json.loads((tmp_path / f"results-{number}-{len(expected)}.json").read_text())
        pairs |= {(again.split("--")[0].split("-", 1)[1], again.split("--")[1].split("-", 1)[1]) for again in found}
        numbers |= {(again.split("--")[0][0], again.split("--")[1][0]) for again in found}
        for again, losses in found.items():
            source = again.split("--")[0]
            tolerance = 2e-2 if kinds is BF16 else 1e-5
            assert torch.allclose(torch.tensor(losses), torch.tensor(expected[source]), rtol=tolerance), again
            compare(tmp_path / source, tmp_path / again)
    assert pairs == {(a, b) for a in kinds for b in kinds}
    assert numbers == {(str(a), str(b)) for a in ranks for b in ranks}
    assert len({round(losses[-1][0], 4) for losses in expected.values()}) <= (4 if kinds is BF16 else 1)


def compare(source, again) -> None:
    wrote, read = whole(source), whole(again)
    assert {"master:0.weight", "exp_avg:0.weight", "exp_avg_sq:2.bias", "step:0.weight"} <= wrote.keys()
    for key, values in read.items():
        if key in wrote:
            assert torch.equal(values, wrote[key]), (again, key)
        else:
            # The layer without a gradient: a whole has no state for it, a flat tensor's is zero.
            assert ":3." in key and ("step" in key or not values.any()), (again, key)
    assert {key for key in wrote if key not in read} <= {key for key in wrote if ":3." in key}


def test_shares_cover_all_once():
    """Where every rank holds everything, each element is written by one rank, in parts of nearly equal size."""
    tensors = [torch.zeros(n) for n in (10, 1, 7, 0, 5)]
    found = [Fragment(str(i), 0, t.numel(), t, 0, None, replicated=True) for i, t in enumerate(tensors)]
    for world in (1, 2, 3, 50):
        shares = [optimizer_files.share(found, rank, world) for rank in range(world)]
        assert {sum(fragment.numel for fragment in share) for share in shares} <= {23 // world, -(-23 // world)}
        for fragment in (fragment for share in shares for fragment in share):
            fragment.view(fragment.master).add_(1)
        assert all((tensor == world_index).all() for tensor in tensors for world_index in [1])
        for tensor in tensors:
            tensor.zero_()
    own = [fragment._replace(replicated=False) for fragment in found]
    assert optimizer_files.share(own, 1, 3) == own
