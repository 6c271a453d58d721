"""Attention on the CPU, in blocks of scores that fit the caches and are never kept.

Shapes: T tokens of N texts in one row, M of them with a query, H heads, E features a head; a block has n texts or one,
h heads, R rows (queries of a text) and L keys.

torch's attention with dropout falls back to plain products on the CPU and keeps three L x L results for the backward; with a
mask it keeps the mask, as floats. Here one autograd node handles the whole row and keeps only q, k and v: the backward
recomputes each block's scores and mask and draws the same dropout bits again (the recomputation of FlashAttention,
arXiv:2205.14135, with whole rows of keys). Blocks divide a run of texts into texts, a text into heads, a head into rows. Each
torch thread takes blocks of its own: half of a block's cost is in steps that use one thread, numpy's among them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch

from bge_ds.kernels.cpu.dropout import DropoutMasks, apply_mask
from bge_ds.kernels.packed import LengthRun
from bge_ds.kernels.triton_support import at_least_fp32

# Scores held at a time, 4 MiB: of 2**18 to 2**22 the fastest for 16 texts of 512 tokens with 12 heads, by 10 to 20 %.
_BLOCK_ELEMENTS = 1 << 20


class ScoreBlock(NamedTuple):
    """Rows `rows` (counted from a text's first query) of texts first to first + texts - 1, all of one length."""

    first: int
    texts: int
    length: int
    rows: slice
    queries: slice  # of the row's M queries: all those of the texts
    keys: slice  # of the row's T tokens
    heads: list[slice]
    tile: int  # running number of its first slice of heads; each slice has a dropout mask of its own


# Added to a block's scores, fp32 n or 1 x 1 x R x L: 0 where a key is visible, minus infinity where it is hidden. Added,
# because masked_fill is the slowest operation on a block (5 ns an element).
Bias = Callable[[ScoreBlock], torch.Tensor | None]


def as_bias(visible: torch.Tensor) -> torch.Tensor:
    return torch.where(visible, 0.0, float("-inf"))


def _blocks(runs: list[LengthRun], heads: int, edge: int):
    """The blocks of a row; `edge` tokens at each end of a text have no query."""
    first = query = key = tile = 0
    for texts, length in runs:
        queries = max(0, length - 2 * edge)
        rows = max(1, min(queries, _BLOCK_ELEMENTS // max(1, length)))
        of_heads = max(1, min(heads, _BLOCK_ELEMENTS // (rows * length)))
        step = max(1, _BLOCK_ELEMENTS // (heads * rows * length)) if rows >= queries else 1
        parts = [slice(h, min(h + of_heads, heads)) for h in range(0, heads, of_heads)]
        for start in range(0, texts, step):
            n = min(step, texts - start)
            q, k = slice(query, query + n * queries), slice(key, key + n * length)
            for row in range(0, queries, rows):
                yield ScoreBlock(first, n, length, slice(row, min(row + rows, queries)), q, k, parts, tile)
                tile += len(parts)
            first, query, key = first + n, q.stop, k.stop


def _part(x: torch.Tensor, of: slice, texts: int, rows: slice, heads: slice) -> torch.Tensor:
    """A block's view of a row, n x R x h x E."""
    return x[of].unflatten(0, (texts, -1))[:, rows, heads]


def _tile(x: torch.Tensor) -> torch.Tensor:
    """n x R x h x E as (n h) x R x E, at least fp32: on the CPU, small 16-bit products are slower."""
    return at_least_fp32(x.transpose(1, 2).flatten(0, 1))


def _untile(x: torch.Tensor, texts: int) -> torch.Tensor:
    return x.unflatten(0, (texts, -1)).transpose(1, 2)


def _softmax(q, k, bias, texts: int) -> torch.Tensor:
    scores = torch.bmm(q, k.transpose(1, 2))
    if bias is not None:
        scores.unflatten(0, (texts, -1)).add_(bias)
    return scores.softmax(-1)


def _masks(p: float, seed: int | None, tile: int) -> DropoutMasks | None:
    return None if seed is None else DropoutMasks(p, seed + tile)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """A thread pool in which each thread's torch operations use that thread only."""
    pool = ThreadPoolExecutor(threads, "bge_ds_attention", initializer=torch.set_num_threads, initargs=(1,))
    started = threading.Barrier(threads)
    list(pool.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(threads)  # the default of threads started from now on
    return pool


def _for_each_text(work: Callable[[ScoreBlock], None], runs: list[LengthRun], heads: int, edge: int) -> None:
    """Run `work` on every block. Blocks of the same texts add to the same gradients, so one thread takes them in order."""
    groups = [list(blocks) for _, blocks in groupby(_blocks(runs, heads, edge), lambda block: block.first)]

    @torch.no_grad()  # the setting is per thread
    def work_on(group: list[ScoreBlock]) -> None:
        for block in group:
            work(block)

    threads = torch.get_num_threads()
    each = map if threads == 1 or len(groups) < threads else _pool(threads).map
    for _ in each(work_on, groups):
        pass


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, runs, scale, p, edge, bias):
        seed = DropoutMasks(p).seed if p > 0 else None
        ctx.save_for_backward(q, k, v)
        ctx.settings = runs, scale, p, seed, edge, bias
        out = torch.empty_like(q, memory_format=torch.contiguous_format)

        def forward_block(block: ScoreBlock) -> None:
            seen = None if bias is None else bias(block)
            for tile, heads in enumerate(block.heads, block.tile):
                at, masks = (block.queries, block.texts, block.rows, heads), _masks(p, seed, tile)
                k_b, v_b = (_tile(_part(x, block.keys, block.texts, slice(None), heads)) for x in (k, v))
                weights = _softmax(_tile(_part(q, *at)) * scale, k_b, seen, block.texts)
                if masks is not None:
                    weights = apply_mask(weights, masks.draw(weights.shape))
                y = torch.bmm(weights, v_b)
                _part(out, *at).copy_(_untile(y if masks is None else y.div_(masks.keep), block.texts))

        _for_each_text(forward_block, runs, q.shape[1], edge)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        runs, scale, p, seed, edge, bias = ctx.settings
        q, k, v = ctx.saved_tensors
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        # Summed over the blocks of a text's rows, in fp32 until complete.
        dtype = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (k, v))

        def backward_block(block: ScoreBlock) -> None:
            seen, n = None if bias is None else bias(block), block.texts
            for tile, heads in enumerate(block.heads, block.tile):
                masks = _masks(p, seed, tile)
                of_queries, of_keys = (block.queries, n, block.rows, heads), (block.keys, n, slice(None), heads)
                q_b, g = _tile(_part(q, *of_queries)) * scale, _tile(_part(grad, *of_queries))
                k_b, v_b = (_tile(_part(x, *of_keys)) for x in (k, v))
                weights = dropped = _softmax(q_b, k_b, seen, n)
                if masks is not None:
                    dropped, g = apply_mask(weights, masks.draw(weights.shape)), g / masks.keep
                # Gradient of the softmax: w (g - sum w g); g is already 0 where dropped.
                ds = torch.bmm(g, v_b.transpose(1, 2)).mul_(dropped)
                ds.addcmul_(weights, ds.sum(-1, keepdim=True), value=-1)
                _part(dq, *of_queries).copy_(_untile(torch.bmm(ds, k_b).mul_(scale), n))
                _part(dk, *of_keys).add_(_untile(torch.bmm(ds.transpose(1, 2), q_b), n))
                _part(dv, *of_keys).add_(_untile(torch.bmm(dropped.transpose(1, 2), g), n))

        _for_each_text(backward_block, runs, q.shape[1], edge)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def blockwise_attention(
    q_MHE, k_THE, v_THE, runs: list[LengthRun], *, scale: float, p: float = 0.0, edge: int = 0, bias: Bias | None = None
) -> torch.Tensor:
    """softmax(q k^T scale + bias) with dropout p, times v, of each text on itself: M x H x E.

    runs: as in `attention.varlen_attention`. edge: number of tokens at each end of a text that are keys without a query.
    CPU only; no double backward.
    """
    return _Attention.apply(q_MHE, k_THE, v_THE, runs, scale, p, edge, bias)
