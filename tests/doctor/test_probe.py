"""What a host tells of its GPUs, from a made-up driver."""

from __future__ import annotations

import types

import pytest
import torch

from bge_ds.doctor import probe
from bge_ds.kernels import triton_support


@pytest.mark.parametrize(
    ("found", "capability", "said"),
    [
        (object(), (9, 0), ""),
        (None, (9, 0), "the triton package is not installed"),
        (object(), (7, 5), "the GPU's compute capability is below 8.0"),
    ],
)
def test_a_host_tells_whether_the_kernels_run(monkeypatch, found, capability, said):
    """Where they do not, a run falls back to loops without a word: the doctor is who says it beforehand."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: types.SimpleNamespace(name="H100", total_memory=80))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda k: (79, 80))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(triton_support, "find_spec", lambda name: found)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    told = probe.devices(use_cpu=False)
    assert (told["kind"], told["names"], told["free"], told["no_kernels"]) == ("cuda", ["H100"], [79], said)
