"""The kernels of `max_logits`: maxima of a chunk of logits text by text, and the gradient back to the tokens they came from.

Shapes: N texts of a chunk, T tokens of them, V columns (vocabulary).

A program takes some columns of one text and goes through its rows in their order, so that a maximum that several tokens reach
is the first one's, and every element of the gradient is written once: the result is the same each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bge_ds.kernels.triton_support import launch

_COLUMNS = 1024


@triton.jit
def _maxima(logits_ptr, starts_ptr, best_ptr, from_ptr, width, COLUMNS: tl.constexpr):
    text, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    origin, start = tl.load(starts_ptr).to(tl.int64), tl.load(starts_ptr + text).to(tl.int64)
    length = (tl.load(starts_ptr + text + 1).to(tl.int64) - start).to(tl.int32)
    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    found = tl.zeros([COLUMNS], tl.int32)
    for row in range(0, length):
        x = tl.load(logits_ptr + (start - origin + row) * width + columns, mask=inside, other=0.0).to(tl.float32)
        higher = (x > best) | (x != x)  # what is not a number must come out
        best, found = tl.where(higher, x, best), tl.where(higher, row, found)
    place = text.to(tl.int64) * width + columns
    tl.store(best_ptr + place, best, mask=inside)
    tl.store(from_ptr + place, found, mask=inside)


@triton.jit
def _gradient(grad_ptr, from_ptr, starts_ptr, out_ptr, width, COLUMNS: tl.constexpr):
    text, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    origin, start = tl.load(starts_ptr).to(tl.int64), tl.load(starts_ptr + text).to(tl.int64)
    length = (tl.load(starts_ptr + text + 1).to(tl.int64) - start).to(tl.int32)
    place = text.to(tl.int64) * width + columns
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    found = tl.load(from_ptr + place, mask=inside, other=0)
    for row in range(0, length):
        x = tl.where(found == row, grad, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (start - origin + row) * width + columns, x, mask=inside)


def _grid(best_NV: torch.Tensor) -> tuple[int, int]:
    return len(best_NV), triton.cdiv(best_NV.shape[1], _COLUMNS)


def maxima(logits_TV: torch.Tensor, starts: torch.Tensor, best_NV: torch.Tensor, from_NV: torch.Tensor) -> None:
    """Write each text's largest logits (fp32) and the token of the text that reached each (int32), into contiguous rows.

    starts: N + 1, where the texts begin in a row of which the chunk's first is `starts[0]`. logits: contiguous.
    """
    launch(
        _maxima, _grid(best_NV), logits_TV, starts, best_NV, from_NV, best_NV.shape[1], on=logits_TV, COLUMNS=_COLUMNS,
        num_warps=4,
    )  # fmt: skip


def gradient(grad_NV: torch.Tensor, from_NV: torch.Tensor, starts: torch.Tensor, out_TV: torch.Tensor) -> None:
    """Write the gradient of the chunk's logits: that of a maximum (fp32) where it came from, 0 elsewhere."""
    launch(
        _gradient, _grid(grad_NV), grad_NV, from_NV, starts, out_TV, grad_NV.shape[1], on=out_TV, COLUMNS=_COLUMNS,
        num_warps=4,
    )  # fmt: skip
