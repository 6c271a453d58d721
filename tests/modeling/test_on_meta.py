"""A pre-training step on the meta device, as a GPU would run it: shapes without values.

There, reading a value back, a shape that depends on values, and a tensor left on the CPU are errors; on a GPU the first two
make the loop wait for all that is queued.
"""

from __future__ import annotations

from importlib.util import find_spec

import helpers
import pytest
import torch
from test_retromae import make_batch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM

from bge_ds import pretrain
from bge_ds.modeling.encoder import load_backbone
from bge_ds.modeling.retromae import RetroMAE, RetroMAESettings

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the GPU's way needs the triton package")


class NoHostData(TorchFunctionMode):
    """Refuses a tensor made on the device of numbers of the host: the copy waits for all that is queued."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func in (torch.tensor, torch.as_tensor) and torch.device((kwargs or {}).get("device") or "cpu").type == "meta"
        assert not made, f"{func.__name__} of host data waits for the device"
        return func(*args, **(kwargs or {}))


class NoBlockingCopies(TorchDispatchMode):
    """Refuses what a GPU would wait for and meta might not: looks at values, copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero"), f"{func} waits for the device"
        if name in ("_to_copy", "copy_"):
            wanted = (kwargs or {}).get("device") or args[0].device
            # A number (no dimensions) travels with the launch of the kernel that takes it.
            moved = [x for x in args if isinstance(x, torch.Tensor) and x.dim() and x.device.type != torch.device(wanted).type]
            assert not moved, f"{func} copies between devices"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["retromae", "dupmae", "mlm"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "roberta", "nomic_bert"])
def test_a_step_of_pretraining_never_waits(tmp_path, family, objective):
    """Forward and backward of every family and objective, dropout on; the step's counts come from the batch's host data."""
    path = helpers.make_model(family, tmp_path)
    backbone = load_backbone(AutoModelForMaskedLM, str(path))
    model = RetroMAE(backbone, RetroMAESettings(mask_id=4, objective=objective)).to("meta").train()
    batch = make_batch([12, 3, 7, 12, 2, 21]).to("meta", non_blocking=True)
    targets = pretrain.divisors([batch], [pretrain.count_targets([batch])])
    with NoHostData(), NoBlockingCopies():
        losses_5 = model(batch)
        pretrain.weighted(losses_5, 0.2, targets[0]).backward()
    assert losses_5.shape == (5,) and losses_5.device.type == "meta"
    assert all(p.grad is not None for p in model.decoder.parameters()) if model.decoder else True


def test_a_value_read_back_is_an_error(tmp_path):
    """The net holds: what the step is forbidden is caught."""
    with NoHostData(), pytest.raises(AssertionError, match="waits for the device"):
        torch.tensor([1.0, 2.0], device="meta")
    with NoBlockingCopies(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        torch.empty(3, device="meta").nonzero()
