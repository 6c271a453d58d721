"""The mean of each text's rows against a loop over texts; the GPU's kernel in Triton's interpreter, on meta, and compiled."""

from __future__ import annotations

from importlib.util import find_spec

import ahead
import interpreter
import pytest
import torch

from bge_ds.data.batches import Run
from bge_ds.kernels.segment_mean import segment_mean

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")
RUNS = [Run(2, 1), Run(3, 5), Run(1, 33), Run(1, 70)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("width", [3, 130])
def test_equals_the_loop(width, dtype, tolerance):
    """Means and gradients: texts of one token and of more rows and features than a program takes at a time."""
    if interpreter.INTERPRETED and dtype == torch.float64:
        pytest.skip("the kernel adds in fp32")
    lengths = [length for n, length in RUNS for _ in range(n)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    torch.manual_seed(0)
    x = torch.randn(sum(lengths), width, dtype=torch.float64).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = torch.stack([text.sum(0) / len(text) for text in exact.split(lengths)])
    out = segment_mean(x, cu_seqlens, RUNS, fused=interpreter.INTERPRETED)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (out.double() - expected).abs().max() < tolerance
    weights = torch.randn(out.shape)
    mine, theirs = (
        torch.autograd.grad(out, x, weights.to(out.dtype))[0],
        torch.autograd.grad(expected, exact, weights.double())[0],
    )
    assert mine.dtype == dtype and (mine.double() - theirs).abs().max() < tolerance * weights.abs().max()


@needs_triton
def test_on_meta():
    """As a GPU would run it: one operation a row, nothing read back."""
    x = torch.empty(120, 8, device="meta", dtype=torch.bfloat16).requires_grad_()
    out = segment_mean(x, torch.empty(8, device="meta", dtype=torch.int32), RUNS)
    out.sum().backward()
    assert out.shape == (7, 8) and x.grad.shape == x.shape and x.grad.dtype == torch.bfloat16


@needs_triton
@pytest.mark.skipif(interpreter.INTERPRETED or ahead.ptxas(80) is None, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_register_spills(capability, tmp_path, monkeypatch):
    """This kernel and those of the vocabulary's loss, compiled for GPUs that are not here."""
    from bge_ds.kernels import cross_entropy_triton as losses
    from bge_ds.kernels import segment_mean_triton as means

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for element in ("bf16", "fp16", "fp32"):
        pointers = {"starts_ptr": "i32", "out_ptr": "fp32", "target_ptr": "i64", "lse_ptr": "fp32", "loss_ptr": "fp32",
                    "right_ptr": "i32", "sums_ptr": "fp32", "*": element}  # fmt: skip
        blocks = {"ROWS": means._ROWS, "FEATURES": means._FEATURES, "num_warps": 4}
        loss = {"BIAS": True, "SUMS": True, "BLOCK": losses._COLUMNS, "ROWS": losses._ROWS, "num_warps": 8}
        for kernel, constants in ((means._means, blocks), (losses._statistics, loss), (losses._gradient, loss)):
            found = ahead.compile_ahead(kernel, pointers, constants, capability)
            assert found.spilled == 0 and found.shared <= 99 << 10, (kernel, element, found)


@interpreter.runs_again
def test_in_the_interpreter():
    """Every test above, with the kernel as it is."""
    interpreter.run_again(__file__)
