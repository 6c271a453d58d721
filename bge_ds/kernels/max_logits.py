"""For each text, the largest logit of every word of the vocabulary over the text's tokens, without the logits.

Shapes: T tokens of N texts in one row, V columns (vocabulary), D features; a block holds n texts of one length L.

DupMAE (arXiv 2211.08769) makes a text's bag of words from the maxima of its tokens' vocabulary logits. Only the N x V maxima
and the tokens they came from are kept; logits exist for one block of texts and columns at a time. The gradient of a
maximum flows to the one token that reached it (the first, where several did), as torch's own does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bge_ds.data.batches import Run

# As in linear_cross_entropy: logits held at a time, and with them the rows of a block.
_BLOCK_ELEMENTS = 1 << 22
_BLOCK_ROWS = 2048


def _blocks(runs: list[Run], columns: int) -> Iterator[tuple[slice, slice, slice, int]]:
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
            best, found = logits.max(1)
            out_NV[n, block], from_NV[n, block] = best.to(out_NV.dtype), found.int()
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
            grad, found = grad_NV[n, block], from_NV[n, block]
            spread = x_TD.new_zeros(len(grad), length, grad.shape[1])
            spread.scatter_(1, found[:, None].long(), grad[:, None].to(x_TD.dtype))
            spread = spread.flatten(0, 1)
            dx[rows] += spread @ w_VD[block]
            dw[block] += spread.T @ x_TD[rows]
        db = None if ctx.bias_dtype is None else grad_NV.sum(0).to(ctx.bias_dtype)
        return dx.to(x_TD.dtype), dw.to(w_VD.dtype), db, None


def max_logits(x_TD: torch.Tensor, w_VD: torch.Tensor, bias_V: torch.Tensor | None, runs: list[Run]) -> torch.Tensor:
    """N x V, at least fp32: the maximum of `x W^T + bias` over each text's rows.

    runs: (texts, length) of neighbouring texts, in row order, together all T rows; every length is 1 or more.
    Gradients flow to x, w and bias, once (no double backward).
    """
    return _MaxLogits.apply(x_TD, w_VD, bias_V, runs)
