"""Both commands on a GPU, in this process: every ZeRO stage and precision, resumed, evaluated, in pieces."""

from __future__ import annotations

import json
from itertools import pairwise

import helpers
import numpy as np
import pytest
import torch

from bge_ds import evaluate
from bge_ds.kernels.packed import chunk_bounds, pack, split
from bge_ds.losses import grad_cache
from bge_ds.modeling.compilation import compile_layers
from bge_ds.modeling.encoder import Encoder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
BOTH = pytest.mark.parametrize("command", ["finetune", "pretrain"])
_once: dict = {}


def losses(records: list[dict]) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


@BOTH
@pytest.mark.parametrize("stage", range(4))
def test_every_stage_trains_as_the_cpu(train, reference, command, stage):
    """fp32 on one GPU: each step's loss and gradient norm at each stage are those of the CPU at ZeRO 0. Another loss is a
    kernel that computes otherwise there, another norm a gradient that is lost or counted twice."""
    found, expected = train(command, deepspeed=f"zero{stage}"), reference(command)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    for mine, theirs in zip(found, expected, strict=False):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("command", "stage"), [("finetune", 1), ("finetune", 2), ("finetune", 3), ("pretrain", 3)])
def test_every_stage_in_bf16(train, command, stage):
    """bf16: each stage gives ZeRO 0's losses within the rounding of 16 bits: 0.4 % of two vectors' product, which the
    temperature multiplies by 20, and of gradients, which the stages add in other orders."""
    if command not in _once:
        _once[command] = losses(train(command, deepspeed="zero0", bf16=True))
    assert losses(train(command, deepspeed=f"zero{stage}", bf16=True)) == pytest.approx(_once[command], rel=2e-2)


@BOTH
@pytest.mark.parametrize("stage", [0, 2])
def test_fp16_finds_its_scale_and_trains(train, cuda, tmp_path, command, stage):
    """A scale of 2**28 overflows at first: those steps are skipped and counted, none changes the weights, and from the scale
    that fits on the loss falls."""
    config = {"fp16": {"enabled": "auto", "initial_scale_power": 28, "hysteresis": 1}, "zero_optimization": {"stage": stage}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    records = train(command, deepspeed=str(tmp_path / "ds.json"), fp16=True, max_steps=40, learning_rate=1e-3,
                    adam_epsilon=1e-8, lr_scheduler_type="constant")  # fmt: skip
    skipped = [record["skipped_steps"] for record in records]
    assert skipped[0] == 1 and records[0]["loss"] is None
    assert skipped[-1] == skipped[-5] <= 30
    finite = [loss for loss in losses(records) if loss is not None]
    assert len(finite) == 40 - skipped[-1] and np.isfinite(finite).all()
    assert np.mean(finite[-4:]) < 0.9 * np.mean(finite[:4])


def test_the_fused_optimizer_is_the_plain_one(train):
    """torch's fused AdamW gives the losses of the plain one."""
    found = train("finetune", optim="adamw_torch_fused", weight_decay=0.1)
    assert losses(found) == pytest.approx(losses(train("finetune", optim="adamw_torch", weight_decay=0.1)), rel=1e-5)


def test_tf32_is_set_and_is_near(train, reference, cuda):
    """--tf32 reaches torch, and gives the losses of fp32 within its 10 bits."""
    found = train("pretrain", tf32=True)
    assert torch.backends.cuda.matmul.allow_tf32
    assert losses(found) == pytest.approx(losses(reference("pretrain")), rel=5e-3)


def test_dupmae_by_the_kernels_is_dupmae_by_torch(train):
    """The bag of words, text by text in a kernel, gives the losses and gradient norms of torch's own operations."""
    found, expected = (train("pretrain", objective="dupmae", kernels=kernels) for kernels in ("auto", "torch"))
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    assert [r["grad_norm"] for r in found] == pytest.approx([r["grad_norm"] for r in expected], rel=1e-3)


@BOTH
def test_loader_workers_change_nothing(train, reference, command):
    """Worker processes, forked from one that holds a GPU, and page-locked memory bring the batches that the loop would make
    by itself."""
    found = train(command, dataloader_num_workers=2, dataloader_pin_memory=True)
    assert losses(found) == pytest.approx(losses(reference(command)), rel=1e-4)


@BOTH
@pytest.mark.parametrize("exactly", [True, False])
def test_a_resumed_run_is_the_whole_one(train, setting, tmp_path, command, exactly):
    """Stopped after step 3 and resumed, dropout included: bit-equal losses with --full_determinism, near ones without."""
    common = {"model_name_or_path": str(setting / "model"), "full_determinism": exactly, "max_steps": 6, "bf16": not exactly,
              "save_strategy": "steps", "save_steps": 3}  # fmt: skip
    whole = losses(train(command, **common, output_dir=str(tmp_path / "whole")))
    middle = str(tmp_path / "whole" / "checkpoint-3")
    rest = losses(train(command, **common, output_dir=str(tmp_path / "rest"), resume_from_checkpoint=middle))
    assert len(rest) == 3
    assert rest == whole[3:] if exactly else rest == pytest.approx(whole[3:], rel=2e-2)


@BOTH
def test_an_evaluation_while_training(train, setting, reference, command):
    """The figures after the last step are the CPU's, and no step before it is changed by them."""
    found = train(command, eval_data=[str(setting / "set")], eval_strategy="steps", eval_steps=2)
    expected = reference(command)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    for name in ("eval_set_nDCG@10", "eval_set_MRR@10"):
        assert found[-1][name] == pytest.approx(expected[-1][name], abs=0.02)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_evaluate_command(setting, device, tmp_path, bf16):
    """`python -m bge_ds.evaluate` on the GPU finds what it finds on the CPU; bf16 may swap neighbours of nearly one score."""
    results = []
    for name, more in ((device, ["--bf16"] * bf16 + ["--use_cpu"] * (device == "cpu")), ("cpu", ["--use_cpu"])):
        out = tmp_path / f"{len(results)}-{name}.json"
        where = ["--model_name_or_path", str(setting / "exact"), "--data", str(setting / "set"), "--output", str(out)]
        assert evaluate.main([*where, "--sentence_pooling_method", "mean", *more]) == 0
        results.append(json.loads(out.read_text())["results"]["set"]["nDCG@10"])
    assert results[0] == pytest.approx(results[1], abs=0.1 if bf16 else 0.01)


@BOTH
def test_recomputed_activations_change_nothing(train, setting, command):
    """--gradient_checkpointing, with dropout: the second forward pass draws the first one's masks."""
    common = {"model_name_or_path": str(setting / "model")}
    plain, again = train(command, **common), train(command, **common, gradient_checkpointing=True)
    assert losses(again) == pytest.approx(losses(plain), rel=1e-5)
    assert [r["grad_norm"] for r in again] == pytest.approx([r["grad_norm"] for r in plain], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_pieces_train_as_the_whole(train, stage):
    """GradCache in fp32 without dropout: two texts a piece give the losses and gradient norms of the whole batch."""
    whole = train("finetune", deepspeed=f"zero{stage}")
    pieces = train("finetune", deepspeed=f"zero{stage}", sub_batch_size=2)
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-5)
    assert [r["grad_norm"] for r in pieces] == pytest.approx([r["grad_norm"] for r in whole], rel=1e-4)


def test_compiled_layers_train_as_the_cpu(train, reference):
    """--torch_compile, in pieces, with layers computed again: the losses and gradient norms of the CPU, uncompiled."""
    found = train("finetune", torch_compile=True, token_bucket=256, sub_batch_size=12, gradient_checkpointing=True)
    assert losses(found) == pytest.approx(losses(reference("finetune")), rel=1e-4)
    for mine, theirs in zip(found, reference("finetune"), strict=False):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("model", "compiled"), [("exact", False), ("model", False), ("model", True)])
def test_a_piece_embedded_again_has_its_dropout(setting, device, model, compiled):
    """The gradient of pieces is that of the same pieces with one graph over all, their dropout seeded alike: a second forward
    pass with other masks would give another. Compiled, the first pass is a graph of its own."""
    texts, _ = pack(helpers.random_texts([3, 20, 7, 7, 40, 12, 9]))
    bounds = chunk_bounds(texts.runs, 2, None)
    pieces = [piece.to(torch.device(device)) for piece in split(texts, bounds)]
    encoder = Encoder.load(str(setting / model), "mean").to(device).train()
    if compiled:
        compile_layers(encoder.backbone, token_bucket=64)
    scale = torch.tensor(20.0, device=device)

    def embed(k: int):
        torch.manual_seed(k)
        return encoder(pieces[k]), scale

    def loss(vectors_ND, scale):
        return torch.logsumexp(vectors_ND @ vectors_ND.T * scale, 1).mean()

    sizes = [last - first for first, last in pairwise(bounds)]
    grad_cache.backward(embed, sizes, loss, lambda part: part.backward())
    found = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    loss(torch.cat([embed(k)[0] for k in range(len(sizes))]), scale).backward()
    largest = max(float(p.grad.abs().max()) for p in encoder.parameters() if p.grad is not None)
    for name, p in encoder.named_parameters():
        if name in found:
            assert (found[name] - p.grad).abs().max() <= 1e-5 * largest, name
