"""Attention within each text of a packed row.

Shapes: T tokens of N texts in one row, H heads, D features a head.

Three backends with one result. On a GPU, always one call for the whole row:

flash   FlashAttention (arXiv:2307.08691) as shipped with torch, over cumulative lengths: 16-bit types, with dropout, windows,
        grouped heads. Its gradients are summed in no fixed order, unless torch is set deterministic (`--full_determinism`).
fused   our Triton kernels (`attention_triton`), for fp32; deterministic.
runs    scaled_dot_product_attention once for each run of texts of equal length. The row is sorted by length, so a run is a
        view: nothing is padded or copied. For the CPU; on a GPU it is hundreds of small calls, and the run's summary warns.
        Merging neighbouring lengths into one padded call was slower on a CPU: copying and masking cost more than a call.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import torch.nn.functional as F

from bge_ds.kernels.cpu.blockwise_attention import ScoreBlock, as_bias, blockwise_attention
from bge_ds.kernels.packed import LengthRun
from bge_ds.kernels.triton_support import is_gpu, triton_obstacle

BACKENDS = {
    "flash": "FlashAttention, one call a layer",
    "fused": "fused attention, one call a layer",
    "runs": "attention text length by text length",
}
_LARGEST_HEAD = 256
# Queries per call in windowed attention: each block loads only the keys within its window.
_WINDOW_BLOCK = 256


def attention_backend(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """One of BACKENDS."""
    if not is_gpu(device_type) or head_dim > _LARGEST_HEAD:
        return "runs"
    if dtype in (torch.bfloat16, torch.float16) and _has_flash(device_type):
        return "flash"
    return "runs" if triton_obstacle(device_type) or dtype == torch.float64 else "fused"


@cache
def _has_flash(device_type: str) -> bool:
    return device_type == "meta" or torch.cuda.get_device_capability() >= (8, 0)


def why_slow(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a GPU falls back to "runs", in words; None where it does not, and on a CPU."""
    if not is_gpu(device_type) or attention_backend(device_type, dtype, head_dim) != "runs":
        return None
    return triton_obstacle(device_type) or f"heads of {head_dim} features in {str(dtype).removeprefix('torch.')} have no kernel"


def varlen_attention(
    q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, cu_seqlens: torch.Tensor, runs: list[LengthRun], *,
    scale: float, dropout: float = 0.0, causal: bool = False, window: int | None = None, backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Softmax self-attention of each text, T x H x D.

    cu_seqlens: int32 of N + 1. runs: (texts, length) of neighbouring texts, in row order, covering the N texts.
    Keys may have fewer heads than queries (grouped-query attention). window: token i sees token j only where
    |i - j| < window; with causal, where 0 <= i - j < window. backend: overrides the choice, for tests.
    """
    if window is not None and window < 1:
        raise ValueError(f"attention window {window} lets a token see nothing; it is 1 or more, or None for no window")
    backend = backend or attention_backend(q_THD.device.type, q_THD.dtype, q_THD.shape[-1])
    longest = max((length for _, length in runs), default=0)
    if backend == "flash":
        return _flash(q_THD, k_THD, v_THD, cu_seqlens, longest, scale, dropout, causal, window)
    if backend == "fused":
        from bge_ds.kernels.attention_triton import Visibility, fused_attention

        visibility = Visibility(causal=causal, window=window if window is not None and window < longest else None)
        return fused_attention(q_THD, k_THD, v_THD, cu_seqlens, longest, visibility=visibility, scale=scale, p=dropout)
    grouped = q_THD.shape[1] != k_THD.shape[1]
    if dropout > 0 and q_THD.device.type == "cpu" and not grouped:
        return blockwise_attention(q_THD, k_THD, v_THD, runs, scale=scale, p=dropout, bias=_bias(causal, window))
    # One split per tensor, not one slice per run: the backward of a split is a single concatenation.
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


def _flash(q, k, v, cu_seqlens, longest: int, scale: float, dropout: float, causal: bool, window: int | None):
    """torch's FlashAttention over cumulative lengths. Heads are zero-padded to a multiple of 8 features, as it requires."""
    head_dim = q.shape[-1]
    if head_dim % 8:
        q, k, v = (F.pad(x, (0, -head_dim % 8)) for x in (q, k, v))
    # The number of visible tokens to the left and to the right; -1 for all.
    reach = -1 if window is None else window - 1
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout, causal, False, scale=scale,
        window_size_left=reach, window_size_right=0 if causal else reach,
    )[0]  # fmt: skip
    return out[..., :head_dim]


def _windowed(q, k, v, window: int, causal: bool, options: dict) -> torch.Tensor:
    """Attention of texts longer than the window, N x H x L x D, one block of queries at a time.

    Work and memory are linear in L: all blocks share one mask, of which those at the ends of a text take a part.
    """
    length, before, after = q.shape[2], window - 1, 0 if causal else window - 1
    mask = _band(window, before, after, q.device)
    out = []
    for start in range(0, length, _WINDOW_BLOCK):
        end = min(start + _WINDOW_BLOCK, length)
        first, last = max(start - before, 0), min(end + after, length)
        # Column 0 of the mask is the key `before` places left of the block's first query.
        part = mask[: end - start, first - start + before : last - start + before]
        q_block, k_part, v_part = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
        out.append(F.scaled_dot_product_attention(q_block, k_part, v_part, attn_mask=part, **options))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


@lru_cache(maxsize=8)
def _band(window: int, before: int, after: int, device: torch.device) -> torch.Tensor:
    """True where query i of a block sees key j; keys run from `before` left of the block to `after` right of it."""
    i = torch.arange(_WINDOW_BLOCK, device=device)[:, None]
    j = torch.arange(-before, _WINDOW_BLOCK + after, device=device)
    return (i - j < window) & (j - i <= after)


def _bias(causal: bool, window: int | None):
    """What `blockwise_attention` adds to a block's scores."""

    def bias(block: ScoreBlock) -> torch.Tensor | None:
        if not causal and (window is None or window >= block.length):
            return None
        return _block_bias(block.length, block.rows.start, block.rows.stop, causal, window)

    return bias


# A small cache: an entry is as large as a block of scores, and neighbouring blocks have one length.
@lru_cache(maxsize=8)
def _block_bias(length: int, first: int, last: int, causal: bool, window: int | None) -> torch.Tensor:
    i, j = torch.arange(first, last)[:, None], torch.arange(length)
    reach = length if window is None else window
    return as_bias((i - j < reach) & ((j <= i) if causal else (j - i < reach)))
