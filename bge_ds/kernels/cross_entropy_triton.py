"""Softmax cross entropy of a block of logits and its gradient, in Triton: two passes over memory, in place.

Shapes: M rows, V columns (vocabulary).

`_statistics` reads each row once, with a running maximum and sum (online softmax). `_gradient` reads it again and overwrites it
with softmax minus one-hot target, the input of the backward's two products. Arithmetic is fp32, whatever the logits' type. The
bias gradient is a sum over rows: a program adds up its own rows and torch adds up the programs' sums, so it is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bge_ds.kernels.matmul import empty_aligned
from bge_ds.kernels.triton_support import launch

# Columns a program holds in registers; rows whose bias gradient it adds up; stages of the software pipeline.
_COLUMNS, _ROWS, _STAGES = 2048, 64, 3


@triton.jit
def _load(place, columns, logits_row, width):
    """fp32 logits, -inf behind the last column. The mask ends with the row's memory (`matmul.empty_aligned`)."""
    x = tl.load(place + columns, mask=columns < logits_row, other=0.0).to(tl.float32)
    return tl.where(columns < width, x, float("-inf"))


@triton.jit
def _statistics(
    logits_ptr, bias_ptr, target_ptr, lse_ptr, loss_ptr, right_ptr, logits_row, width, BIAS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = logits_ptr + row.to(tl.int64) * logits_row
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for begin in tl.range(0, width, BLOCK, num_stages=STAGES):
        columns = begin + tl.arange(0, BLOCK)
        x = _load(place, columns, logits_row, width)
        if BIAS:
            x += tl.load(bias_ptr + columns, mask=columns < logits_row, other=0.0).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    one = tl.arange(0, 1)
    target = tl.load(target_ptr + row + one)
    target_logit = tl.load(place + target).to(tl.float32)
    if BIAS:
        target_logit += tl.load(bias_ptr + target).to(tl.float32)
    lse = highest + tl.log(total)
    tl.store(lse_ptr + row + one, lse)
    tl.store(loss_ptr + row + one, lse - target_logit)
    tl.store(right_ptr + row + one, (target_logit >= highest).to(tl.int32))


@triton.jit
def _gradient(
    logits_ptr, bias_ptr, target_ptr, lse_ptr, sums_ptr, logits_row, rows, width, BIAS: tl.constexpr, SUMS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * ROWS
    bias = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + columns, mask=columns < logits_row, other=0.0).to(tl.float32)
    added = tl.zeros([BLOCK], tl.float32)
    for number in tl.range(0, tl.minimum(ROWS, rows - first), num_stages=STAGES):
        row = first + number
        place = logits_ptr + row.to(tl.int64) * logits_row
        x = _load(place, columns, logits_row, width) + bias
        error = tl.exp(x - tl.load(lse_ptr + row)) - tl.where(columns == tl.load(target_ptr + row), 1.0, 0.0)
        tl.store(place + columns, error.to(logits_ptr.dtype.element_ty), mask=columns < logits_row)
        added += error
    if SUMS:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * logits_row + columns, added, mask=columns < logits_row)


def statistics(
    logits_MV: torch.Tensor, bias: torch.Tensor | None, target_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-sum-exp of each row, its cross entropy, both fp32; int32 1 where no logit exceeds the target's).

    logits_MV: rows of `matmul.empty_aligned`. bias: padded to their stride; added in fp32.
    """
    lse_M, loss_M = (torch.empty(len(logits_MV), dtype=torch.float32, device=logits_MV.device) for _ in range(2))
    right_M = torch.empty(len(logits_MV), dtype=torch.int32, device=logits_MV.device)
    launch(
        _statistics, (len(logits_MV),), logits_MV, logits_MV if bias is None else bias, target_M, lse_M, loss_M, right_M,
        logits_MV.stride(0), logits_MV.shape[1], on=logits_MV, BIAS=bias is not None, BLOCK=_COLUMNS, STAGES=_STAGES,
        num_warps=8,
    )  # fmt: skip
    return lse_M, loss_M, right_M


def to_gradient(
    logits_MV: torch.Tensor, bias: torch.Tensor | None, target_M: torch.Tensor, lse_M: torch.Tensor, *, sums: bool
) -> torch.Tensor | None:
    """Overwrite the logits with the gradient of the summed cross entropy; with sums, return its sum over rows, fp32."""
    rows, width = logits_MV.shape
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS)
    sums_RV = empty_aligned(grid[0] if sums else 0, width, lse_M)
    launch(
        _gradient, grid, logits_MV, logits_MV if bias is None else bias, target_M, lse_M, sums_RV, logits_MV.stride(0), rows,
        width, on=logits_MV, BIAS=bias is not None, SUMS=sums, BLOCK=_COLUMNS, ROWS=_ROWS, STAGES=_STAGES, num_warps=8,
    )  # fmt: skip
    return sums_RV.sum(0) if sums else None
