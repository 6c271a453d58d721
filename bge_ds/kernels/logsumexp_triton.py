"""The kernels of `linear_logsumexp`: statistics of a block of logits, and the weights of its backward.

Shapes: M rows, V columns, R keys of a row, C keys of a column; a block holds some of the rows.

Both read each logit once and decide in registers whether its pair counts: by its column against the row's span of own columns,
by 64-bit keys, by its value against the row's limit. A program takes _ROWS rows, so a column's keys are read once for all of
them. Arithmetic is fp32. Nothing is summed across programs, so results are deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bge_ds.kernels.linear_logsumexp import ExcludedPairs
from bge_ds.kernels.triton_support import launch

_ROWS, _COLUMNS = 4, 1024


@triton.jit
def _counted(
    logits_ptr, factor_ptr, first_ptr, count_ptr, row_keys_ptr, column_keys_ptr, limit_ptr, begin, rows, width, rows_of, R, C,
    columns, LIMIT: tl.constexpr,
):  # fmt: skip
    """(logits of a tile, -inf where a pair does not count; which of them exceed the limit).

    begin: first row of the block in all M. rows_of: the program's rows in the block.
    """
    inside = (rows_of[:, None] < rows) & (columns[None, :] < width)
    x = tl.load(logits_ptr + rows_of[:, None].to(tl.int64) * width + columns[None, :], mask=inside, other=float("-inf"))
    x *= tl.load(factor_ptr)
    row, real = (begin + rows_of).to(tl.int64), rows_of < rows
    first = tl.load(first_ptr + row, mask=real, other=0)
    count = tl.load(count_ptr + row, mask=real, other=0)
    out = (columns[None, :] >= first[:, None]) & (columns[None, :] < (first + count)[:, None])
    for c in range(0, C):
        column_key = tl.load(column_keys_ptr + columns.to(tl.int64) * C + c, mask=columns < width, other=0)
        for r in range(0, R):
            row_key = tl.load(row_keys_ptr + row * R + r, mask=real, other=0)
            out |= row_key[:, None] == column_key[None, :]
    out |= ~inside
    over = tl.zeros_like(out)
    if LIMIT:
        over = (x > tl.load(limit_ptr + row, mask=real, other=0.0)[:, None]) & ~out
    return tl.where(out | over, float("-inf"), x), over


@triton.jit
def _statistics(
    logits_ptr, factor_ptr, first_ptr, count_ptr, row_keys_ptr, column_keys_ptr, limit_ptr, lse_ptr, over_ptr, begin, rows,
    width, R, C, LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows_of = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    above = tl.zeros([ROWS], tl.int64)
    for start in range(0, width, COLUMNS):
        x, over = _counted(
            logits_ptr, factor_ptr, first_ptr, count_ptr, row_keys_ptr, column_keys_ptr, limit_ptr, begin, rows, width,
            rows_of, R, C, start + tl.arange(0, COLUMNS), LIMIT,
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(x, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - safe) + tl.sum(tl.exp(x - safe[:, None]), 1)
        highest = higher
        if LIMIT:
            above += tl.sum(over.to(tl.int64), 1)
    place, real = begin + rows_of, rows_of < rows
    tl.store(lse_ptr + place, highest + tl.log(total), mask=real)  # -inf where nothing is left, NaN where a logit is
    if LIMIT:
        tl.store(over_ptr + place, above, mask=real)


@triton.jit
def _weights(
    logits_ptr, weights_ptr, factor_ptr, first_ptr, count_ptr, row_keys_ptr, column_keys_ptr, limit_ptr, lse_ptr, begin, rows,
    width, R, C, LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows_of = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x, _ = _counted(
        logits_ptr, factor_ptr, first_ptr, count_ptr, row_keys_ptr, column_keys_ptr, limit_ptr, begin, rows, width, rows_of, R,
        C, columns, LIMIT,
    )  # fmt: skip
    lse = tl.load(lse_ptr + begin + rows_of, mask=rows_of < rows, other=0.0)
    share = tl.exp(x - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
    inside = (rows_of[:, None] < rows) & (columns[None, :] < width)
    place = weights_ptr + rows_of[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(place, share.to(weights_ptr.dtype.element_ty), mask=inside)


def _arguments(logits: torch.Tensor, factor: torch.Tensor, excluded: ExcludedPairs, limit_M: torch.Tensor | None) -> tuple:
    """(tensors that both kernels take, number of keys of a row, of a column)."""
    keys = excluded.row_keys_MR.contiguous(), excluded.column_keys_VC.contiguous()
    of_row, of_column = (part.shape[1] for part in keys)
    limit = logits if limit_M is None else limit_M.contiguous()
    tensors = (factor, excluded.first_M, excluded.count_M, *keys, limit)
    return tensors, of_row, of_column


def statistics(
    logits: torch.Tensor, factor: torch.Tensor, excluded: ExcludedPairs, limit_M: torch.Tensor | None, lse_M: torch.Tensor,
    over_M: torch.Tensor, block: slice,
) -> None:  # fmt: skip
    """Write the block's log-sum-exps into lse_M (fp32) and its numbers of logits above the limit into over_M (int64).

    logits: fp32, contiguous, at least as many rows as the block; factor: fp32, 0-dim, multiplied into them.
    """
    rows, (tensors, of_row, of_column) = block.stop - block.start, _arguments(logits, factor, excluded, limit_M)
    launch(
        _statistics, (triton.cdiv(rows, _ROWS),), logits, *tensors, lse_M, over_M, block.start, rows, logits.shape[1], of_row,
        of_column, on=logits, LIMIT=limit_M is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=8,
    )  # fmt: skip


def weights(
    logits: torch.Tensor, shares: torch.Tensor, factor: torch.Tensor, excluded: ExcludedPairs, limit_M: torch.Tensor | None,
    lse_M: torch.Tensor, block: slice,
) -> None:  # fmt: skip
    """Write exp(logit - log-sum-exp) of the block's rows into `shares` (may be `logits`); 0 where a pair does not count."""
    rows, width = block.stop - block.start, logits.shape[1]
    tensors, of_row, of_column = _arguments(logits, factor, excluded, limit_M)
    launch(
        _weights, (triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS)), logits, shares, *tensors, lse_M, block.start, rows,
        width, of_row, of_column, on=logits, LIMIT=limit_M is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=8,
    )  # fmt: skip
