"""RetroMAE's decoder attention (arXiv:2205.12035): each row of a text sees its own random share of the words, never itself.

Shapes: T tokens of N texts in one row, M of them inner (with a query), H heads, E features a head, L tokens of a text.

Three implementations with one result. Fused (`attention_triton`, CUDA): visibility is hashed inside the kernels, so no mask
exists. `blockwise_attention` (CPU): the mask of one block of scores at a time, recomputed in the backward. torch's
scaled_dot_product_attention with the mask of some texts at a time, kept by autograd: on CUDA without Triton, and on the CPU
without dropout, where it is fastest. Measured there, forward and backward, one thread, 12 heads of 32 features: 16 texts of 512
tokens 0.49 s (blockwise 0.63 s), 64 of 100 tokens 0.11 s (0.13 s); with dropout 0.1, 2.0 s (0.81 s) and 0.26 s (0.14 s).

FlexAttention could take the same hash as its `mask_mod`; not measured. A random mask leaves no block of scores empty, so its
block mask would skip nothing but other texts; it has no dropout, the block mask is rebuilt for each batch,
and a row of another length recompiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bge_ds.kernels import masks
from bge_ds.kernels.cpu.blockwise_attention import ScoreBlock, as_bias, blockwise_attention
from bge_ds.kernels.packed import LengthRun
from bge_ds.kernels.triton_support import interpreted, is_gpu, triton_obstacle

KERNELS = ("auto", "torch", "fused")
# Scores (texts x L x L) of one call of torch's attention at most, which bounds its memory.
_CALL_ELEMENTS = 1 << 22
# Mask elements (L x L a text, 5 bytes each) that the CPU keeps for the backward at most; beyond it, blockwise attention.
_CPU_MASKS = 1 << 24


def decoder_attention_backend(kernels: str, device_type: str) -> str:
    """Returns "fused" or "torch"; ValueError where the request cannot be met."""
    if kernels not in KERNELS:
        raise ValueError(f"--kernels {kernels}: unknown; it is one of {', '.join(KERNELS)}")
    if kernels == "torch" or (kernels == "auto" and not is_gpu(device_type)):
        return "torch"
    reason = triton_obstacle(device_type)
    if reason and kernels == "fused":
        raise ValueError(
            "--kernels fused: RetroMAE's fused decoder attention needs a CUDA device and the triton package; "
            f"{reason}; use auto or torch"
        )
    return "torch" if reason else "fused"


def _fused_supports(q_MHE: torch.Tensor, kernels: str) -> bool:
    from bge_ds.kernels.attention_triton import DTYPES, MAX_HEAD_DIM

    if interpreted() and q_MHE.dtype == torch.bfloat16:
        raise ValueError("--kernels fused: Triton's interpreter cannot multiply bfloat16; use torch, or float32 or float16")
    if q_MHE.dtype in DTYPES and q_MHE.shape[-1] <= MAX_HEAD_DIM:
        return True
    if kernels == "auto":
        return False
    dtype, *supported = (str(d).removeprefix("torch.") for d in (q_MHE.dtype, *DTYPES))
    raise ValueError(
        f"--kernels fused: the decoder's attention is {dtype} with {q_MHE.shape[-1]} features a head; "
        f"the fused kernels take {', '.join(supported)} and at most {MAX_HEAD_DIM}; use auto or torch"
    )


def decoder_attention(
    q_MHE: torch.Tensor, k_THE: torch.Tensor, v_THE: torch.Tensor, words_T: torch.Tensor, key_N: torch.Tensor,
    cu_seqlens: torch.Tensor, runs: list[LengthRun], *,
    share: float, scale: float | None = None, dropout: float = 0.0, kernels: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Softmax attention of each text's inner tokens on its tokens visible by `masks.decoder_visible`: M x H x E.

    Inner tokens: all but a text's first and last; a text of one or two tokens has none. words_T, key_N: as in `PretrainBatch`.
    cu_seqlens: int32 of N + 1. runs: (texts, length) of neighbouring texts, in row order, by length. share: of the words
    hidden from a row. dropout: of the weights. No double backward.
    """
    scale = q_MHE.shape[-1] ** -0.5 if scale is None else scale
    if decoder_attention_backend(kernels, q_MHE.device.type) == "fused" and _fused_supports(q_MHE, kernels):
        from bge_ds.kernels.attention_triton import Visibility, fused_attention

        longest = max((length for _, length in runs), default=0)
        return fused_attention(
            q_MHE, k_THE, v_THE, cu_seqlens, longest, visibility=Visibility(decoder_share=share), scale=scale, p=dropout,
            words_T=words_T, key_N=key_N,
        )  # fmt: skip
    kept = sum(texts * length * length for texts, length in runs)
    if q_MHE.device.type == "cpu" and (dropout > 0 or kept > _CPU_MASKS):
        bias = _bias(words_T, key_N, share)
        return blockwise_attention(q_MHE, k_THE, v_THE, runs, scale=scale, p=dropout, edge=1, bias=bias)
    return _with_masks(q_MHE, k_THE, v_THE, words_T, key_N, runs, share, scale, dropout)


def _bias(words_T: torch.Tensor, key_N: torch.Tensor, share: float):
    def bias(block: ScoreBlock) -> torch.Tensor:
        keys = key_N[block.first : block.first + block.texts]
        words_NL = words_T[block.keys].unflatten(0, (block.texts, -1))
        # Rows of a block count from the first query, which is the text's second token.
        return as_bias(masks.decoder_visible(keys, words_NL, share, block.rows.start + 1, block.rows.stop + 1))[:, None]

    return bias


def _with_masks(q, k, v, words_T, key_N, runs, share, scale, dropout) -> torch.Tensor:
    rows = [q[:0] + k[:0] + v[:0]]  # where no text has inner tokens: empty, but connected to q, k and v
    # One split per tensor, not one slice per run: the backward of a split is a single concatenation.
    pieces = zip(
        q.split([n * max(0, length - 2) for n, length in runs]),
        *(x.split([n * length for n, length in runs]) for x in (k, v, words_T)),
        key_N.split([n for n, _ in runs]),
        runs,
        strict=True,
    )
    for *qkv, words, keys, (texts, length) in pieces:
        if length <= 2:
            continue
        qkv = (x.unflatten(0, (texts, -1)).transpose(1, 2) for x in qkv)
        step = max(1, _CALL_ELEMENTS // (length * length))
        parts = zip(*(x.split(step) for x in (*qkv, words.unflatten(0, (texts, -1)), keys)), strict=True)
        for *qkv_part, words_NL, keys_N in parts:
            visible = masks.decoder_visible(keys_N, words_NL, share, 1, length - 1)[:, None]
            y = F.scaled_dot_product_attention(*qkv_part, attn_mask=visible, dropout_p=dropout, scale=scale)
            rows.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(rows)
