"""The masks of `masks`, and dropout's, inside Triton kernels: the same arithmetic, on unsigned integers."""

from __future__ import annotations

import triton
import triton.language as tl

from bge_ds.kernels import masks

# The constants of `masks`, unsigned: what a kernel reads of its module must be a constexpr.
_PRIME = tl.constexpr(masks._PRIME & 0xFFFFFFFF)
_MUL_1, _MUL_2 = tl.constexpr(masks._MUL_1 & 0xFFFFFFFF), tl.constexpr(masks._MUL_2 & 0xFFFFFFFF)
_DECODER_MARK = tl.constexpr((masks._DECODER + 1) * masks._PRIME & 0xFFFFFFFF)


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * _MUL_1
    x = (x ^ (x >> 15)) * _MUL_2
    return x ^ (x >> 16)


@triton.jit
def mark(value):
    return value.to(tl.uint32) * _PRIME + _PRIME


@triton.jit
def row_state(key, rows):
    """`masks.hash_words(key, _DECODER, rows)`."""
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    return mix(mix(mix(mix(low) + high) ^ _DECODER_MARK) ^ mark(rows))


@triton.jit
def hash_at_least(hashes, THRESHOLD: tl.constexpr):
    return (hashes & 0x7FFFFFFF) >= THRESHOLD


@triton.jit
def dropout_state(seed, head, rows):
    """A hash for each row of the batch and head; the rows are counted over all texts."""
    return mix(mix(seed.to(tl.uint32) ^ mark(head)) ^ mark(rows))


@triton.jit
def kept(state, keys, DROPPED: tl.constexpr):
    return hash_at_least(mix(state ^ mark(keys)), DROPPED)
