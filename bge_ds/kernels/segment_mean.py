"""The mean of each text's rows in a packed row, and its transpose: a text's vector repeated at each of its rows.

Shapes: T tokens of N texts in one row, D features.

On the CPU, a plain mean of a dense view for each run of equal lengths. On a GPU, one Triton kernel for the whole row, in which
a program adds up one text's rows in order: deterministic, unlike scattered sums.
"""

from __future__ import annotations

import torch

from bge_ds.kernels.packed import LengthRun
from bge_ds.kernels.triton_support import at_least_fp32, use_triton


class _SegmentMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, cu_seqlens):
        from bge_ds.kernels.segment_mean_triton import means

        ctx.save_for_backward(cu_seqlens)
        ctx.tokens, ctx.dtype = len(hidden_TD), hidden_TD.dtype
        return means(hidden_TD, cu_seqlens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_ND):
        (cu_seqlens,) = ctx.saved_tensors
        lengths_N = cu_seqlens.diff()
        share_ND = (grad_ND / lengths_N.clamp_min(1)[:, None]).to(ctx.dtype)
        return share_ND.repeat_interleave(lengths_N, dim=0, output_size=ctx.tokens), None


def segment_mean(
    hidden_TD: torch.Tensor, cu_seqlens: torch.Tensor, runs: list[LengthRun], *, fused: bool | None = None
) -> torch.Tensor:
    """N x D, at least fp32: the mean of each text's rows.

    cu_seqlens: int32 of N + 1. runs: (texts, length) of neighbouring texts, in row order, covering the N texts. No double
    backward. fused: overrides the choice, for tests.
    """
    if use_triton(hidden_TD) if fused is None else fused:
        return _SegmentMean.apply(hidden_TD, cu_seqlens)
    sizes = [n * length for n, length in runs]
    parts = zip(hidden_TD.split(sizes), runs, strict=True)
    return torch.cat([at_least_fp32(hidden.unflatten(0, run)).mean(1) for hidden, run in parts])


class _SegmentExpand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, cu_seqlens, tokens):
        ctx.save_for_backward(cu_seqlens)
        return x_ND.repeat_interleave(cu_seqlens.diff(), dim=0, output_size=tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        from bge_ds.kernels.segment_mean_triton import means

        (cu_seqlens,) = ctx.saved_tensors
        return (means(grad_TD, cu_seqlens) * cu_seqlens.diff()[:, None]).to(grad_TD.dtype), None, None


def segment_expand(x_ND: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int, *, fused: bool | None = None) -> torch.Tensor:
    """T x D: row n of x at each row of text n. tokens: T, on the host. fused: as for `segment_mean`.

    On a GPU the gradient is summed text by text, in fp32; autograd's own would scatter it in no fixed order.
    """
    if use_triton(x_ND) if fused is None else fused:
        return _SegmentExpand.apply(x_ND, cu_seqlens, tokens)
    return x_ND.repeat_interleave(cu_seqlens.diff(), dim=0, output_size=tokens)
