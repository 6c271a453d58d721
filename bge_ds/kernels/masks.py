"""RetroMAE's masks as pure functions of a text's key, computed where they are used.

A key is 64 bits hashed from (seed, epoch, row). Each decision hashes the key with what it is about (a word, a
decoder row and a word, a position) and compares the result with the share asked for, so that masks are the same on
every device and for every number of ranks, need no storage, and a decoder row's visibility can be computed inside an
attention kernel. A word is masked with the probability asked for, independently of the others; all its tokens go
together. (The existing trainer draws a fixed number of words instead; the expected share is the same.)

All arithmetic is on int32 with wrap-around, which torch does alike on CPU and GPU, and Triton can repeat.
"""

from __future__ import annotations

import torch

# What a hash is about: kept apart so that no two decisions share their randomness.
_ENCODER, _ACTION, _REPLACEMENT, _DECODER = 1, 2, 3, 4


def _int32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


_PRIME, _MUL_1, _MUL_2 = _int32(0x9E3779B1), _int32(0x7FEB352D), _int32(0x846CA68B)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of int32 that scatters every bit (the finaliser of Wellons' lowbias32)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MUL_1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MUL_2
    return x ^ ((x >> 16) & 0xFFFF)


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


def _below(hash_: torch.Tensor, share: float) -> torch.Tensor:
    return (hash_ & 0x7FFFFFFF) < round(share * (1 << 31))


def encoder_masked(key_T: torch.Tensor, words_T: torch.Tensor, inner_T: torch.Tensor, share: float) -> torch.Tensor:
    """Which tokens (bool, T) the encoder must predict: those of the masked words; only `inner_T` (no special) ones."""
    return _below(hash_words(key_T, _ENCODER, words_T), share) & inner_T


def corrupt(ids_T, key_T, positions_T, masked_T, *, mask_id: int, vocab_size: int) -> torch.Tensor:
    """The encoder's input: of the masked tokens 80 % become `mask_id`, 10 % a random id, 10 % stay."""
    action = hash_words(key_T, _ACTION, positions_T)
    random_ids = (hash_words(key_T, _REPLACEMENT, positions_T) & 0x7FFFFFFF).to(ids_T.dtype) % vocab_size
    out = torch.where(masked_T & _below(action, 0.8), mask_id, ids_T)
    return torch.where(masked_T & ~_below(action, 0.8) & _below(action, 0.9), random_ids, out)


def decoder_visible(key_N: torch.Tensor, words_NL: torch.Tensor, share: float) -> torch.Tensor:
    """What each decoder row sees, bool N x L x L (row i, key j), for texts of one length.

    A share of the words is hidden from each row, drawn anew for every row; the row's own position always; position 0
    (the sentence vector) and the closing special token never, except from themselves.
    """
    length = words_NL.shape[1]
    rows_L = torch.arange(length, device=words_NL.device)
    row_state = hash_words(key_N[:, None], _DECODER, rows_L[None])
    hidden = _below(_mix(row_state[:, :, None] ^ _mark(words_NL)[:, None, :]), share)
    hidden[:, :, 0] = False
    hidden[:, :, -1] = False
    return ~(hidden | torch.eye(length, dtype=torch.bool, device=words_NL.device))
