"""Vectors in fewer bytes: a Matryoshka cut, and what is stored for float16, bfloat16 and int8.

Shapes: N vectors of D features.

    float32   as it is
    float16   rounded to the nearest
    bfloat16  uint16: the upper half of the float32's bits, rounded to the nearest even; numpy has no such type
    int8      q = round(x / s), one scale s = max|x| / 127 a vector, stored beside (float32, N); x is about s q

A scale for each vector needs no pass over the corpus, so that a block's bytes do not depend on the others.
"""

from __future__ import annotations

import numpy as np

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}  # name -> type on disk
_SHORTEST = 1e-12  # torch's normalize divides by no less


def cut(vectors_ND: np.ndarray, dim: int, normalize: bool) -> np.ndarray:
    """The first `dim` features; normalize: at unit length again."""
    if dim == vectors_ND.shape[1]:
        return vectors_ND
    vectors_ND = vectors_ND[:, :dim]
    if normalize:
        return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), _SHORTEST)
    return np.ascontiguousarray(vectors_ND)


def to_stored(vectors_ND: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(what is stored of float32 vectors, the scales of int8 or None). Raises ValueError where float16 is too small."""
    if dtype == "bfloat16":
        bits_ND = vectors_ND.view(np.uint32)
        return ((bits_ND + 0x7FFF + (bits_ND >> 16 & 1)) >> 16).astype(np.uint16), None
    if dtype == "int8":
        scales_N = np.abs(vectors_ND).max(axis=1) / np.float32(127)
        return np.rint(vectors_ND / np.where(scales_N > 0, scales_N, 1)[:, None]).astype(np.int8), scales_N
    with np.errstate(over="ignore"):
        stored_ND = vectors_ND.astype(STORED[dtype])
    if dtype == "float16" and not np.isfinite(stored_ND).all():
        raise ValueError("a vector has a feature above 65504, the most that float16 holds: give --dtype bfloat16")
    return stored_ND, None


def from_stored(stored_ND: np.ndarray, scales_N: np.ndarray | None, dtype: str) -> np.ndarray:
    """float32 vectors of what is stored: a copy, but of float32."""
    if dtype == "bfloat16":
        return (stored_ND.astype(np.uint32) << 16).view(np.float32)
    if scales_N is not None:
        return stored_ND * scales_N[:, None]
    return stored_ND.astype(np.float32, copy=False)
