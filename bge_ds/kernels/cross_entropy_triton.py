"""The softmax of a block of logits and its gradient, in Triton: two passes over memory, in place.

Shapes: M rows, V columns (vocabulary).

`_statistics` reads each row once, with a running maximum and sum. `_gradient` reads it again and writes, in the same place,
softmax minus one at the target: what the two products of the backward pass take. Arithmetic is fp32, whatever the logits'
type. The gradient of the bias is a sum over rows: a program adds up its own rows, and torch the programs' sums, so that it
is the same each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bge_ds.kernels.triton_support import launch

# Columns that a program holds in registers, and rows whose bias gradient it adds up.
_COLUMNS, _ROWS = 2048, 64


@triton.jit
def _load(logits_ptr, bias_ptr, row, columns, width, BIAS: tl.constexpr):
    """fp32 logits of one row; -inf behind the last column."""
    x = tl.load(logits_ptr + row.to(tl.int64) * width + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return x


@triton.jit
def _statistics(
    logits_ptr, bias_ptr, target_ptr, lse_ptr, loss_ptr, right_ptr, width, BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for begin in range(0, width, BLOCK):
        x = _load(logits_ptr, bias_ptr, row, begin + tl.arange(0, BLOCK), width, BIAS)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    target = tl.load(target_ptr + row) + tl.zeros([1], tl.int64)
    found = _load(logits_ptr, bias_ptr, row, target, width, BIAS)
    lse = highest + tl.log(total)
    one = tl.arange(0, 1)
    tl.store(lse_ptr + row + one, lse)
    tl.store(loss_ptr + row + one, lse - found)
    tl.store(right_ptr + row + one, (found >= highest).to(tl.int32))


@triton.jit
def _gradient(
    logits_ptr, bias_ptr, target_ptr, lse_ptr, sums_ptr, rows, width, BIAS: tl.constexpr, SUMS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * ROWS
    added = tl.zeros([BLOCK], tl.float32)
    for number in range(0, tl.minimum(ROWS, rows - first)):
        row = first + number
        x = _load(logits_ptr, bias_ptr, row, columns, width, BIAS)
        error = tl.exp(x - tl.load(lse_ptr + row)) - tl.where(columns == tl.load(target_ptr + row), 1.0, 0.0)
        place = logits_ptr + row.to(tl.int64) * width + columns
        tl.store(place, error.to(logits_ptr.dtype.element_ty), mask=columns < width)
        added += error
    if SUMS:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * width + columns, added, mask=columns < width)


def statistics(
    logits_MV: torch.Tensor, bias_V: torch.Tensor | None, target_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-sum-exp of each row, its cross entropy, both fp32; int32 1 where no logit is above the target's).

    logits_MV: contiguous. The bias is added to it in fp32.
    """
    lse_M, loss_M = (torch.empty(len(logits_MV), dtype=torch.float32, device=logits_MV.device) for _ in range(2))
    right_M = torch.empty(len(logits_MV), dtype=torch.int32, device=logits_MV.device)
    launch(
        _statistics, (len(logits_MV),), logits_MV, logits_MV if bias_V is None else bias_V, target_M, lse_M, loss_M, right_M,
        logits_MV.shape[1], on=logits_MV, BIAS=bias_V is not None, BLOCK=_COLUMNS, num_warps=8,
    )  # fmt: skip
    return lse_M, loss_M, right_M


def to_gradient(
    logits_MV: torch.Tensor, bias_V: torch.Tensor | None, target_M: torch.Tensor, lse_M: torch.Tensor, *, sums: bool
) -> torch.Tensor | None:
    """Turn the logits into the gradient of the sum of cross entropies, in place; sums: and return its sum over rows, fp32."""
    rows, width = logits_MV.shape
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS)
    sums_RV = torch.empty(grid[0] if sums else 0, width, dtype=torch.float32, device=logits_MV.device)
    launch(
        _gradient, grid, logits_MV, logits_MV if bias_V is None else bias_V, target_M, lse_M, sums_RV, rows, width,
        on=logits_MV, BIAS=bias_V is not None, SUMS=sums, BLOCK=_COLUMNS, ROWS=_ROWS, num_warps=8,
    )  # fmt: skip
    return sums_RV.sum(0) if sums else None
