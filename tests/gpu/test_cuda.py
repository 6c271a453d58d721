"""What differs on a GPU: the variable-length kernel, masks made there, sums in another order. Skipped without one."""

from __future__ import annotations

import json

import helpers
import numpy as np
import pytest
import torch

from bge_ds import preprocess
from bge_ds.data import dataloader
from bge_ds.data.collate import collate_texts
from bge_ds.data.sampling.sampler import EpochSampler, mix64
from bge_ds.kernels import linear_logsumexp, masks, matmul, max_logits, packed
from bge_ds.kernels.attention import varlen_attention
from bge_ds.kernels.decoder_attention import decoder_attention, decoder_attention_backend
from bge_ds.kernels.linear_cross_entropy import linear_cross_entropy
from bge_ds.kernels.packed import pack
from bge_ds.modeling.encoder import Encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("way", "dtype", "tolerance"), [
    ("flash", torch.bfloat16, 2e-2), ("flash", torch.float16, 4e-3),
    ("fused", torch.bfloat16, 2e-2), ("fused", torch.float32, 1e-4),
])  # fmt: skip
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 65), (True, 300), (False, 1)])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 64), ((4, 2), 128), ((4, 1), 20)])
def test_one_call_equals_the_runs(heads, head_dim, causal, window, way, dtype, tolerance):
    """One call over cu_seqlens gives what dense attention text by text gives in fp32, output and gradients."""
    texts, _ = pack(helpers.random_texts([1, 5, 5, 64, 200, 333, 700]))
    texts = texts.to("cuda")
    torch.manual_seed(0)
    qkv = [torch.randn(texts.tokens, h, head_dim, device="cuda") for h in (heads[0], heads[1], heads[1])]
    weights = torch.randn_like(qkv[0])

    def attend(way, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        settings = {"scale": 0.125, "causal": causal, "window": window, "way": way}
        out = varlen_attention(*leaves, texts.cu_seqlens, texts.runs, **settings)
        return [out, *torch.autograd.grad(out, leaves, weights.to(dtype))]

    for mine, theirs in zip(attend(way, dtype), attend("runs", torch.float32), strict=True):
        assert (mine.float() - theirs).abs().max() < tolerance * theirs.abs().max().clamp_min(1.0)


@pytest.mark.parametrize(("way", "dtype"), [("flash", torch.bfloat16), ("fused", torch.float32)])
def test_dropout_replays(way, dtype):
    """One seed gives one mask, forward and backward: pieces of a batch and checkpointed layers are computed twice."""
    texts, _ = pack(helpers.random_texts([5, 64, 200]))
    texts = texts.to("cuda")
    qkv = [torch.randn(texts.tokens, 4, 64, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]

    def attend(seed):
        torch.manual_seed(seed)
        out = varlen_attention(*qkv, texts.cu_seqlens, texts.runs, scale=0.125, dropout=0.3, way=way)
        return [out, torch.autograd.grad(out, qkv[2], torch.ones_like(out))[0]]

    first, again, other = attend(1), attend(1), attend(2)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    # FlashAttention adds gradients up in no fixed order.
    assert torch.allclose(first[1], again[1], rtol=1e-2, atol=1e-2) and not torch.allclose(first[1], other[1], atol=1e-2)
    plain = varlen_attention(*qkv, texts.cu_seqlens, texts.runs, scale=0.125, way=way)
    assert (attend(3)[0].mean() - plain.mean()).abs() < 0.05


def test_masks_are_the_same_on_both_devices():
    """A mask made on the GPU is the mask made on the CPU, bit for bit: else a run would depend on where it ran."""
    keys = torch.from_numpy(mix64(0, 0, np.arange(64)).view(np.int64))
    words = torch.arange(70).repeat(64, 1)
    assert torch.equal(masks.decoder_visible(keys.cuda(), words.cuda(), 0.5).cpu(), masks.decoder_visible(keys, words, 0.5))
    key_T, positions_T = keys.repeat_interleave(70), words.flatten()
    on_cpu = masks.encoder_masked(key_T, positions_T, torch.ones_like(positions_T, dtype=torch.bool), 0.3)
    on_gpu = masks.encoder_masked(key_T.cuda(), positions_T.cuda(), torch.ones_like(positions_T, dtype=torch.bool).cuda(), 0.3)
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize(("heads", "width"), [(12, 32), (4, 64), (2, 20), (1, 256)])
def test_fused_decoder_attention_equals_torch(heads, width, dtype, tolerance):
    """The fused kernels give what torch's attention with masks gives on the GPU, output and gradients; dropout repeats."""
    pytest.importorskip("triton")
    assert decoder_attention_backend("auto", "cuda") == "fused"
    lengths = [1, 2, 3, 5, 5, 64, 200, 333, 700]
    texts, _ = pack(helpers.random_texts(lengths))
    texts = texts.to("cuda")
    words_T = torch.cat([torch.arange(n) // 2 for n in lengths]).cuda()
    key_N = torch.from_numpy(mix64(0, 0, np.arange(len(lengths))).view(np.int64)).cuda()
    torch.manual_seed(0)
    sizes = [sum(max(0, n - 2) for n in lengths), texts.tokens, texts.tokens]
    qkv = [torch.randn(n, heads, width, device="cuda", dtype=dtype).requires_grad_() for n in sizes]
    weights = torch.randn_like(qkv[0])

    def attend(kernels, dropout=0.0, seed=1):
        torch.manual_seed(seed)
        out = decoder_attention(*qkv, words_T, key_N, texts.cu_seqlens, texts.runs, share=0.5, dropout=dropout, kernels=kernels)
        return [out, *torch.autograd.grad(out, qkv, weights)]

    for mine, theirs in zip(attend("fused"), attend("torch"), strict=True):
        assert (mine - theirs).abs().max() < tolerance * theirs.abs().max()
    first, again, other = attend("fused", 0.1), attend("fused", 0.1), attend("fused", 0.1, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # gradients too: no atomic additions
    assert not torch.equal(first[0], other[0])


def test_linear_cross_entropy_on_the_gpu():
    """Same sum and gradients as on the CPU, fp32."""
    x, w, b = torch.randn(300, 64), torch.randn(5000, 64), torch.randn(5000)
    target = torch.randint(5000, (300,))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, w, b)]
        loss, _ = linear_cross_entropy(leaves[0], leaves[1], target.to(device), leaves[2])
        loss.backward()
        results.append([loss.detach().cpu(), *(t.grad.cpu() for t in leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(("narrow", "tolerance"), [(None, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_contrastive_log_sum_exp_on_the_gpu(monkeypatch, narrow, tolerance):
    """In blocks, with own and equal pairs left out: what the CPU gives in fp64, within the rounding of the products."""
    monkeypatch.setattr(linear_logsumexp, "_GPU_ELEMENTS", 64 * 300)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 48, generator=generator) for n in (200, 300))
    keys_V = torch.arange(300) % 250
    first_M = torch.arange(200)
    of_pairs = first_M, torch.full_like(first_M, 2), keys_V[first_M, None], keys_V[:, None]
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, w)]
        excluded = linear_logsumexp.ExcludedPairs(*(t.to(device) for t in of_pairs))
        out, _ = linear_logsumexp.linear_logsumexp(*leaves, excluded, narrow=narrow)
        out.sum().backward()
        results.append([out.detach().cpu(), *(t.grad.cpu() for t in leaves)])
    for theirs, mine in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    if narrow is not None:
        assert matmul._sums_in_fp32("cuda", narrow), "16-bit products are made in 16 bits and converted, or in fp32: slow"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_max_logits_on_the_gpu(monkeypatch, dtype, tolerance):
    """In chunks of texts: the CPU's maxima and gradients of the same numbers."""
    monkeypatch.setattr(max_logits, "_GPU_BYTES", 40 * 1001 * dtype.itemsize)
    lengths = [1, 5, 5, 12, 30]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    runs = [packed.LengthRun(1, 1), packed.LengthRun(2, 5), packed.LengthRun(1, 12), packed.LengthRun(1, 30)]
    x, w, b = (torch.randn(shape).to(dtype) for shape in ((sum(lengths), 64), (1001, 64), (1001,)))
    # The last token of each text is by far the largest: rounding moves no maximum to another token.
    w, last = w.abs(), starts[1:].long() - 1
    x[last] = 64 * x[last].abs()
    results = []
    for device, given in (("cpu", torch.float64), ("cuda", dtype)):
        leaves = [t.to(device, given).requires_grad_() for t in (x, w, b)]
        out = max_logits.max_logits(*leaves, starts.to(device), runs)
        out.sum().backward()
        results.append([out.detach().cpu(), *(t.grad.cpu() for t in leaves)])
    for theirs, mine in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("pooling", ["mean", "last_token"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "mistral", "qwen3"])
def test_the_encoder_on_the_gpu(tmp_path, family, pooling):
    """The padding-free forward on the GPU in bf16 gives the CPU's fp32 vectors, within bf16's rounding."""
    texts = helpers.random_texts([3, 40, 17, 100, 5])
    encoder = Encoder.load(str(helpers.make_model(family, tmp_path)), pooling)
    expected = encoder.encode_ids(texts)
    assert (encoder.to("cuda", torch.bfloat16).encode_ids(texts) - expected).abs().max() < 5e-2


def test_a_loader_s_batches_are_pinned(tmp_path, tiny_tokenizer_path):
    """What a worker hands over lies in page-locked memory, or copies to the GPU would wait for the computation."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in helpers.SENTENCES)
    (tmp_path / "a.jsonl").write_text(rows)
    argv = ["pretrain", "--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "s"), "--tokenizer"]
    assert preprocess.main([*argv, str(tiny_tokenizer_path)]) == 0
    found = dataloader.steps(
        [tmp_path / "s"], EpochSampler(0, ((0, 6),), 2), collate_texts, first_step=0, end_step=3, accumulation=1, rank=0,
        world=1, workers=1, pin_memory=True, seed=0, max_seq_length=32, encoder_share=0.3,
    )  # fmt: skip
    for (batch,) in found:
        tensors = (
            batch.words_T,
            batch.keys_N,
            batch.rows_N,
            batch.texts.ids_T,
            batch.texts.positions_T,
            batch.texts.cu_seqlens,
        )
        assert all(tensor.is_pinned() for tensor in tensors)
        helpers.assert_same_batch(batch.to("cuda").to("cpu"), batch)
