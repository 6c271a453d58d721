"""Dropout of our own: the share asked for, unbiased, decided by torch's seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bge_ds.kernels.cpu.dropout import Dropout, use_fast_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_and_the_scale(p):
    """A share p is 0 within 4 standard errors, whatever its neighbours are, and the rest is scaled by 1 / (1 - p)."""
    torch.manual_seed(0)
    x = torch.ones(1_000_003)  # no multiple of the four masks in a random word
    y = Dropout(p)(x)
    gone = y == 0
    error = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(gone.double().mean().item() - p) < 4 * error
    for lag in (1, 2, 3, 4):
        assert abs((gone[lag:] & gone[:-lag]).double().mean().item() - p * p) < 4 * error
    assert torch.allclose(y[~gone], torch.tensor(1 / (1 - p)), rtol=1e-4)


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(1000, requires_grad=True)
    y = Dropout(0.3)(x)
    y.sum().backward()
    assert torch.allclose(x.grad, y.detach() / x.detach())


def test_the_seed_decides():
    """torch.manual_seed repeats every mask; without that, a piece computed twice (GradCache) would differ from itself."""
    x = torch.ones(100)
    torch.manual_seed(1)
    first, second = Dropout(0.5)(x), Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x), first) and not torch.equal(first, second)


def test_evaluation_changes_nothing():
    x = torch.randn(10)
    assert Dropout(0.5).eval()(x) is x


def test_swapping_keeps_names_and_settings():
    """Only nn.Dropout itself is replaced, in place."""
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.25)), "b": nn.Dropout1d(0.5)})
    names = [name for name, _ in model.named_modules()]
    use_fast_dropout(model)
    assert [name for name, _ in model.named_modules()] == names
    assert type(model["a"][1]) is Dropout and model["a"][1].p == 0.25 and type(model["b"]) is nn.Dropout1d
