"""Attention within each text of a padding-free row.

Shapes: T tokens of N texts in one row, H heads, D features a head.

Three ways, one result: torch's variable-length flash attention (CUDA, 16-bit, no dropout), the flash-attn package
(the same, with dropout), and everywhere else scaled_dot_product_attention once for each run of texts of equal length:
the row is ordered by length, so a run is a view and nothing is padded or copied.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from bge_ds.data.batches import Run


@cache
def _flash_attn_varlen():
    if find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def choose(device_type: str, dtype: torch.dtype, head_dim: int, dropout: float, causal: bool) -> str:
    """The way taken: "varlen", "flash_attn" or "runs"."""
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return "runs"
    if dropout == 0.0:
        return "varlen"
    return "flash_attn" if _flash_attn_varlen() else "runs"


def varlen_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    runs: list[Run],
    *,
    scale: float,
    dropout: float = 0.0,
    causal: bool = False,
    way: str | None = None,
) -> torch.Tensor:
    """Softmax attention of each text on itself, T x H x D.

    cu_seqlens: int32 of N + 1. runs: (texts, length) of neighbouring texts, in row order, together the N texts.
    Keys may have fewer heads than queries (grouped-query attention). `way` overrides the choice, for tests.
    """
    way = way or choose(q_THD.device.type, q_THD.dtype, q_THD.shape[-1], dropout, causal)
    grouped = q_THD.shape[1] != k_THD.shape[1]
    longest = runs[-1].length if runs else 0
    if way == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if causal else (-1, -1)
        options = {"enable_gqa": True} if grouped else {}
        return varlen_attn(
            q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=window, **options
        )
    if way == "flash_attn":
        return _flash_attn_varlen()(
            q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, longest, longest, dropout, softmax_scale=scale, causal=causal
        )
    # One split a tensor rather than one slice a run: the backward of a split is a single concatenation.
    sizes = [texts * length for texts, length in runs]
    out = []
    for (texts, length), q, k, v in zip(runs, q_THD.split(sizes), k_THD.split(sizes), v_THD.split(sizes), strict=True):
        q, k, v = (x.unflatten(0, (texts, length)).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, is_causal=causal, enable_gqa=grouped)
        out.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)
