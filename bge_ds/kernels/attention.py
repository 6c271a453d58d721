"""Attention within each text of a padding-free row.

Shapes: T tokens of N texts in one row, H heads, D features a head.

Three ways, one result: torch's variable-length flash attention (CUDA, 16-bit, no dropout), the flash-attn package
(the same, with dropout), and everywhere else scaled_dot_product_attention once for each run of texts of equal length:
the row is ordered by length, so a run is a view and nothing is padded or copied. Putting neighbouring lengths into one
call, padded inside it, was measured and lost: a call costs less than copying tokens to padded places and masking them.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from bge_ds.data.batches import Run
from bge_ds.kernels.blockwise_attention import Block, as_bias, blockwise_attention

# Queries a call where a window cuts a text: each block meets only the keys its window reaches.
_WINDOW_BLOCK = 256


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
    window: int | None = None,
    way: str | None = None,
) -> torch.Tensor:
    """Softmax attention of each text on itself, T x H x D.

    cu_seqlens: int32 of N + 1. runs: (texts, length) of neighbouring texts, in row order, together the N texts.
    Keys may have fewer heads than queries (grouped-query attention). `way` overrides the choice, for tests.
    window: token i sees token j only where |i - j| < window; with causal, where 0 <= i - j < window.
    """
    if window is not None and window < 1:
        raise ValueError(f"attention window {window} lets a token see nothing; it is 1 or more, or None for no window")
    way = way or choose(q_THD.device.type, q_THD.dtype, q_THD.shape[-1], dropout, causal)
    grouped = q_THD.shape[1] != k_THD.shape[1]
    longest = runs[-1].length if runs else 0
    # Flash attention counts the tokens left and right of a token that it sees; -1 is all of them.
    reach = -1 if window is None else window - 1
    sides = (reach, 0 if causal else reach)
    if way == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        options = {"enable_gqa": True} if grouped else {}
        return varlen_attn(
            q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=sides, **options
        )
    if way == "flash_attn":
        return _flash_attn_varlen()(
            q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, longest, longest, dropout, softmax_scale=scale, causal=causal,
            window_size=sides,
        )  # fmt: skip
    if dropout > 0 and q_THD.device.type == "cpu" and not grouped:
        bias = _bias(causal, window)
        return blockwise_attention(q_THD, k_THD, v_THD, runs, scale=scale, p=dropout, bias=bias)
    # One split a tensor rather than one slice a run: the backward of a split is a single concatenation.
    sizes = [texts * length for texts, length in runs]
    out = []
    for (texts, length), q, k, v in zip(runs, q_THD.split(sizes), k_THD.split(sizes), v_THD.split(sizes), strict=True):
        q, k, v = (x.unflatten(0, (texts, length)).transpose(1, 2) for x in (q, k, v))
        options = {"dropout_p": dropout, "scale": scale, "enable_gqa": grouped}
        if window is not None and window < length:
            y = _windowed(q, k, v, window, causal, options)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options)
        out.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def _windowed(q, k, v, window: int, causal: bool, options: dict) -> torch.Tensor:
    """Attention of texts longer than the window: N x H x L x D, block of queries by block of queries.

    Neither the work nor the mask grows with the square of a text: all blocks share one mask, of which those at the ends
    of a text take a part.
    """
    length, before, after = q.shape[2], window - 1, 0 if causal else window - 1
    mask = _band(window, before, after, q.device)
    out = []
    for start in range(0, length, _WINDOW_BLOCK):
        end = min(start + _WINDOW_BLOCK, length)
        first, last = max(start - before, 0), min(end + after, length)
        # The mask's column 0 is the key `before` places left of the block's first query.
        part = mask[: end - start, first - start + before : last - start + before]
        q_block, k_part, v_part = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
        out.append(F.scaled_dot_product_attention(q_block, k_part, v_part, attn_mask=part, **options))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


@lru_cache(maxsize=8)
def _band(window: int, before: int, after: int, device: torch.device) -> torch.Tensor:
    """True where query i of a block sees key j of those from `before` left of the block to `after` right of it."""
    i = torch.arange(_WINDOW_BLOCK, device=device)[:, None]
    j = torch.arange(-before, _WINDOW_BLOCK + after, device=device)
    return (i - j < window) & (j - i <= after)


def _bias(causal: bool, window: int | None):
    """What `blockwise_attention` adds to a block's scores."""

    def bias(block: Block) -> torch.Tensor | None:
        if not causal and (window is None or window >= block.length):
            return None
        return _block_bias(block.length, block.rows.start, block.rows.stop, causal, window)

    return bias


# Few: each is as large as a block of scores, and neighbouring blocks are of one length.
@lru_cache(maxsize=8)
def _block_bias(length: int, first: int, last: int, causal: bool, window: int | None) -> torch.Tensor:
    i, j = torch.arange(first, last)[:, None], torch.arange(length)
    reach = length if window is None else window
    return as_bias((i - j < reach) & ((j <= i) if causal else (j - i < reach)))
