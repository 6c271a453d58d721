"""Forward passes without gradients: a packed row in pieces, one after the other."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import nn

from bge_ds.kernels.packed import PackedPairs, PackedTexts

_RELEASED_EVERY = 8  # passes; after each one it would cost 5 % of the time


def run_pieces(
    model: nn.Module, pieces: Sequence[PackedTexts] | Sequence[PackedPairs], tell: Callable[[int, int], None] | None = None
) -> torch.Tensor:
    """The model's outputs for all pieces, in their order, in evaluation mode.

    The longest texts are in the last piece, which is run first, so that a lack of memory shows at once. tell: is told the
    outputs and tokens of each pass.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    outputs = []
    for number, piece in enumerate(reversed(pieces), 1):
        outputs.append(model(piece.to(device)))
        if device.type == "cpu" and number % _RELEASED_EVERY == 0:
            release_freed_memory()
        if tell is not None:
            tell(len(outputs[-1]), piece.tokens)
    model.train(training)
    return torch.cat(outputs[::-1])


def release_freed_memory() -> None:
    """Gives freed memory back to the system: pieces differ in size, and glibc keeps the gaps, 1 GB after 10,000 texts."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim():
    """glibc's; None where the C library is another."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
