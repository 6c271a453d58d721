"""RetroMAE's decoder attention against loops over texts, rows and heads, by torch and by the fused kernels.

The fused kernels run here in Triton's interpreter, on the CPU. Triton decides that when it is first imported, so
`test_the_fused_kernels_in_the_interpreter` runs this file again, in a process that has asked for it.
"""

from __future__ import annotations

import subprocess
from importlib.util import find_spec

import helpers
import interpreter
import numpy as np
import pytest
import torch
from test_blockwise_attention import kept_masks

from bge_ds.data.sampling.sampler import mix64
from bge_ds.kernels import decoder_attention as module
from bge_ds.kernels import masks, triton_support
from bge_ds.kernels.cpu import blockwise_attention
from bge_ds.kernels.decoder_attention import decoder_attention, decoder_attention_backend
from bge_ds.kernels.packed import LengthRun

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")
PATH = "fused" if interpreter.INTERPRETED else "torch"
RUNS = [LengthRun(1, 1), LengthRun(2, 2), LengthRun(2, 3), LengthRun(2, 20), LengthRun(1, 65), LengthRun(1, 150)]


class Row:
    """Random q, k, v in `dtype`, words of one token and more, keys, of texts of these lengths."""

    def __init__(self, runs=RUNS, heads=2, width=20, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.runs, self.lengths = runs, [length for texts, length in runs for _ in range(texts)]
        sizes = [sum(max(0, n - 2) for n in self.lengths), *[sum(self.lengths)] * 2]
        self.qkv = [
            torch.randn(n, heads, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in sizes
        ]
        steps = [torch.randint(0, 2, (n,), generator=generator) for n in self.lengths]
        self.words_T = torch.cat([step.cumsum(0) for step in steps])
        self.key_N = torch.from_numpy(mix64(seed, 0, np.arange(len(self.lengths))).view(np.int64))
        self.cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int()
        self.weights = torch.randn(self.qkv[0].shape, generator=generator, dtype=torch.float64).to(dtype)

    def attend(self, share=0.5, **settings):
        return decoder_attention(
            *self.qkv, self.words_T, self.key_N, self.cu_seqlens, self.runs, share=share, **{"kernels": PATH, **settings}
        )

    def visible(self, n: int, share: float) -> torch.Tensor:
        words = self.words_T[self.cu_seqlens[n] : self.cu_seqlens[n + 1]]
        return masks.decoder_visible(self.key_N[n : n + 1], words[None], share)[0]

    def reference(self, leaves, share=0.5, scale=None, kept=None):
        """The formula for each text, row and head by itself; kept: the weights' dropout, H x queries x L a text."""
        q, k, v = leaves
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, query = [], 0
        for n, length in enumerate(self.lengths):
            text, visible = slice(self.cu_seqlens[n], self.cu_seqlens[n + 1]), self.visible(n, share)
            for i in range(1, length - 1):
                seen = visible[i].nonzero().squeeze(-1)
                for head in range(q.shape[1]):
                    weights = (k[text][seen, head] @ q[query, head] * scale).softmax(0)
                    if kept is not None:
                        weights = weights * kept[n][head, i - 1, seen]
                    out.append(weights @ v[text][seen, head])
                query += 1
        return torch.stack(out).view(q.shape)

    def assert_same(self, out, tolerance, **settings):
        """Output and every gradient against the formula in fp64."""
        leaves = [x.detach().double().requires_grad_() for x in self.qkv]
        expected = self.reference(leaves, **settings)
        ours = [out, *torch.autograd.grad(out, self.qkv, self.weights)]
        theirs = [expected, *torch.autograd.grad(expected, leaves, self.weights.double())]
        for mine, exact in zip(ours, theirs, strict=True):
            assert (mine.double() - exact).abs().max() <= tolerance * exact.abs().max()


TYPES = [(torch.float32, 2e-6), (torch.float16, 3e-3)] + ([] if interpreter.INTERPRETED else [(torch.float64, 1e-12)])


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_equals_the_loops(dtype, tolerance):
    """Output and gradients of q, k and v: texts of 1 to 150 tokens, 20 features a head, any type, a scale of one's own."""
    row = Row(RUNS if tolerance < 1e-4 else RUNS[:-1], dtype=dtype)
    row.assert_same(row.attend(scale=0.3), tolerance, scale=0.3)


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_shares_at_their_ends(share):
    """Nothing hidden, nearly all, all but the sentence vector and the closing token: the formula, and no NaN."""
    row = Row([LengthRun(1, 3), LengthRun(1, 40)], dtype=torch.float32)
    row.assert_same(row.attend(share), 2e-6, share=share)


def test_strides_are_respected():
    """Views into a wider tensor and a gradient that is one number repeated give what their copies give."""
    row = Row([LengthRun(2, 20)], dtype=torch.float32, width=8)
    wide = [torch.cat([x, x], -1).detach().transpose(0, 1).contiguous() for x in row.qkv]
    views = [x.transpose(0, 1)[..., 8:].requires_grad_() for x in wide]
    results = []
    for leaves in (row.qkv, views):
        row.qkv = leaves
        out = row.attend()
        results.append([out, *torch.autograd.grad(out.sum(), row.qkv)])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_texts_without_inner_tokens():
    """A batch of texts of one and two tokens has no row: an empty output, and gradients of zero rather than none."""
    row = Row([LengthRun(2, 1), LengthRun(1, 2)], dtype=torch.float32)
    out = row.attend()
    gradients = torch.autograd.grad(out.sum(), row.qkv)
    assert out.shape == (0, 2, 20) and not any(g.any() for g in gradients)


def test_dropout_averages_to_the_attention_without():
    """Unbiased, another draw each call, and the share asked for: values of one show the sum of the weights kept."""
    row = Row([LengthRun(3, 40)], heads=4, width=4, dtype=torch.float32)
    q, k, _ = row.qkv
    row.qkv = [q.detach() * 0, k, torch.ones_like(k)]
    torch.manual_seed(0)
    draws = torch.stack([row.attend(share=0.0, dropout=0.25)[..., 0].detach() for _ in range(2)])
    assert not torch.equal(*draws)
    # 39 equal weights a row: the number kept is binomial.
    kept = draws * 0.75
    n = kept.numel() * 39
    assert abs(kept.mean().item() - 0.75) < 4 * (0.75 * 0.25 / n) ** 0.5
    spread = (0.75 * 0.25 / 39) ** 0.5
    assert abs(kept.std().item() / spread - 1) < 0.15
    # Neither heads nor rows nor texts share their draws.
    assert torch.corrcoef(draws[0].T).fill_diagonal_(0).abs().max() < 0.4


def test_the_seed_decides_the_dropout():
    """torch.manual_seed repeats the output bit for bit."""
    row = Row([LengthRun(2, 20)], dtype=torch.float32)
    torch.manual_seed(1)
    first, second = row.attend(dropout=0.5), row.attend(dropout=0.5)
    torch.manual_seed(1)
    assert torch.equal(row.attend(dropout=0.5), first) and not torch.equal(first, second)


def test_the_backward_has_the_forwards_dropout():
    """Gradients are those of the formula with the mask that the output itself shows, in several blocks.

    With values that name the keys (the identity), a row's output is its dropped weights.
    """
    length = 80
    row = Row([LengthRun(1, length)], width=length, dtype=torch.float32)
    q, k, v = row.qkv
    identity = torch.eye(length)[:, None].expand(length, 2, length)
    torch.manual_seed(5)
    row.qkv = [q, k, identity]
    kept = row.attend(dropout=0.3).detach().permute(1, 0, 2) != 0
    row.qkv = [q, k, v]
    torch.manual_seed(5)
    out = row.attend(dropout=0.3)
    # What is hidden is 0 too, whatever the factor; the share dropped is exact to 1 / 65,536.
    keep = 1 - round(0.3 * 65536) / 65536 if PATH == "torch" else 0.7
    row.assert_same(out, 2e-5, kept=[kept.double() / keep])


@pytest.mark.skipif(interpreter.INTERPRETED, reason="tests the torch implementation only")
@pytest.mark.parametrize("block", [1, 60, 700, 1 << 20])
def test_any_block_gives_the_formula(monkeypatch, block):
    """In blocks of texts, heads and rows, with and without dropout, given the masks that were drawn (fp64)."""
    monkeypatch.setattr(blockwise_attention, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(module, "_CPU_MASKS", 0)
    runs = [LengthRun(2, 2), LengthRun(2, 3), LengthRun(3, 12), LengthRun(1, 33)]
    row = Row(runs, width=5)
    row.assert_same(row.attend(), 1e-12)
    torch.manual_seed(3)
    row.assert_same(row.attend(dropout=0.4), 1e-12, kept=kept_masks(runs, 2, 0.4, seed=3, edge=1))


@pytest.mark.skipif(interpreter.INTERPRETED, reason="tests the torch implementation only")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_memory_of_a_long_text(dropout):
    """4,096 tokens with 12 heads, forward and backward, add less than 200 MB to a process; their scores are 805 MB."""
    command = helpers.program("kernel_memory", "attention", dropout)
    result = subprocess.run(command, capture_output=True, text=True, env=helpers.environment())
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 200


@pytest.mark.skipif(interpreter.INTERPRETED, reason="of a process without the interpreter")
def test_the_choice(monkeypatch):
    """On the CPU torch; fused where asked for without what it needs is an error that says what is missing."""
    assert decoder_attention_backend("auto", "cpu") == "torch" and decoder_attention_backend("torch", "cuda") == "torch"
    with pytest.raises(ValueError, match="--kernels fast: unknown; it is one of auto, torch, fused"):
        decoder_attention_backend("fast", "cpu")
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    assert decoder_attention_backend("auto", "cuda") == "torch"
    with pytest.raises(ValueError, match=r"needs a CUDA device and the triton package; the triton .* not installed; use auto"):
        decoder_attention_backend("fused", "cuda")
    monkeypatch.setattr(triton_support, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"--kernels fused: .*; the device is 'cpu'; use auto or torch"):
        decoder_attention_backend("fused", "cpu")
    with pytest.raises(ValueError, match="the device is 'cpu'"):
        Row([LengthRun(1, 3)]).attend(kernels="fused")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert decoder_attention_backend("fused", "cpu") == "fused" and decoder_attention_backend("auto", "cpu") == "torch"


@interpreter.only
def test_fused_kernels_refuse_what_they_cannot():
    """fp64, wide heads, and bf16 in the interpreter (which multiplies its bits as integers) are errors, not results."""
    with pytest.raises(ValueError, match="float64 with 20 features a head; the fused kernels take float32, bfloat16, float16"):
        Row([LengthRun(1, 3)]).attend()
    with pytest.raises(ValueError, match="at most 256"):
        Row([LengthRun(1, 3)], width=257, dtype=torch.float32).attend()
    with pytest.raises(ValueError, match="interpreter cannot multiply bfloat16"):
        Row([LengthRun(1, 3)], dtype=torch.bfloat16).attend()


@interpreter.runs_again
def test_the_fused_kernels_in_the_interpreter():
    """Every test above holds for the fused kernels."""
    interpreter.run_again(__file__, "-W", "error::RuntimeWarning")
