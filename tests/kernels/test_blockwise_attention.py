"""Attention in blocks on the CPU is its formula for the masks it drew, whatever the blocks, and keeps no scores."""

from __future__ import annotations

import pytest
import torch

from bge_ds.kernels.attention import varlen_attention
from bge_ds.kernels.cpu import blockwise_attention as module
from bge_ds.kernels.cpu.dropout import DropoutMasks
from bge_ds.kernels.packed import LengthRun

RUNS = [LengthRun(2, 1), LengthRun(3, 5), LengthRun(1, 9)]
CU_SEQLENS = torch.tensor([0, 1, 2, 7, 12, 17, 26], dtype=torch.int32)


def kept_masks(runs, heads: int, p: float, seed: int, edge: int = 0) -> list[torch.Tensor]:
    """The masks drawn block by block after `manual_seed(seed)`, put together: one of H x queries x L a text, 0 or 1 / keep."""
    torch.manual_seed(seed)
    seed = DropoutMasks(p).seed
    lengths = [length for texts, length in runs for _ in range(texts)]
    out = [torch.full((heads, max(0, n - 2 * edge), n), float("nan"), dtype=torch.float64) for n in lengths]
    for block in module._blocks(runs, heads, edge):
        rows = block.rows.stop - block.rows.start
        for tile, part in enumerate(block.heads, block.tile):
            masks = module._masks(p, seed, tile)
            kept = masks.draw((block.texts, part.stop - part.start, rows, block.length))
            for n in range(block.texts):
                out[block.first + n][part, block.rows] = kept[n].double() / masks.keep
    assert not any(mask.isnan().any() for mask in out)  # every score is in a block
    return out


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 3), (True, 4)])
@pytest.mark.parametrize("block", [1, 20, 60, 150, 1 << 20])
def test_attention_is_its_formula(monkeypatch, causal, window, block):
    """Output and gradients for the very masks that were drawn, text by text, in blocks of texts, heads and rows (fp64)."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(26, 2, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    torch.manual_seed(3)
    out = varlen_attention(q, k, v, CU_SEQLENS, RUNS, scale=0.4, dropout=0.3, causal=causal, window=window)
    expected = []
    for n, kept in enumerate(kept_masks(RUNS, 2, 0.3, seed=3)):
        part, length = slice(CU_SEQLENS[n], CU_SEQLENS[n + 1]), kept.shape[-1]
        scores = torch.einsum("ihe,jhe->hij", q[part], k[part]) * 0.4
        far = torch.arange(length)[:, None] - torch.arange(length)
        seen = (far.abs() < (window or 99)) & ((far >= 0) | (not causal))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1) * kept
        expected.append(torch.einsum("hij,jhe->ihe", weights, v[part]))
    expected = torch.cat(expected)
    assert (out - expected).abs().max() < 1e-12
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(*(torch.autograd.grad(y, (q, k, v), weights) for y in (out, expected)), strict=True):
        assert (mine - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("block", [20, 1 << 20])
def test_sixteen_bit_attention_is_computed_in_fp32(monkeypatch, block):
    """bf16 in, bf16 out: the fp32 results for the same masks, rounded once, gradients summed over blocks of rows too."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block)
    half = [torch.randn(26, 2, 8, generator=torch.Generator().manual_seed(n)).bfloat16().requires_grad_() for n in range(3)]
    exact = [x.detach().float().requires_grad_() for x in half]
    results = []
    for qkv in (half, exact):
        torch.manual_seed(3)
        out = module.blockwise_attention(*qkv, RUNS, scale=0.3, p=0.2)
        results.append([out, *torch.autograd.grad(out, qkv, torch.ones_like(out))])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs.bfloat16())


def test_the_blocks_of_a_long_text_are_small():
    """A text of 8,192 tokens with 12 heads is cut into blocks of its rows, none above the bound; short texts go together."""
    for block in module._blocks([LengthRun(300, 20), LengthRun(2, 512), LengthRun(1, 8192)], 12, 1):
        rows = block.rows.stop - block.rows.start
        heads = max(part.stop - part.start for part in block.heads)
        assert block.texts * heads * rows * block.length <= module._BLOCK_ELEMENTS
        assert block.length > 20 or block.texts > 50


def test_threads_change_no_bit(monkeypatch):
    """Blocks are computed by as many threads as torch has; output, gradients and masks are those of one."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 40)
    qkv = [torch.randn(26, 2, 4, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(3)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            out = module.blockwise_attention(*qkv, RUNS, scale=0.3, p=0.2)
            results.append([out, *torch.autograd.grad(out, qkv, torch.ones_like(out))])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))
