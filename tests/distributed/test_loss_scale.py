"""Steps in 16 bits are those of fp32 at every stage; fp16, on a CPU that is told to take it, with its loss scale."""

from __future__ import annotations

import json

import helpers
import pytest

SCRIPT = """
import json, sys
import deepspeed, torch
from bge_ds.deepspeed_engine import engine as engines

stage, accumulation, passes, half = json.loads(sys.argv[1])
engines.start(use_cpu=True)
type(deepspeed.get_accelerator()).is_fp16_supported = lambda self: True
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.5,
          "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
if half == "bf16":
    config["bf16"] = {"enabled": True}
elif half:
    config["fp16"] = {"enabled": True, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 1000}
# Adam's steps do not depend on the gradients' scale; with this epsilon, as large as they are, they do.
engine = engines.build(model, config, engines.parameter_groups(model, 0.5), adam={"lr": 0.05, "eps": 0.1},
                       optim="adamw_torch", schedule=None)
x = torch.linspace(-1, 1, 32).reshape(4, 8).to(engines.precision(engine))
record = []
while len(record) < 6:
    for _ in range(accumulation):
        with engines.one_reduction(engine, passes) as run_backward:
            for k in range(passes):
                loss = 1e3 * (engine(x).float() - 2.0).square().mean() / passes
                run_backward(loss)
        applied = engines.take_step(engine)
    if applied:
        record.append([float(loss.detach()) * passes, engines.gradient_norm(engine)])
print(json.dumps([record, engine.skipped_steps]))
"""


def run(*settings) -> tuple[list[list[float]], int]:
    return json.loads(helpers.run_ranks(SCRIPT, 1, json.dumps(settings)).strip().splitlines()[-1])


@pytest.mark.parametrize(("stage", "accumulation", "passes"), [(0, 1, 1), (0, 2, 1), (0, 1, 2), (1, 1, 1), (2, 2, 1)])
def test_fp16_takes_the_steps_of_fp32(stage, accumulation, passes):
    """Losses and gradient norms are fp32's, after the steps that overflow. DeepSpeed leaves the loss unscaled at stage 0, whose
    gradients, divided by the scale all the same, would be a millionth of what they are, never clipped, and change nothing."""
    found, skipped = run(stage, accumulation, passes, "fp16")
    expected, _ = run(stage, accumulation, 1, None)
    assert skipped >= 1
    assert found[-1][0] < 0.8 * found[0][0]
    for (loss, norm), (wanted, wanted_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=2e-2) and norm == pytest.approx(wanted_norm, rel=3e-2)


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_takes_the_steps_of_fp32(stage):
    """The first steps of Adam are fp32's. DeepSpeed's wrapper at stage 0 begins with a step of gradients of 0, which counts:
    the first real one would be half as long, and weights would have decayed once more."""
    found, _ = run(stage, 1, 1, "bf16")
    expected, _ = run(stage, 1, 1, None)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=2e-2)
