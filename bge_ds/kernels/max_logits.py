"""For each text, the largest logit of every word of the vocabulary over the text's tokens, without the logits.

Shapes: T tokens of N texts in one row, V columns (vocabulary), D features; a block holds n texts of one length L.

DupMAE (arXiv:2211.08769) makes a text's bag of words from the maxima of its tokens' vocabulary logits. Logits exist for one
block at a time; only the N x V maxima and their argmax tokens are kept. A maximum's gradient flows to the one token that
reached it (the first of several), as in torch.

On the CPU a block is some texts of one length and some columns, small enough for the caches. On a GPU that would be a few small
calls for each length; there a block is some whole texts and all columns, one product and one Triton kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from bge_ds.kernels.matmul import add_product, empty_aligned
from bge_ds.kernels.packed import LengthRun, chunk_bounds
from bge_ds.kernels.triton_support import use_triton

# Logits held at a time and most rows of a block, as in linear_cross_entropy.
_BLOCK_ELEMENTS = 1 << 22
_BLOCK_ROWS = 2048
# On a GPU: bytes of logits, or of their gradient, held at a time; one text at least.
_GPU_BYTES = 512 << 20


def _blocks(runs: list[LengthRun], columns: int) -> Iterator[tuple[slice, slice, slice, int]]:
    """(texts, rows of their tokens, columns, length) of each block."""
    text = row = 0
    for texts, length in runs:
        step = max(1, _BLOCK_ROWS // max(1, length))
        width = max(1, _BLOCK_ELEMENTS // (min(step, texts) * length))
        for first in range(0, texts, step):
            n = min(step, texts - first)
            for start in range(0, columns, width):
                block = slice(start, min(start + width, columns))
                yield slice(text, text + n), slice(row, row + n * length), block, length
            text, row = text + n, row + n * length


class _MaxLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_VD, bias_V, runs):
        texts, columns = sum(run.texts for run in runs), w_VD.shape[0]
        out_NV = x_TD.new_empty(texts, columns, dtype=torch.float64 if x_TD.dtype == torch.float64 else torch.float32)
        from_NV = torch.empty(texts, columns, dtype=torch.int32, device=x_TD.device)
        for n, rows, block, length in _blocks(runs, columns):
            logits = F.linear(x_TD[rows], w_VD[block]).unflatten(0, (-1, length))
            best, argmax = logits.max(1)
            out_NV[n, block], from_NV[n, block] = best.to(out_NV.dtype), argmax.int()
        if bias_V is not None:
            out_NV += bias_V
        ctx.save_for_backward(x_TD, w_VD, from_NV)
        ctx.runs, ctx.bias_dtype = runs, None if bias_V is None else bias_V.dtype
        return out_NV

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NV):
        x_TD, w_VD, from_NV = ctx.saved_tensors
        dx, dw = (torch.zeros(t.shape, dtype=grad_NV.dtype, device=t.device) for t in (x_TD, w_VD))
        for n, rows, block, length in _blocks(ctx.runs, w_VD.shape[0]):
            grad, argmax = grad_NV[n, block], from_NV[n, block]
            spread = x_TD.new_zeros(len(grad), length, grad.shape[1])
            spread.scatter_(1, argmax[:, None].long(), grad[:, None].to(x_TD.dtype))
            spread = spread.flatten(0, 1)
            dx[rows] += spread @ w_VD[block]
            dw[block] += spread.T @ x_TD[rows]
        db = None if ctx.bias_dtype is None else grad_NV.sum(0).to(ctx.bias_dtype)
        return dx.to(x_TD.dtype), dw.to(w_VD.dtype), db, None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_VD, bias_V, cu_seqlens, runs):
        from bge_ds.kernels.max_logits_triton import maxima

        x_TD, count, columns = x_TD.contiguous(), len(cu_seqlens) - 1, len(w_VD)
        out_NV = torch.empty(count, columns, dtype=torch.float32, device=x_TD.device)
        from_NV = torch.empty(count, columns, dtype=torch.int32, device=x_TD.device)
        ctx.chunks, ctx.most = _chunks(runs, columns * x_TD.dtype.itemsize)
        held = empty_aligned(ctx.most, columns, x_TD)
        for texts, rows in ctx.chunks:
            logits = torch.mm(x_TD[rows], w_VD.T, out=held[: rows.stop - rows.start])
            maxima(logits, cu_seqlens[texts.start : texts.stop + 1], out_NV[texts], from_NV[texts])
        if bias_V is not None:
            out_NV += bias_V
        ctx.save_for_backward(x_TD, w_VD, from_NV, cu_seqlens)
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        return out_NV

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NV):
        from bge_ds.kernels.max_logits_triton import gradient

        x_TD, w_VD, from_NV, cu_seqlens = ctx.saved_tensors
        grad_NV, dx, dw = grad_NV.contiguous(), torch.empty_like(x_TD), torch.zeros_like(w_VD, dtype=torch.float32)
        held = empty_aligned(ctx.most, len(w_VD), x_TD)
        for texts, rows in ctx.chunks:
            of_logits = held[: rows.stop - rows.start]
            starts = cu_seqlens[texts.start : texts.stop + 1]
            gradient(grad_NV[texts], from_NV[texts], starts, of_logits)
            torch.mm(of_logits, w_VD, out=dx[rows])
            add_product(dw, of_logits, x_TD[rows])
        db = None if ctx.bias_dtype is None else grad_NV.sum(0).to(ctx.bias_dtype)
        return dx, dw.to(w_VD.dtype), db, None, None


def _chunks(runs: list[LengthRun], row_bytes: int) -> tuple[list[tuple[slice, slice]], int]:
    """(texts, rows) of each chunk, and the number of rows of the largest."""
    ends = [0, *accumulate(length for n, length in runs for _ in range(n))]
    bounds = list(pairwise(chunk_bounds(runs, None, max(1, _GPU_BYTES // row_bytes))))
    chunks = [(slice(*texts), slice(*(ends[text] for text in texts))) for texts in bounds]
    return chunks, max(rows.stop - rows.start for _, rows in chunks)


def max_logits(
    x_TD: torch.Tensor, w_VD: torch.Tensor, bias_V: torch.Tensor | None, cu_seqlens: torch.Tensor, runs: list[LengthRun], *,
    fused: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """N x V, at least fp32: the maximum of `x W^T + bias` over each text's rows.

    cu_seqlens: int32 of N + 1. runs: (texts, length) of neighbouring texts, in row order, covering all T rows; every length
    is 1 or more. Gradients flow to x, w and bias; no double backward. fused: overrides the choice, for tests.
    """
    if use_triton(x_TD) if fused is None else fused:
        return _Fused.apply(x_TD, w_VD, bias_V, cu_seqlens, runs)
    return _MaxLogits.apply(x_TD, w_VD, bias_V, runs)
