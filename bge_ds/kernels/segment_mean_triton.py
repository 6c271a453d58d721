"""`segment_mean` in Triton: a program sums some features of one text, one block of rows after the other, in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bge_ds.kernels.triton_support import launch

_ROWS, _FEATURES = 32, 128


@triton.jit
def _means(hidden_ptr, starts_ptr, out_ptr, hidden_row, hidden_column, width, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    text = tl.program_id(0)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    start = tl.load(starts_ptr + text).to(tl.int64)
    length = (tl.load(starts_ptr + text + 1).to(tl.int64) - start).to(tl.int32)
    total = tl.zeros([FEATURES], tl.float32)
    for begin in range(0, length, ROWS):
        rows = begin + tl.arange(0, ROWS)
        places = hidden_ptr + (start + rows[:, None]) * hidden_row + features[None, :] * hidden_column
        x = tl.load(places, mask=(rows[:, None] < length) & (features[None, :] < width), other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    out = total / tl.maximum(length, 1).to(tl.float32)
    tl.store(out_ptr + text.to(tl.int64) * width + features, out, mask=features < width)


def means(hidden_TD: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """N x D fp32: the mean of rows cu_seqlens[n] to cu_seqlens[n + 1] - 1, for each n; 0 where there is none."""
    texts, width = len(cu_seqlens) - 1, hidden_TD.shape[1]
    out_ND = torch.empty(texts, width, dtype=torch.float32, device=hidden_TD.device)
    launch(
        _means, (texts, triton.cdiv(width, _FEATURES)), hidden_TD, cu_seqlens, out_ND, *hidden_TD.stride(), width,
        on=hidden_TD, ROWS=_ROWS, FEATURES=_FEATURES, num_warps=4,
    )  # fmt: skip
    return out_ND
