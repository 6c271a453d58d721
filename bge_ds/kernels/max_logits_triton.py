"""The kernels of `max_logits`: maxima of a chunk of logits for each text, and the gradient back to the argmax tokens.

Shapes: N texts of a chunk, T tokens of them, V columns (vocabulary).

A program takes some columns of one text and loops over its rows in order, so a maximum that several tokens reach is the first
one's, and every element of the gradient is written once: results are deterministic. Logits lie in rows of
`matmul.empty_aligned`, and masks end with a row's memory, so a thread loads 16 bytes at once. Software pipelining loads the
next rows meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bge_ds.kernels.triton_support import launch

# Columns of a program, and stages of the software pipeline over rows.
_COLUMNS, _STAGES = 1024, 8


@triton.jit
def _rows_of(starts_ptr, text):
    """(the text's first row in the chunk, int64; its number of rows)."""
    start = tl.load(starts_ptr + text).to(tl.int64)
    length = tl.load(starts_ptr + text + 1).to(tl.int64) - start
    return start - tl.load(starts_ptr).to(tl.int64), length.to(tl.int32)


@triton.jit
def _maxima(
    logits_ptr, starts_ptr, best_ptr, from_ptr, logits_row, width, COLUMNS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    text, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, length = _rows_of(starts_ptr, text)
    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    argmax = tl.zeros([COLUMNS], tl.int32)
    for row in tl.range(0, length, num_stages=STAGES):
        x = tl.load(logits_ptr + (first + row) * logits_row + columns, mask=columns < logits_row).to(tl.float32)
        higher = (x > best) | ((x != x) & (best == best))  # the first that is not a number stays
        best, argmax = tl.where(higher, x, best), tl.where(higher, row, argmax)
    place = text.to(tl.int64) * width + columns
    tl.store(best_ptr + place, best, mask=columns < width)
    tl.store(from_ptr + place, argmax, mask=columns < width)


@triton.jit
def _gradient(grad_ptr, from_ptr, starts_ptr, out_ptr, out_row, width, COLUMNS: tl.constexpr):
    text, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, length = _rows_of(starts_ptr, text)
    place = text.to(tl.int64) * width + columns
    grad = tl.load(grad_ptr + place, mask=columns < width, other=0.0)
    argmax = tl.load(from_ptr + place, mask=columns < width, other=0)
    for row in range(0, length):
        x = tl.where(argmax == row, grad, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (first + row) * out_row + columns, x, mask=columns < out_row)


def _grid(best_NV: torch.Tensor) -> tuple[int, int]:
    return len(best_NV), triton.cdiv(best_NV.shape[1], _COLUMNS)


def maxima(logits_TV: torch.Tensor, starts: torch.Tensor, best_NV: torch.Tensor, from_NV: torch.Tensor) -> None:
    """Write each text's largest logits (fp32) and their argmax token in the text (int32), into contiguous rows.

    logits: rows of `matmul.empty_aligned`. starts: int32 of N + 1, where the texts begin; the chunk's first row is `starts[0]`.
    """
    launch(
        _maxima, _grid(best_NV), logits_TV, starts, best_NV, from_NV, logits_TV.stride(0), best_NV.shape[1], on=logits_TV,
        COLUMNS=_COLUMNS, STAGES=_STAGES, num_warps=4,
    )  # fmt: skip


def gradient(grad_NV: torch.Tensor, from_NV: torch.Tensor, starts: torch.Tensor, out_TV: torch.Tensor) -> None:
    """Write the gradient of the chunk's logits: that of each maximum (fp32) at the token it came from, 0 elsewhere.

    out_TV: rows of `matmul.empty_aligned`.
    """
    launch(
        _gradient, _grid(grad_NV), grad_NV, from_NV, starts, out_TV, out_TV.stride(0), grad_NV.shape[1], on=out_TV,
        COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
