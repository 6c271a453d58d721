"""Steps in 16 bits are those of fp32 at every stage; fp16, on a CPU that is told to take it, with its loss scale."""

from __future__ import annotations

import json

import helpers
import pytest


def run(*settings) -> tuple[list[list[float]], int]:
    return json.loads(helpers.run_ranks("loss_scale", 1, json.dumps(settings)).strip().splitlines()[-1])


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
