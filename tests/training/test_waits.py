"""How often a whole step, engine and optimizer with it, makes the host wait for the device: each time, the GPU runs dry.

Two ranks run both commands on the CPU, and there take a GPU's way with the kernels in Triton's interpreter. Every operation
that hands a value of a tensor to the host, or whose result has a size that depends on values, is counted with the place that
called it. (Dropout is off: it takes its seeds from the host's own generator, which here looks the same. `test_on_meta` has it.)
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import helpers
import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the GPU's way needs the triton package")

STEPS = 4
# Each with its reason.
ALLOWED = {
    # Whether the step counts: the norm of the gradient, at the end of the backward pass.
    "_local_scalar_dense at utils.py:is_invalid_grad_norm",  # DeepSpeed's own look at it, ZeRO 3
    "cpu at corrections.py:scaled_global_norm",  # ours, ZeRO 1 and 2
    "_local_scalar_dense at corrections.py:step",  # ours, ZeRO 0
}
# The numbers of the step to come, sent before this one's work: they have arrived, in the host's own memory.
AHEAD = "tolist at collectives.py:result"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(command, ZeRO stage) -> the waits of rank 0 in the last two steps, each behind a mark."""
    base = helpers.make_training_folder(tmp_path_factory.mktemp("waits"))
    helpers.make_model("bert", base / "model", num_hidden_layers=1, num_attention_heads=1)
    common = {
        "model_name_or_path": str(base / "model"), "cache_dir": str(base / "cache"), "learning_rate": 1e-3, "max_steps": STEPS,
        "logging_steps": STEPS, "per_device_train_batch_size": 2, "save_strategy": "no", "dataloader_num_workers": 1,
    }  # fmt: skip
    own = helpers.command_flags(base)
    runs = [
        (command, common | own[command] | {"deepspeed": f"zero{stage}", "output_dir": str(base / f"{command}{stage}")})
        for command in own
        for stage in range(4)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        helpers.run_ranks("recorded_waits", 2, json.dumps(runs), STEPS, fresh=True)
    return {(c, s): json.loads((base / f"{c}{s}.0.json").read_text()) for c in own for s in range(4)}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_a_step_waits_once_at_its_end(found, command, stage):
    """A step reads one value, which says whether it counts; a second wait would leave the GPU idle amid a step."""
    steps = [[]]
    for one in found[command, stage]:
        if one == "step":
            steps.append([])
        elif one != AHEAD:
            steps[-1].append(one)
    assert len(steps) == STEPS - 1 and not steps[0]
    for waits in steps[1:]:
        assert len(waits) == 1 and set(waits) <= ALLOWED, waits
