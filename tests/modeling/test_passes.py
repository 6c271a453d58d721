"""Pieces of a row give the outputs of the whole, in order, and freed memory goes back to the system."""

from __future__ import annotations

import sys

import helpers
import pytest
import torch
from torch import nn

from bge_ds.kernels.packed import chunk_bounds, pack, split
from bge_ds.modeling import passes


class Lengths(nn.Module):
    """Each text's number of tokens, and whether the model was training."""

    def __init__(self):
        super().__init__()
        self.unused, self.seen = nn.Parameter(torch.zeros(1)), []

    def forward(self, texts):
        self.seen.append((texts.tokens, self.training))
        return texts.cu_seqlens.diff()


def test_pieces_are_run_from_the_longest_and_joined_in_order(monkeypatch):
    released = []
    monkeypatch.setattr(passes, "release_freed_memory", lambda: released.append(True))
    texts, _ = pack(helpers.random_texts([3 + i for i in range(20)]))
    model, told = Lengths().train(), []
    pieces = split(texts, chunk_bounds(texts.runs, 1, None))
    lengths_N = passes.run_pieces(model, pieces, lambda texts, tokens: told.append((texts, tokens)))
    assert lengths_N.tolist() == texts.cu_seqlens.diff().tolist() == [3 + i for i in range(20)]
    assert told == [(1, 22 - i) for i in range(20)] and model.seen == [(22 - i, False) for i in range(20)]
    assert model.training and len(released) == 2  # of twenty passes, each eighth


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_freed_memory_goes_back_to_the_system():
    """Gaps between what is still in use, which the C library keeps by itself."""

    def resident() -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    if passes._malloc_trim() is None:
        pytest.skip("no glibc")
    passes.release_freed_memory()
    before = resident()
    kept = [bytearray(50_000) for _ in range(4000)][::20]  # every twentieth stays: 190 MB of gaps
    held = resident() - before
    passes.release_freed_memory()
    assert held > 100 << 20 and resident() - before < 40 << 20
    assert len(kept) == 200
