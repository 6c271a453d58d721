"""The log-sum-exp of each row of X W^T, except excluded columns, without the whole matrix.

Shapes: M rows (queries), V columns (passages), D features, R keys of a row, C keys of a column, J excluded pairs.

The normaliser for losses that combine it with scores of their own (several targets, a teacher's weights). The gradient of a row
is known only afterwards, so the backward recomputes the blocks of logits: four matrix products, and M numbers kept.

On the CPU the excluded pairs are listed and written into each block. Their number depends on the data and reading it would
stall a GPU, so there two Triton kernels (`logsumexp_triton`) decide pair by pair, while logits pass through registers. The
products are cuBLAS's, in the caller's 16-bit type with fp32 sums where requested.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from bge_ds.kernels.matmul import add_product, multiply, to_narrow
from bge_ds.kernels.triton_support import at_least_fp32, is_gpu, use_triton

# Logits held at a time: 64 MiB of fp32 on a CPU, 512 MiB on a GPU (plus half as much for 16-bit weights).
_BLOCK_ELEMENTS = 1 << 24
_GPU_ELEMENTS = 1 << 27


@dataclass
class ExcludedPairs:
    """(row, column) pairs that do not count.

    For each row: the count_M columns from first_M on (int64), and all columns that share a key with it (row_keys_MR,
    column_keys_VC; int64, R or C may be 0).
    """

    first_M: torch.Tensor
    count_M: torch.Tensor
    row_keys_MR: torch.Tensor
    column_keys_VC: torch.Tensor

    @cached_property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(row_J, col_J) int64, each pair once, rows rising. J depends on the data: on a GPU, this waits for the device."""
        (rows, of_row), (columns, of_column) = self.row_keys_MR.shape, self.column_keys_VC.shape
        row_J, col_J = equal_pairs(self.row_keys_MR.flatten(), self.column_keys_VC.flatten())
        own_J = torch.arange(rows, device=self.first_M.device).repeat_interleave(self.count_M)
        place_J = torch.arange(len(own_J), device=own_J.device) - (self.count_M.cumsum(0) - self.count_M)[own_J]
        shared_J = row_J.div(max(1, of_row), rounding_mode="floor") * columns
        shared_J += col_J.div(max(1, of_column), rounding_mode="floor")
        keys_J = torch.unique(torch.cat([shared_J, own_J * columns + self.first_M[own_J] + place_J]))
        return keys_J // columns, keys_J % columns


def equal_pairs(left_M: torch.Tensor, right_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every (m, n) with left[m] == right[n], as two index tensors; memory grows with the number of pairs, not M x N."""
    sorted_N, place_N = right_N.sort()
    first_M = torch.searchsorted(sorted_N, left_M)
    counts_M = torch.searchsorted(sorted_N, left_M, right=True) - first_M
    total = int(counts_M.sum())
    m = torch.repeat_interleave(counts_M, output_size=total)
    within = torch.arange(total, device=left_M.device) - (counts_M.cumsum(0) - counts_M)[m]
    return m, place_N[first_M[m] + within]


def _blocks(rows: int, columns: int, elements: int) -> list[slice]:
    step = max(1, elements // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _Listed(torch.autograd.Function):
    """The plain implementation, with excluded pairs as lists."""

    @staticmethod
    def forward(ctx, x_MD, w_VD, row_J, col_J, limit_M):
        blocks = _blocks(len(x_MD), len(w_VD), _GPU_ELEMENTS if is_gpu(x_MD.device.type) else _BLOCK_ELEMENTS)
        # Each block's range of pairs, on the host: slices need numbers.
        edges = torch.tensor([*(block.start for block in blocks), len(x_MD)], device=row_J.device)
        bounds = torch.searchsorted(row_J, edges).tolist()
        ctx.blocks = [(block, slice(*pairs)) for block, pairs in zip(blocks, pairwise(bounds), strict=True)]
        lse_M = torch.empty(len(x_MD), dtype=at_least_fp32(x_MD[:0]).dtype, device=x_MD.device)
        over_M = torch.zeros(len(x_MD), dtype=torch.int64, device=x_MD.device)
        inputs = x_MD, w_VD, row_J, col_J, limit_M
        for block, pairs in ctx.blocks:
            logits, over = _Listed._logits(inputs, block, pairs)
            lse_M[block] = logits.logsumexp(-1)
            if over is not None:
                over_M[block] = over.sum(-1)
        ctx.save_for_backward(*inputs, lse_M)
        ctx.mark_non_differentiable(over_M)
        return lse_M, over_M

    @staticmethod
    def _logits(inputs, block: slice, pairs: slice):
        x_MD, w_VD, row_J, col_J, limit_M = inputs
        logits = at_least_fp32(x_MD[block] @ w_VD.T)
        logits[row_J[pairs] - block.start, col_J[pairs]] = float("-inf")
        if limit_M is None:
            return logits, None
        over = logits > limit_M[block, None]
        return logits.masked_fill_(over, float("-inf")), over

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_M, _):
        *inputs, lse_M = ctx.saved_tensors
        x_MD, w_VD = inputs[:2]
        dx = torch.empty_like(x_MD) if ctx.needs_input_grad[0] else None
        dw = torch.zeros(w_VD.shape, dtype=lse_M.dtype, device=w_VD.device) if ctx.needs_input_grad[1] else None
        # A row without columns has the value -inf and no gradient: exp(-inf - 0) is 0.
        norm_M = lse_M.masked_fill(lse_M == float("-inf"), 0.0)
        for block, pairs in ctx.blocks:
            logits, _ = _Listed._logits(inputs, block, pairs)
            weights = logits.sub_(norm_M[block, None]).exp_().mul_(grad_M[block, None]).to(x_MD.dtype)
            if dx is not None:
                dx[block] = weights @ w_VD
            if dw is not None:
                dw += weights.T @ x_MD[block]
        return dx, None if dw is None else dw.to(w_VD.dtype), None, None, None


class _Fused(torch.autograd.Function):
    """The Triton implementation. Weights stay between 0 and 1, and a row's gradient is multiplied into its features instead,
    so that neither leaves the range of 16 bits."""

    @staticmethod
    def forward(ctx, x_MD, w_VD, limit_M, excluded: ExcludedPairs, narrow: torch.dtype | None):
        from bge_ds.kernels.logsumexp_triton import statistics

        x, w = to_narrow(x_MD, narrow), to_narrow(w_VD, narrow)
        factor = x.factor * w.factor
        ctx.blocks = _blocks(len(x_MD), len(w_VD), _GPU_ELEMENTS)
        ctx.rows, ctx.narrow, ctx.dtypes = ctx.blocks[0].stop if ctx.blocks else 0, narrow, (x_MD.dtype, w_VD.dtype)
        lse_M = torch.empty(len(x_MD), dtype=torch.float32, device=x_MD.device)
        over_M = torch.zeros(len(x_MD), dtype=torch.int64, device=x_MD.device)
        logits = torch.empty(ctx.rows, len(w_VD), dtype=torch.float32, device=x_MD.device)
        for block in ctx.blocks:
            multiply(x.values[block], w.values.T, out=logits[: block.stop - block.start])
            statistics(logits, factor, excluded, limit_M, lse_M, over_M, block)
        ctx.excluded = excluded
        ctx.save_for_backward(x_MD, x.values, w.values, w.factor, factor, limit_M, lse_M)
        ctx.mark_non_differentiable(over_M)
        return lse_M, over_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_M, _):
        from bge_ds.kernels.logsumexp_triton import weights

        x_MD, x, w, w_factor, factor, limit_M, lse_M = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=torch.float32, device=x.device) if ctx.needs_input_grad[0] else None
        dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if ctx.needs_input_grad[1] else None
        # A row without columns has no gradient, whatever flows into its -inf.
        grad_M = grad_M.masked_fill(lse_M == float("-inf"), 0.0)
        scaled = to_narrow(x_MD * grad_M[:, None], ctx.narrow)
        logits = torch.empty(ctx.rows, len(w), dtype=torch.float32, device=x.device)
        shares = logits if x.dtype == torch.float32 else torch.empty_like(logits, dtype=x.dtype)
        for block in ctx.blocks:
            n = block.stop - block.start
            multiply(x[block], w.T, out=logits[:n])
            weights(logits, shares, factor, ctx.excluded, limit_M, lse_M, block)
            if dx is not None:
                multiply(shares[:n], w, out=dx[block])
            if dw is not None:
                add_product(dw, shares[:n], scaled.values[block])
        dx = None if dx is None else dx.mul_(grad_M[:, None] * w_factor).to(ctx.dtypes[0])
        dw = None if dw is None else dw.mul_(scaled.factor).to(ctx.dtypes[1])
        return dx, dw, None, None, None


def linear_logsumexp(
    x_MD: torch.Tensor, w_VD: torch.Tensor, excluded: ExcludedPairs, limit_M: torch.Tensor | None = None, *,
    narrow: torch.dtype | None = None, fused: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(log-sum-exp of each row of `x W^T`, number of columns of each row above its limit, int64).

    excluded: pairs that do not count. limit_M: logits above a row's limit do not count either (it gets no gradient). A row
    without columns is -inf. The result is fp32 (fp64 for fp64); gradients flow to x and w, no double backward. narrow: 16-bit
    type in which a GPU multiplies, with fp32 sums; None for the inputs' own. fused: overrides the choice, for tests.
    """
    if use_triton(x_MD) if fused is None else fused:
        return _Fused.apply(x_MD, w_VD, limit_M, excluded, narrow)
    return _Listed.apply(x_MD, w_VD, *excluded.pairs, limit_M)
