"""Pieces: the gradient of the whole, dropout and 16-bit weights included, in the memory of one piece."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import helpers
import numpy as np
import pytest
import torch
from torch import nn

from bge_ds.kernels.packed import chunk_bounds, pack, split, split_further
from bge_ds.losses import grad_cache


@pytest.mark.parametrize("sizes", [[10], [4, 6], [1] * 10, [3, 0, 7]])
def test_pieces_give_the_gradient_of_the_whole(sizes):
    """Same gradient of weights and scale for a loss that couples all vectors; K pieces take 2 K - 1 passes."""
    torch.manual_seed(0)
    model, scale = nn.Linear(4, 3).double(), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    x = torch.randn(10, 4, dtype=torch.float64)
    starts, calls = np.cumsum([0, *sizes]), []

    def embed(k):
        calls.append(k)
        rows = x[starts[k] : starts[k + 1]] if sizes[k] else x[:1]
        return model(rows).tanh(), scale * 1

    def loss(v, s):
        return torch.logsumexp(v @ v.T * s, 1).mean()

    value = grad_cache.backward(embed, sizes, loss, lambda part: part.backward())
    found = [p.grad.clone() for p in (model.weight, model.bias, scale)]
    expected = loss(model(x).tanh(), scale)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, theirs in zip(found, torch.autograd.grad(expected, (model.weight, model.bias, scale)), strict=True):
        assert (mine - theirs).abs().max() < 1e-12
    assert len(calls) == 2 * len(sizes) - 1


def test_cuts_hold_every_text_once():
    """Pieces respect the limit, keep order and content, and can be cut further than there are texts."""
    texts, _ = pack(helpers.random_texts([3, 50, 7, 7, 20, 1, 9]))
    by_tokens = chunk_bounds(texts.runs, None, 30)
    assert [p.tokens for p in split(texts, by_tokens)] == [27, 20, 50]
    assert chunk_bounds(texts.runs, 3, None) == [0, 3, 6, 7]
    for pieces in (3, 5, 7):
        parts = split(texts, split_further(by_tokens, pieces))
        assert len(parts) == pieces
        assert torch.equal(torch.cat([p.ids_T for p in parts]), texts.ids_T)
        assert [int(n) for p in parts for n in p.cu_seqlens.diff()] == [1, 3, 7, 7, 9, 20, 50]
    more = split_further(by_tokens, 9)
    assert more[-3:] == [7, 7, 7] and len(split(texts, more)) == 9  # two pieces without a text of their own


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sixteen_bit_gradients_are_summed_in_fp32(stage):
    """1 + 256 / 512 = 1.5 at every stage; summed in bf16 the small ones would vanish and leave 1."""
    out = helpers.run_ranks("tiny_engines", 2, "sum_of_gradients", stage)
    assert [float(value) for value in re.findall(r"sum (\S+)", out)] == [1.5, 1.5]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = " ".join(helpers.SENTENCES).split()
    file = tmp_path_factory.mktemp("groups") / "groups.jsonl"
    with open(file, "w") as out:
        for _ in range(600):
            texts = [" ".join(rng.choice(words, n)) for n in rng.integers(5, 60, 4)]
            out.write(json.dumps({"query": texts[0], "pos": [texts[1]], "neg": texts[2:]}) + "\n")
    return file


def finetune(model, groups, out, *flags, steps=2):
    command = [
        sys.executable, "-m", "bge_ds.finetune", "--model_name_or_path", model, "--train_data", groups, "--output_dir", out,
        "--max_steps", steps, "--logging_steps", 1, "--save_strategy", "no", "--train_group_size", 3, "--query_max_len", 64,
        "--passage_max_len", 100, "--use_cpu", "--cache_dir", groups.parent / "cache", "--dataloader_num_workers", 0, *flags,
    ]  # fmt: skip
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=helpers.environment())
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_piece_computed_twice_is_the_same_piece(tmp_path, tiny_tokenizer_path, groups):
    """With dropout, the replay draws the masks of the first pass: the vectors are equal to the bit, or the gradient would
    belong to other vectors than the loss."""
    folder = helpers.make_model("bert", tmp_path / "model", dropout=0.2)
    helpers.make_tokenizer("wordpiece", folder)
    out = helpers.run_ranks("replayed_pieces", 1, folder, groups, tmp_path / "out")
    assert "replayed 10 True True" in out  # 12 texts are 6 pieces, 5 of them computed twice, in 2 steps


def test_memory_does_not_grow_with_the_batch(tmp_path, tiny_bert_path, groups):
    """Peak memory at batch 1024 in pieces is at most 1.2 times that at batch 16; in one piece it would be far more."""
    pieces = ("--sub_batch_tokens", 2048)
    small, large, whole = (
        finetune(tiny_bert_path, groups, tmp_path / name, "--per_device_train_batch_size", n, *flags, steps=1)[0]
        for name, n, flags in (("a", 16, pieces), ("b", 1024, pieces), ("c", 1024, ()))
    )
    assert large["peak_memory_bytes"] < 1.2 * small["peak_memory_bytes"]
    assert whole["peak_memory_bytes"] > 1.2 * small["peak_memory_bytes"]
