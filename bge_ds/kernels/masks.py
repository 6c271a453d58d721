"""RetroMAE's masks as pure functions of a text's key, computed where they are used.

A text's key is 64 bits hashed from (seed, epoch, row). Each decision hashes the key with its subject (a word, a decoder row and
a word, a position) and compares the result with a probability. So masks are the same on every device and for every number of
ranks, need no storage, and can be computed inside an attention kernel. Words are masked independently of each other, all tokens
of a word together. (RetroMAE's own trainer masks a fixed number of words; the expected share is the same.)

Arithmetic is on int32 with wrap-around, which is the same in torch on CPU and GPU, and in Triton.
"""

from __future__ import annotations

import torch

# Subjects of a hash, distinct so that no two decisions share their randomness.
_ENCODER, _ACTION, _REPLACEMENT, _DECODER = 1, 2, 3, 4


def _int32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


_PRIME, _MUL_1, _MUL_2 = _int32(0x9E3779B1), _int32(0x7FEB352D), _int32(0x846CA68B)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of int32 that mixes all bits (the finaliser of Wellons' lowbias32)."""
    # In place on two tensors: on the CPU, temporaries of a decoder's block cost more than the arithmetic.
    shifted = (x >> 16).bitwise_and_(0xFFFF)
    x = (x ^ shifted).mul_(_MUL_1)
    torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF)
    x.bitwise_xor_(shifted).mul_(_MUL_2)
    torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF)
    return x.bitwise_xor_(shifted)


def _mark(value: torch.Tensor) -> torch.Tensor:
    """int32: (value + 1) * prime, wrapping."""
    return value.to(torch.int32) * _PRIME + _PRIME


def hash_words(key_: torch.Tensor, *values: torch.Tensor | int) -> torch.Tensor:
    """int32 hash of a 64-bit key (int64 tensor) with integers; shapes broadcast."""
    high, low = (key_ >> 32).to(torch.int32), key_.to(torch.int32)
    state = _mix(_mix(low) + high)
    for value in values:
        if isinstance(value, int):
            state = _mix(state ^ _int32((value + 1) * 0x9E3779B1 & 0xFFFFFFFF))
        else:
            state = _mix(state ^ _mark(value))
    return state


def threshold(share: float) -> int:
    """31 random bits are below this with probability `share`; capped to int32, so that a share of 1 does not wrap."""
    return min(round(share * (1 << 31)), (1 << 31) - 1)


def _below(hash_: torch.Tensor, share: float) -> torch.Tensor:
    return (hash_ & 0x7FFFFFFF) < threshold(share)


def encoder_masked(key_T: torch.Tensor, words_T: torch.Tensor, inner_T: torch.Tensor, share: float) -> torch.Tensor:
    """bool T: the tokens of masked words, which the encoder must predict; only `inner_T` tokens (not special ones)."""
    return _below(hash_words(key_T, _ENCODER, words_T), share) & inner_T


def corrupt(ids_M, key_M, positions_M, *, mask_id: int, vocab_size: int) -> torch.Tensor:
    """Ids that the encoder reads at its M masked tokens: `mask_id` for 80 %, a random id for 10 %, else the token (BERT)."""
    action = hash_words(key_M, _ACTION, positions_M)
    random_ids = (hash_words(key_M, _REPLACEMENT, positions_M) & 0x7FFFFFFF).to(ids_M.dtype) % vocab_size
    out = torch.where(_below(action, 0.9), random_ids, ids_M)
    return torch.where(_below(action, 0.8), mask_id, out)


def decoder_visible(
    key_N: torch.Tensor, words_NL: torch.Tensor, share: float, first: int = 0, last: int | None = None
) -> torch.Tensor:
    """Which keys decoder rows first to last - 1 (default: all L) see: bool N x R x L, for N texts of one length.

    Hidden from a row: a random share of the words, drawn for each row, and its own position. Position 0 (the sentence vector)
    and the last special token are hidden from themselves only.
    """
    rows_R = torch.arange(first, words_NL.shape[1] if last is None else last, device=words_NL.device)
    row_state = hash_words(key_N[:, None], _DECODER, rows_R[None])
    visible = ~_below(_mix(row_state[:, :, None] ^ _mark(words_NL)[:, None, :]), share)
    visible[:, :, 0] = True
    visible[:, :, -1] = True
    visible.diagonal(first, 1, 2).fill_(False)
    return visible
