"""A process that prints the memory of one operation in MiB. Arguments: "logsumexp"; or "attention" and a dropout."""

import torch

from bge_ds.kernels.decoder_attention import decoder_attention
from bge_ds.kernels.linear_logsumexp import ExcludedPairs, linear_logsumexp
from bge_ds.kernels.packed import LengthRun
from bge_ds.training.metrics import process_peak


def peak() -> int:
    return process_peak() >> 20


def logsumexp() -> int:
    """The peak of the whole process at 8,192 x 65,536."""
    x, w = torch.randn(8192, 64, requires_grad=True), torch.randn(65536, 64, requires_grad=True)
    rows, keys = torch.arange(8192) * 8, torch.arange(65536)[:, None]
    linear_logsumexp(x, w, ExcludedPairs(rows, torch.full_like(rows, 8), keys[:8192], keys))[0].mean().backward()
    assert x.grad.isfinite().all() and w.grad.any()
    return peak()


def attend(tokens: int, dropout: float) -> None:
    q, k, v = (torch.randn(n, 12, 4, requires_grad=True) for n in (tokens - 2, tokens, tokens))
    words, keys, ends = torch.arange(tokens), torch.tensor([7]), torch.tensor([0, tokens], dtype=torch.int32)
    runs = [LengthRun(1, tokens)]
    decoder_attention(q, k, v, words, keys, ends, runs, share=0.5, dropout=dropout).sum().backward()
    assert q.grad.isfinite().all() and k.grad.any()


def attention(dropout: str) -> int:
    """What 4,096 tokens add to the peak."""
    attend(64, float(dropout))
    before = peak()
    attend(4096, float(dropout))
    return peak() - before


def main(kind: str, *args: str) -> None:
    print({"logsumexp": logsumexp, "attention": attention}[kind](*args))
