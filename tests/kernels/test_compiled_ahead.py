"""The kernels as compiled for GPUs: no register may spill, and shared memory must suffice."""

from __future__ import annotations

import os
from importlib.util import find_spec

import ahead
import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or ahead.ptxas(80) is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs the triton package, with its assembler, and not its interpreter",
)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {"words_ptr": "i64", "key_ptr": "i64", "starts_ptr": "i32", "query_starts_ptr": "i32", "lse_ptr": "fp32",
            "delta_ptr": "fp32"}  # fmt: skip


def cost(name: str, head_dim: int, dtype: torch.dtype, capability: int, visibility) -> ahead.Cost:
    from bge_ds.kernels import attention_triton as module

    kernel = {"forward": module._forward, "queries": module._backward_queries, "keys": module._backward_keys}[name]
    constants = module.constants(12, 12, head_dim, dtype, visibility, 0.1) | module.blocks(name, head_dim, dtype)
    pointers = POINTERS | {"*": TYPES[dtype]}
    return ahead.compile_ahead(kernel, pointers, constants, capability, {"scale": "fp32", "scale_log2": "fp32"})


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_no_register_spills(head_dim, capability, tmp_path, monkeypatch):
    """The decoder's rule, the heaviest, with dropout: a spill in the inner loop costs more than any tile gains."""
    from bge_ds.kernels.attention_triton import Visibility

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if capability == 90 else (torch.bfloat16, torch.float32):
        for name in ("forward", "queries", "keys"):
            found = cost(name, head_dim, dtype, capability, Visibility(decoder_share=0.5))
            assert found.spilled == 0 and found.registers <= 255, (name, dtype, found)
            assert found.shared <= (99 << 10 if capability < 100 else 112 << 10), (name, dtype, found)


@pytest.mark.parametrize("window", [None, 64])
def test_whole_texts_spill_nothing_either(window, tmp_path, monkeypatch):
    """fp32 attention of a backbone, causal or in a window, on the GPU that most have."""
    from bge_ds.kernels.attention_triton import Visibility

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("forward", "queries", "keys"):
        assert cost(name, 64, torch.float32, 90, Visibility(causal=window is None, window=window)).spilled == 0


def kernels_over_rows(dtype: torch.dtype) -> dict[str, tuple]:
    """The kernels that pass over rows: what each is, the types of its pointers (`*` for others), its constants."""
    from bge_ds.kernels import cross_entropy_triton, logsumexp_triton, max_logits_triton, segment_mean_triton

    vocabulary = {
        "BIAS": True,
        "SUMS": True,
        "BLOCK": cross_entropy_triton._COLUMNS,
        "ROWS": cross_entropy_triton._ROWS,
        "STAGES": cross_entropy_triton._STAGES,
    }
    contrast = {"LIMIT": True, "ROWS": logsumexp_triton._ROWS, "COLUMNS": logsumexp_triton._COLUMNS}
    own, keys = {"*": TYPES[dtype]}, {f"{name}_ptr": "i64" for name in ("first", "count", "row_keys", "column_keys", "over")}
    sums = {"target_ptr": "i64", "lse_ptr": "fp32", "loss_ptr": "fp32", "right_ptr": "i32", "sums_ptr": "fp32"}
    maxima = {"starts_ptr": "i32", "best_ptr": "fp32", "grad_ptr": "fp32", "from_ptr": "i32"}
    words = {"COLUMNS": max_logits_triton._COLUMNS, "STAGES": max_logits_triton._STAGES, "num_warps": 4}
    return {
        "maxima": (max_logits_triton._maxima, own | maxima, words),
        "their gradient": (max_logits_triton._gradient, own | maxima, words),
        "cross entropy": (cross_entropy_triton._statistics, own | sums, vocabulary | {"num_warps": 8}),
        "its gradient": (cross_entropy_triton._gradient, own | sums, vocabulary | {"num_warps": 8}),
        "log-sum-exp": (logsumexp_triton._statistics, {"*": "fp32"} | keys, contrast | {"num_warps": 8}),
        "means": (
            segment_mean_triton._means, own | {"starts_ptr": "i32", "out_ptr": "fp32"},
            {"ROWS": segment_mean_triton._ROWS, "FEATURES": segment_mean_triton._FEATURES, "num_warps": 4},
        ),
        "its weights": (
            logsumexp_triton._weights, {"*": "fp32", "weights_ptr": TYPES[dtype]} | keys, contrast | {"num_warps": 8},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
def test_logits_come_ahead(capability, dtype, tmp_path, monkeypatch):
    """What comes next is on its way to shared memory while a kernel works: the compiler does so for aligned rows only."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("maxima", "cross entropy", "its gradient"):
        kernel, pointers, constants = kernels_over_rows(dtype)[name]
        columns = constants.get("COLUMNS") or constants["BLOCK"]
        found = ahead.compile_ahead(kernel, pointers, constants, capability)
        assert found.shared >= (constants["STAGES"] - 1) * columns * dtype.itemsize, (name, found)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
def test_passes_over_rows_spill_nothing(capability, dtype, tmp_path, monkeypatch):
    """They are bound by memory: a spill is more of it, and two programs must fit a processor (128 registers at 8 warps)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, (kernel, pointers, constants) in kernels_over_rows(dtype).items():
        found = ahead.compile_ahead(kernel, pointers, constants, capability)
        assert found.spilled == 0 and found.registers <= 128 and found.shared <= 48 << 10, (name, found)
