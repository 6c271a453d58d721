"""Attention within each text of a packed row, in Triton: no mask or L x L scores in memory; one kernel forward, two backward.

Shapes: T tokens of N texts in one row, M queries, H heads of queries, K heads of keys, E features a head.

FlashAttention-2 (arXiv:2307.08691): a program holds a block of one text's queries (of its keys in `_backward_keys`), loops over
the visible blocks of the other side, and keeps a running maximum and sum, so scores live in registers only. The backward
recomputes them from q, k, v, the output and one log-sum-exp per row and head. Visibility is computed on the spot: RetroMAE's
decoder hashes it from the text's key, the row and each key's word, as `masks` does on signed integers; otherwise a row sees the
whole text, the tokens before it, or a window. Dropout is hashed too, from a seed, the head, the row and the key. There are no
atomic additions, so results are deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bge_ds.kernels import masks
from bge_ds.kernels.masks_triton import dropout_state, hash_at_least, kept, mark, mix, row_state
from bge_ds.kernels.triton_support import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
_LOG2_E = 1.4426950408889634


@triton.jit
def _visible(state, marks, rows, keys, last, DECODER: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr,
             WINDOW: tl.constexpr):  # fmt: skip
    """Which keys the rows see, to broadcast; nothing behind the text. state, marks: a decoder's row and word hashes."""
    seen = keys <= last
    if DECODER:
        shown = hash_at_least(mix(state ^ marks), HIDDEN) | (keys == 0) | (keys == last)
        seen = seen & shown & (rows != keys)
    elif CAUSAL:
        seen = seen & (keys <= rows)
    if WINDOW > 0:
        seen = seen & (rows - keys < WINDOW) & (keys - rows < WINDOW)
    return seen


@triton.jit
def _load_tile(base, rows, limit, row_stride, column_stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load rows x BLOCK_E from `base`, 0 outside."""
    columns = tl.arange(0, BLOCK_E)
    places = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride
    if E == BLOCK_E:
        return tl.load(places, mask=rows[:, None] < limit, other=0.0)
    return tl.load(places, mask=(rows[:, None] < limit) & (columns[None, :] < E), other=0.0)


@triton.jit
def _store_tile(base, rows, limit, values, row_stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    columns = tl.arange(0, BLOCK_E)
    places = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=(rows[:, None] < limit) & (columns[None, :] < E))


@triton.jit
def _visible_range(first, last, length, AHEAD: tl.constexpr, BEHIND: tl.constexpr, WINDOW: tl.constexpr):
    """(begin, end) of the positions on the other side that can be visible together with positions first to last - 1.

    AHEAD, BEHIND: whether positions after, and before, one are visible. WINDOW: 0 for none.
    """
    begin, end = first * 0, length
    if WINDOW > 0:
        begin, end = tl.maximum(first - (WINDOW - 1), 0), tl.minimum(last + (WINDOW - 1), length)
    if not BEHIND:
        begin = first
    if not AHEAD:
        end = tl.minimum(last, length)
    return begin, end


@triton.jit
def _load_text(starts_ptr, query_starts_ptr, key_ptr, text, DECODER: tl.constexpr):
    """A text's first token, length, first query, number of queries (none for a decoder's first and last token), mask key."""
    start = tl.load(starts_ptr + text).to(tl.int64)
    length = tl.load(starts_ptr + text + 1).to(tl.int32) - start.to(tl.int32)
    inner, key = length, start
    if DECODER:
        inner, key = length - 2, tl.load(key_ptr + text)
    return start, length, tl.load(query_starts_ptr + text).to(tl.int64), inner, key


@triton.jit
def _row_states(key, rows, DECODER: tl.constexpr):
    """Row hashes of a decoder; otherwise unused."""
    states = rows.to(tl.uint32)
    if DECODER:
        states = row_state(key, rows)
    return states


@triton.jit
def _word_marks(words_ptr, start, keys, length, DECODER: tl.constexpr):
    """Word hashes of the keys, for a decoder; otherwise unused."""
    marks = keys.to(tl.uint32)
    if DECODER:
        marks = mark(tl.load(words_ptr + start + keys, mask=keys < length, other=0))
    return marks


@triton.jit
def _score_block(
    q, state, rows, begin, start, length, head, k_ptr, v_ptr, words_ptr, k_row, k_head, k_column, v_row, v_head, v_column,
    scale_log2, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, DECODER: tl.constexpr, HIDDEN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a block of keys: (their positions, k, v, scores of the rows, visibility)."""
    keys = begin + tl.arange(0, BLOCK_K)
    k = _load_tile(k_ptr + start * k_row + head * k_head, keys, length, k_row, k_column, E, BLOCK_E)
    v = _load_tile(v_ptr + start * v_row + head * v_head, keys, length, v_row, v_column, E, BLOCK_E)
    marks = _word_marks(words_ptr, start, keys, length, DECODER)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    visible = _visible(
        state[:, None], marks[None, :], rows[:, None], keys[None, :], length - 1, DECODER, HIDDEN, CAUSAL, WINDOW
    )
    return keys, k, v, scores, visible


@triton.jit(do_not_specialize=["seed", "queries_all"])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, words_ptr, key_ptr, starts_ptr, query_starts_ptr,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    queries_all, scale_log2, seed,
    HEADS: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, DECODER: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DROPPED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    EDGE: tl.constexpr = 1 if DECODER else 0
    text, head = tl.program_id(1), tl.program_id(2)
    start, length, query_start, inner, key = _load_text(starts_ptr, query_starts_ptr, key_ptr, text, DECODER)
    first = tl.program_id(0) * BLOCK_Q
    if first >= inner:
        return
    queries = first + tl.arange(0, BLOCK_Q)
    rows = queries + EDGE
    state = _row_states(key, rows, DECODER)
    drop_state = dropout_state(seed, head, query_start + queries)
    q = _load_tile(q_ptr + query_start * q_row + head * q_head, queries, inner, q_row, q_column, E, BLOCK_E)

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    begin_at, end = _visible_range(first, first + BLOCK_Q, length, not CAUSAL, True, WINDOW)
    for begin in range(begin_at, end, BLOCK_K):
        keys, _, v, scores, visible = _score_block(
            q, state, rows, begin, start, length, head // GROUP, k_ptr, v_ptr, words_ptr, k_row, k_head, k_column, v_row,
            v_head, v_column, scale_log2, E, BLOCK_E, BLOCK_K, DECODER, HIDDEN, CAUSAL, WINDOW, PRECISION,
        )  # fmt: skip
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # With a window, a row may see no key of the first blocks, which only its neighbours reach; else the maximum is finite.
        reference = tl.where(higher == float("-inf"), 0.0, higher) if WINDOW > 0 else higher
        weights = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(weights, 1)
        if DROPPED > 0:
            weights = tl.where(kept(drop_state[:, None], keys[None, :], DROPPED), weights, 0.0)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        highest = higher
    if WINDOW > 0:
        total = tl.where(total > 0, total, 1.0)  # rows behind the text see nothing and are not stored
    out = out / (total * KEEP)[:, None]
    _store_tile(out_ptr + (query_start * HEADS + head) * E, queries, inner, out, HEADS * E, E, BLOCK_E)
    tl.store(lse_ptr + head.to(tl.int64) * queries_all + query_start + queries, highest + tl.log2(total), mask=queries < inner)


@triton.jit(do_not_specialize=["seed", "queries_all"])
def _backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, words_ptr, key_ptr, starts_ptr, query_starts_ptr,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    queries_all, scale_log2, seed,
    grad_ptr, g_row, g_head, g_column, dq_ptr, delta_ptr, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, DECODER: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DROPPED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and for `_backward_keys` each row's delta: the sum over keys of weight times its gradient."""
    EDGE: tl.constexpr = 1 if DECODER else 0
    text, head = tl.program_id(1), tl.program_id(2)
    start, length, query_start, inner, key = _load_text(starts_ptr, query_starts_ptr, key_ptr, text, DECODER)
    first = tl.program_id(0) * BLOCK_Q
    if first >= inner:
        return
    queries = first + tl.arange(0, BLOCK_Q)
    rows = queries + EDGE
    state = _row_states(key, rows, DECODER)
    drop_state = dropout_state(seed, head, query_start + queries)
    q = _load_tile(q_ptr + query_start * q_row + head * q_head, queries, inner, q_row, q_column, E, BLOCK_E)
    grad = _load_tile(grad_ptr + query_start * g_row + head * g_head, queries, inner, g_row, g_column, E, BLOCK_E)
    out = _load_tile(out_ptr + (query_start * HEADS + head) * E, queries, inner, HEADS * E, 1, E, BLOCK_E)
    of_row = head.to(tl.int64) * queries_all + query_start + queries
    lse = tl.load(lse_ptr + of_row, mask=queries < inner, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + of_row, delta, mask=queries < inner)

    dq = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    begin_at, end = _visible_range(first, first + BLOCK_Q, length, not CAUSAL, True, WINDOW)
    for begin in range(begin_at, end, BLOCK_K):
        keys, k, v, scores, visible = _score_block(
            q, state, rows, begin, start, length, head // GROUP, k_ptr, v_ptr, words_ptr, k_row, k_head, k_column, v_row,
            v_head, v_column, scale_log2, E, BLOCK_E, BLOCK_K, DECODER, HIDDEN, CAUSAL, WINDOW, PRECISION,
        )  # fmt: skip
        weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
        d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPPED > 0:
            d_weights = tl.where(kept(drop_state[:, None], keys[None, :], DROPPED), d_weights / KEEP, 0.0)
        d_scores = weights * (d_weights - delta[:, None])
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    _store_tile(dq_ptr + (query_start * HEADS + head) * E, queries, inner, dq * scale, HEADS * E, E, BLOCK_E)


@triton.jit(do_not_specialize=["seed", "queries_all"])
def _backward_keys(
    q_ptr, k_ptr, v_ptr, lse_ptr, words_ptr, key_ptr, starts_ptr, query_starts_ptr,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    queries_all, scale_log2, seed,
    grad_ptr, g_row, g_head, g_column, dk_ptr, dv_ptr, delta_ptr, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, DECODER: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DROPPED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of one head's keys, summed over all rows and query heads that see it."""
    EDGE: tl.constexpr = 1 if DECODER else 0
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    text, key_head = tl.program_id(1), tl.program_id(2)
    start, length, query_start, inner, key = _load_text(starts_ptr, query_starts_ptr, key_ptr, text, DECODER)
    first = tl.program_id(0) * BLOCK_K
    if first >= length:
        return
    keys = first + tl.arange(0, BLOCK_K)
    marks = _word_marks(words_ptr, start, keys, length, DECODER)
    k = _load_tile(k_ptr + start * k_row + key_head * k_head, keys, length, k_row, k_column, E, BLOCK_E)
    v = _load_tile(v_ptr + start * v_row + key_head * v_head, keys, length, v_row, v_column, E, BLOCK_E)

    dk = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    begin_at, end = _visible_range(first, first + BLOCK_K, inner, True, not CAUSAL, WINDOW)
    for member in range(0, GROUP):
        head = key_head * GROUP + member
        q_base, g_base = q_ptr + query_start * q_row + head * q_head, grad_ptr + query_start * g_row + head * g_head
        for begin in range(begin_at, end, BLOCK_Q):
            queries = begin + tl.arange(0, BLOCK_Q)
            rows = queries + EDGE
            q = _load_tile(q_base, queries, inner, q_row, q_column, E, BLOCK_E)
            grad = _load_tile(g_base, queries, inner, g_row, g_column, E, BLOCK_E)
            of_row = head.to(tl.int64) * queries_all + query_start + queries
            lse = tl.load(lse_ptr + of_row, mask=queries < inner, other=0.0)
            delta = tl.load(delta_ptr + of_row, mask=queries < inner, other=0.0)
            # Keys x rows, so that both sums over rows are products without a transpose of the scores.
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
            state = _row_states(key, rows, DECODER)
            visible = _visible(
                state[None, :], marks[:, None], rows[None, :], keys[:, None], length - 1, DECODER, HIDDEN, CAUSAL, WINDOW
            )
            # Rows behind the text have q, grad and delta 0, so they add nothing.
            weights = tl.where(visible, tl.exp2(scores - lse[None, :]), 0.0)
            if DROPPED > 0:
                drop_state = dropout_state(seed, head, query_start + queries)
                keeps = kept(drop_state[None, :], keys[:, None], DROPPED)
                dropped = tl.where(keeps, weights / KEEP, 0.0)
                dv = tl.dot(dropped.to(grad.dtype), grad, dv, input_precision=PRECISION)
                d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                d_weights = tl.where(keeps, d_weights / KEEP, 0.0)
            else:
                dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
                d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            d_scores = weights * (d_weights - delta[None, :])
            dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    _store_tile(dk_ptr + (start * KEY_HEADS + key_head) * E, keys, length, dk * scale, KEY_HEADS * E, E, BLOCK_E)
    _store_tile(dv_ptr + (start * KEY_HEADS + key_head) * E, keys, length, dv, KEY_HEADS * E, E, BLOCK_E)


class Visibility(NamedTuple):
    """Which keys a row sees: by default the whole text.

    decoder_share: share of words hidden from each inner row of RetroMAE's decoder; None for other attention. causal: only
    tokens up to the row. window: only tokens nearer than this.
    """

    decoder_share: float | None = None
    causal: bool = False
    window: int | None = None


def constants(heads: int, key_heads: int, head_dim: int, dtype: torch.dtype, visibility: Visibility, p: float) -> dict:
    """Compile-time constants of the kernels, without block sizes."""
    dropped = masks.threshold(p) if p > 0 else 0
    # fp32 inputs are multiplied in fp32, or in TF32 where torch allows it; no effect on 16-bit types.
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "HEADS": heads, "GROUP": heads // key_heads, "E": head_dim, "BLOCK_E": max(16, triton.next_power_of_2(head_dim)),
        "DECODER": visibility.decoder_share is not None, "HIDDEN": masks.threshold(visibility.decoder_share or 0.0),
        "CAUSAL": visibility.causal, "WINDOW": visibility.window or 0,
        "DROPPED": dropped, "KEEP": 1 - dropped / (1 << 31), "PRECISION": "tf32" if tf32 else "ieee",
    }  # fmt: skip


# (rows, keys) of a block by (bytes an element, features a head at most): for the two kernels that hold rows, and for the one
# that holds keys. The largest tried that spill no register on compute capabilities 8.0, 9.0 and 10.0, in 99 KiB of shared
# memory (105 KiB on 10.0); 8 warps, since 4 leave too few registers for 128 rows. Not yet timed on a GPU. Found with
# `tests/ahead.py`, checked by `test_compiled_ahead.py`.
_BLOCKS = {
    (2, 64): ((128, 64), (64, 128)),
    (2, 128): ((128, 32), (32, 64)),
    (2, 256): ((64, 16), (32, 32)),
    (4, 64): ((32, 32), (32, 32)),
    (4, 128): ((16, 16), (16, 32)),
    (4, 256): ((16, 16), (16, 16)),
}


def blocks(kernel: str, head_dim: int, dtype: torch.dtype) -> dict:
    """BLOCK_Q, BLOCK_K, num_warps and num_stages of a kernel: "forward", "queries" or "keys"."""
    widest = next(width for width in (64, 128, 256) if head_dim <= width)
    rows, keys = _BLOCKS[dtype.itemsize, widest][kernel == "keys"]
    return {"BLOCK_Q": rows, "BLOCK_K": keys, "num_warps": 8, "num_stages": 2}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, words_T, key_N, starts_N1, longest: int, visibility: Visibility, scale: float, p: float):
        # From the CPU's generator, so nothing waits. 31 bits fit an int32, so that no seed recompiles the kernels.
        seed = int(torch.randint(1 << 31, ())) if p > 0 else 0
        query_starts_N = starts_N1
        if visibility.decoder_share is not None:
            inner_N = (starts_N1.diff() - 2).clamp_(min=0)
            query_starts_N = (inner_N.cumsum(0) - inner_N).int()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_HM = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        # Only a decoder's kernels load these; otherwise any pointer serves.
        words_T, key_N = (starts_N1 if x is None else x.contiguous() for x in (words_T, key_N))
        places = words_T, key_N, starts_N1, query_starts_N
        ctx.settings = constants(q.shape[1], k.shape[1], q.shape[2], q.dtype, visibility, p), longest, scale, seed
        ctx.save_for_backward(q, k, v, out, lse_HM, *places)
        _Attention._launch(ctx, "forward", _forward, (q, k, v, out, lse_HM, *places), ())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse_HM, *places = ctx.saved_tensors
        scale = ctx.settings[2]
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        delta_HM = torch.empty_like(lse_HM)
        g = grad, *grad.stride()
        # In this order: the first kernel writes delta, the second reads it.
        _Attention._launch(ctx, "queries", _backward_queries, (q, k, v, out, lse_HM, *places), (*g, dq, delta_HM, scale))
        _Attention._launch(ctx, "keys", _backward_keys, (q, k, v, lse_HM, *places), (*g, dk, dv, delta_HM, scale))
        return dq, dk, dv, *(None,) * 7

    @staticmethod
    def _launch(ctx, name: str, kernel, tensors, more) -> None:
        sizes, longest, scale, seed = ctx.settings
        q, k, v = tensors[:3]
        of_block = blocks(name, sizes["E"], q.dtype)
        over_keys = name == "keys"
        rows = longest if over_keys or not sizes["DECODER"] else max(longest - 2, 0)
        grid = (
            triton.cdiv(rows, of_block["BLOCK_K" if over_keys else "BLOCK_Q"]),
            tensors[-2].shape[0] - 1,
            sizes["HEADS"] // sizes["GROUP"] if over_keys else sizes["HEADS"],
        )
        strides = (*q.stride(), *k.stride(), *v.stride())
        launch(kernel, grid, *tensors, *strides, q.shape[0], scale * _LOG2_E, seed, *more, on=q, **sizes, **of_block)


def fused_attention(
    q_MHE, k_TKE, v_TKE, cu_seqlens, longest: int, *, visibility: Visibility, scale: float, p: float, words_T=None, key_N=None
) -> torch.Tensor:
    """Attention of each text's queries on its own tokens, M x H x E. M is T; for a decoder, the number of inner tokens.

    cu_seqlens: int32 of N + 1. longest: at least the longest text's tokens. p: dropout of the weights. words_T, key_N: as in
    `PretrainBatch`, for a decoder. The number of query heads is a multiple of that of key heads.
    """
    return _Attention.apply(q_MHE, k_TKE, v_TKE, words_T, key_N, cu_seqlens, longest, visibility, scale, p)
