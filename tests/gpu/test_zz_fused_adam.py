"""DeepSpeed's FusedAdam, which compiles for a minute when it is first used: the last of the folder."""

from __future__ import annotations

import shutil

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_deepspeeds_adam_is_torchs(train, cuda, command):
    """`--optim adamw_deepspeed` gives the losses of torch's AdamW, weight decay included."""
    from torch.utils.cpp_extension import CUDA_HOME

    if not CUDA_HOME or not shutil.which("nvcc", path=f"{CUDA_HOME}/bin"):
        pytest.skip("FusedAdam needs nvcc, which is not installed")
    try:
        found = train(command, optim="adamw_deepspeed", weight_decay=0.1)
    except ValueError as error:
        if "could not be built" not in str(error):
            raise
        pytest.skip(str(error))
    expected = train(command, optim="adamw_torch", weight_decay=0.1)
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-4)
