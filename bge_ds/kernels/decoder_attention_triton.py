"""RetroMAE's decoder attention in Triton: no mask of L x L, no scores, one pass forward and two backward.

Shapes: T tokens of N texts in one row, M of them inner (with a query), H heads, E features a head.

Flash attention's method: a program takes a block of one text's rows (of its keys in `_backward_keys`), walks over the
blocks on the other side, and holds a running maximum and sum, so that a score lives in registers only. What a row sees is
hashed on the spot from the text's key, the row and each key's word, by the arithmetic of `masks` on unsigned integers; so
is attention dropout, from a seed, the head, the row and the key. The backward computes both again: kept are q, k, v,
the output, one number a row and head, and the seed. No atomic additions: the result is the same each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bge_ds.kernels import masks

# The constants of `masks`, unsigned: what a kernel reads of its module must be a constexpr.
_PRIME = tl.constexpr(masks._PRIME & 0xFFFFFFFF)
_MUL_1, _MUL_2 = tl.constexpr(masks._MUL_1 & 0xFFFFFFFF), tl.constexpr(masks._MUL_2 & 0xFFFFFFFF)
_DECODER_MARK = tl.constexpr((masks._DECODER + 1) * masks._PRIME & 0xFFFFFFFF)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
# Bytes of a tile of q, k, v or their gradients: the key pass holds four, and shared memory is 99 KiB on small GPUs.
_TILE_BYTES = 1 << 13
_LOG2_E = 1.4426950408889634


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MUL_1
    x = (x ^ (x >> 15)) * _MUL_2
    return x ^ (x >> 16)


@triton.jit
def _mark(value):
    return value.to(tl.uint32) * _PRIME + _PRIME


@triton.jit
def _row_state(key, rows):
    """`masks.hash_words(key, _DECODER, rows)`."""
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    return _mix(_mix(_mix(_mix(low) + high) ^ _DECODER_MARK) ^ _mark(rows))


@triton.jit
def _at_least(hashes, THRESHOLD: tl.constexpr):
    return (hashes & 0x7FFFFFFF) >= THRESHOLD


@triton.jit
def _visible(state, rows, words, keys, last, HIDDEN: tl.constexpr):
    """What `masks.decoder_visible` says of rows and keys, shaped to broadcast; no row sees what lies behind the text."""
    seen = _at_least(_mix(state ^ _mark(words)), HIDDEN) | (keys == 0) | (keys == last)
    return seen & (rows != keys) & (keys <= last)


@triton.jit
def _dropout_state(seed, head, rows):
    """A hash for each row of the batch and head; the rows are counted over all texts."""
    return _mix(_mix(seed.to(tl.uint32) ^ _mark(head)) ^ _mark(rows))


@triton.jit
def _kept(state, keys, DROPPED: tl.constexpr):
    return _at_least(_mix(state ^ _mark(keys)), DROPPED)


@triton.jit
def _tile(base, rows, limit, row_stride, column_stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows x BLOCK_E from `base`, 0 outside."""
    columns = tl.arange(0, BLOCK_E)
    places = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride
    return tl.load(places, mask=(rows[:, None] < limit) & (columns[None, :] < E), other=0.0)


@triton.jit
def _put(base, rows, limit, values, row_stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    columns = tl.arange(0, BLOCK_E)
    places = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=(rows[:, None] < limit) & (columns[None, :] < E))


@triton.jit(do_not_specialize=["seed", "queries_all"])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, words_ptr, key_ptr, starts_ptr, query_starts_ptr,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    queries_all, scale_log2, seed,
    HEADS: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HIDDEN: tl.constexpr, DROPPED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    text, head = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts_ptr + text).to(tl.int64)
    length = tl.load(starts_ptr + text + 1).to(tl.int32) - start.to(tl.int32)
    if tl.program_id(0) * BLOCK_Q >= length - 2:
        return
    query_start = tl.load(query_starts_ptr + text).to(tl.int64)
    queries = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows = queries + 1
    state = _row_state(tl.load(key_ptr + text), rows)
    drop_state = _dropout_state(seed, head, query_start + queries)
    q = _tile(q_ptr + query_start * q_row + head * q_head, queries, length - 2, q_row, q_column, E, BLOCK_E)
    k_base, v_base = k_ptr + start * k_row + head * k_head, v_ptr + start * v_row + head * v_head

    # Position 0 is in the first block and every row sees it: the maximum is finite from there on.
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    for begin in range(0, length, BLOCK_K):
        keys = begin + tl.arange(0, BLOCK_K)
        k = _tile(k_base, keys, length, k_row, k_column, E, BLOCK_E)
        v = _tile(v_base, keys, length, v_row, v_column, E, BLOCK_E)
        words = tl.load(words_ptr + start + keys, mask=keys < length, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        visible = _visible(state[:, None], rows[:, None], words[None, :], keys[None, :], length - 1, HIDDEN)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        if DROPPED > 0:
            weights = tl.where(_kept(drop_state[:, None], keys[None, :], DROPPED), weights, 0.0)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        highest = higher
    out = out / (total * KEEP)[:, None]
    _put(out_ptr + (query_start * HEADS + head) * E, queries, length - 2, out, HEADS * E, E, BLOCK_E)
    tl.store(
        lse_ptr + head.to(tl.int64) * queries_all + query_start + queries,
        highest + tl.log2(total),
        mask=queries < length - 2,
    )


@triton.jit(do_not_specialize=["seed", "queries_all"])
def _backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, words_ptr, key_ptr, starts_ptr, query_starts_ptr,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    queries_all, scale_log2, seed,
    grad_ptr, g_row, g_head, g_column, dq_ptr, delta_ptr, scale,
    HEADS: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HIDDEN: tl.constexpr, DROPPED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and what `_backward_keys` needs of each row: delta, the sum over keys of weight times its gradient."""
    text, head = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts_ptr + text).to(tl.int64)
    length = tl.load(starts_ptr + text + 1).to(tl.int32) - start.to(tl.int32)
    if tl.program_id(0) * BLOCK_Q >= length - 2:
        return
    query_start = tl.load(query_starts_ptr + text).to(tl.int64)
    queries = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = queries < length - 2
    rows = queries + 1
    state = _row_state(tl.load(key_ptr + text), rows)
    drop_state = _dropout_state(seed, head, query_start + queries)
    q = _tile(q_ptr + query_start * q_row + head * q_head, queries, length - 2, q_row, q_column, E, BLOCK_E)
    grad = _tile(grad_ptr + query_start * g_row + head * g_head, queries, length - 2, g_row, g_column, E, BLOCK_E)
    out = _tile(out_ptr + (query_start * HEADS + head) * E, queries, length - 2, HEADS * E, 1, E, BLOCK_E)
    of_row = head.to(tl.int64) * queries_all + query_start + queries
    lse = tl.load(lse_ptr + of_row, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + of_row, delta, mask=inside)
    k_base, v_base = k_ptr + start * k_row + head * k_head, v_ptr + start * v_row + head * v_head

    dq = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    for begin in range(0, length, BLOCK_K):
        keys = begin + tl.arange(0, BLOCK_K)
        k = _tile(k_base, keys, length, k_row, k_column, E, BLOCK_E)
        v = _tile(v_base, keys, length, v_row, v_column, E, BLOCK_E)
        words = tl.load(words_ptr + start + keys, mask=keys < length, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        visible = _visible(state[:, None], rows[:, None], words[None, :], keys[None, :], length - 1, HIDDEN)
        weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
        d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPPED > 0:
            d_weights = tl.where(_kept(drop_state[:, None], keys[None, :], DROPPED), d_weights / KEEP, 0.0)
        d_scores = weights * (d_weights - delta[:, None])
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    _put(dq_ptr + (query_start * HEADS + head) * E, queries, length - 2, dq * scale, HEADS * E, E, BLOCK_E)


@triton.jit(do_not_specialize=["seed", "queries_all"])
def _backward_keys(
    q_ptr, k_ptr, v_ptr, lse_ptr, words_ptr, key_ptr, starts_ptr, query_starts_ptr,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    queries_all, scale_log2, seed,
    grad_ptr, g_row, g_head, g_column, dk_ptr, dv_ptr, delta_ptr, scale,
    HEADS: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HIDDEN: tl.constexpr, DROPPED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over all rows of the text; zeros where it has none."""
    text, head = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts_ptr + text).to(tl.int64)
    length = tl.load(starts_ptr + text + 1).to(tl.int32) - start.to(tl.int32)
    if tl.program_id(0) * BLOCK_K >= length:
        return
    query_start = tl.load(query_starts_ptr + text).to(tl.int64)
    key = tl.load(key_ptr + text)
    keys = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    words = tl.load(words_ptr + start + keys, mask=keys < length, other=0)
    k = _tile(k_ptr + start * k_row + head * k_head, keys, length, k_row, k_column, E, BLOCK_E)
    v = _tile(v_ptr + start * v_row + head * v_head, keys, length, v_row, v_column, E, BLOCK_E)
    q_base, g_base = q_ptr + query_start * q_row + head * q_head, grad_ptr + query_start * g_row + head * g_head

    dk = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for begin in range(0, length - 2, BLOCK_Q):
        queries = begin + tl.arange(0, BLOCK_Q)
        rows = queries + 1
        q = _tile(q_base, queries, length - 2, q_row, q_column, E, BLOCK_E)
        grad = _tile(g_base, queries, length - 2, g_row, g_column, E, BLOCK_E)
        of_row = head.to(tl.int64) * queries_all + query_start + queries
        lse = tl.load(lse_ptr + of_row, mask=queries < length - 2, other=0.0)
        delta = tl.load(delta_ptr + of_row, mask=queries < length - 2, other=0.0)
        # Keys x rows: so both sums over rows are plain products, without turning a block of scores.
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
        state = _row_state(key, rows)
        visible = _visible(state[None, :], rows[None, :], words[:, None], keys[:, None], length - 1, HIDDEN)
        # Rows behind the text have q, grad and delta 0: whatever their weights, they add nothing.
        weights = tl.where(visible, tl.exp2(scores - lse[None, :]), 0.0)
        d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        dropped = weights
        if DROPPED > 0:
            drop_state = _dropout_state(seed, head, query_start + queries)
            kept = _kept(drop_state[None, :], keys[:, None], DROPPED)
            dropped = tl.where(kept, weights / KEEP, 0.0)
            d_weights = tl.where(kept, d_weights / KEEP, 0.0)
        d_scores = weights * (d_weights - delta[None, :])
        dv = tl.dot(dropped.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    _put(dk_ptr + (start * HEADS + head) * E, keys, length, dk * scale, HEADS * E, E, BLOCK_E)
    _put(dv_ptr + (start * HEADS + head) * E, keys, length, dv, HEADS * E, E, BLOCK_E)


def constants(heads: int, head_dim: int, dtype: torch.dtype, share: float, p: float) -> dict:
    """What the kernels are compiled for."""
    width = max(16, triton.next_power_of_2(head_dim))
    # fp32 products run without tensor cores, operands in registers: larger blocks spill them.
    block = max(16, min(32 if dtype == torch.float32 else 64, _TILE_BYTES // (width * dtype.itemsize)))
    dropped = masks.threshold(p)
    return {
        "HEADS": heads, "E": head_dim, "BLOCK_E": width, "BLOCK_Q": block, "BLOCK_K": block,
        "HIDDEN": masks.threshold(share), "DROPPED": dropped, "KEEP": 1 - dropped / (1 << 31),
        # Products of fp32 inputs in fp32, not in TF32; a setting without effect on 16 bits.
        "PRECISION": "ieee",
    }  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, words_T, key_N, starts_N1, longest: int, share: float, scale: float, p: float):
        # 31 bits: an argument that stays in an int32, so that no seed compiles the kernels again.
        seed = int(torch.randint(1 << 31, ())) if p > 0 else 0
        query_starts_N = (starts_N1.diff() - 2).clamp_(min=0).cumsum(0)
        query_starts_N = torch.nn.functional.pad(query_starts_N, (1, 0))[:-1]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_HM = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        places = words_T.contiguous(), key_N.contiguous(), starts_N1, query_starts_N
        ctx.settings = constants(q.shape[1], q.shape[2], q.dtype, share, p), longest, scale, seed
        ctx.save_for_backward(q, k, v, out, lse_HM, *places)
        _Attention._launch(ctx, _forward, "BLOCK_Q", longest - 2, (q, k, v, out, lse_HM, *places), ())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse_HM, *places = ctx.saved_tensors
        _, longest, scale, _ = ctx.settings
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        delta_HM = torch.empty_like(lse_HM)
        g = grad, *grad.stride()
        # In this order: the first writes delta, the second reads it.
        inputs = q, k, v, out, lse_HM, *places
        _Attention._launch(ctx, _backward_queries, "BLOCK_Q", longest - 2, inputs, (*g, dq, delta_HM, scale))
        inputs = q, k, v, lse_HM, *places
        _Attention._launch(ctx, _backward_keys, "BLOCK_K", longest, inputs, (*g, dk, dv, delta_HM, scale))
        return dq, dk, dv, *(None,) * 7

    @staticmethod
    def _launch(ctx, kernel, block: str, longest: int, tensors, more) -> None:
        sizes, _, scale, seed = ctx.settings
        q, k, v = tensors[:3]
        grid = triton.cdiv(max(longest, 0), sizes[block]), tensors[-2].shape[0] - 1, sizes["HEADS"]
        if 0 in grid:
            return
        strides = (*q.stride(), *k.stride(), *v.stride())
        with torch.cuda.device_of(q):
            kernel[grid](*tensors, *strides, q.shape[0], scale * _LOG2_E, seed, *more, **sizes)


def fused_decoder_attention(q_MHE, k_THE, v_THE, words_T, key_N, cu_seqlens, longest, *, share, scale, p) -> torch.Tensor:
    """As `decoder_attention.decoder_attention`; longest: tokens of the longest text."""
    return _Attention.apply(q_MHE, k_THE, v_THE, words_T, key_N, cu_seqlens, longest, share, scale, p)
