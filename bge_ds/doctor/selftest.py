"""A test across all ranks: compares one training step with that of a single process, and times an all_reduce.

It runs the code of training: engine, padding-free forward, gather with gradients, contrastive loss, the config's ZeRO section.
Shapes: B queries of a rank, D features.
"""

from __future__ import annotations

import copy
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModel, BertConfig

from bge_ds.config.arguments import FinetuneArguments
from bge_ds.data import collate
from bge_ds.deepspeed_engine import ds_config as configs
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.kernels import packed
from bge_ds.losses.gather import contrastive_loss
from bge_ds.modeling.encoder import Encoder, build_backbone
from bge_ds.objectives import contrastive

QUERIES, GROUP, VOCABULARY, SEED = 2, 2, 200, 7  # queries a rank, passages a query
REDUCED_BYTES = 16 << 20
# AdamW's first step is lr * g / (|g| + eps). A large eps lets the step depend on the size of the gradient; with the usual
# one it would be little more than the sign.
ADAM = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1.0}


def run(zero: dict, use_cpu: bool, timeout_s: int) -> dict:
    """On every rank. zero: the `zero_optimization` section of a DeepSpeed config.

    Returns ranks, stage, on rank 0 `difference` and, with several ranks, seconds and bytes_per_second of an all_reduce.
    """
    device = engines.start(use_cpu=use_cpu, timeout_s=timeout_s)
    world, rank = collectives.world_size(), collectives.rank()
    torch.manual_seed(SEED)
    model = tiny_encoder()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    alone = copy.deepcopy(model)
    args = FinetuneArguments.build(
        output_dir="none", train_data="none", model_name_or_path="none", negatives_cross_device=True, temperature=0.05,
        per_device_train_batch_size=QUERIES, train_group_size=GROUP, sentence_pooling_method="mean",
    )  # fmt: skip
    engine = build_engine(model, zero, world)
    engine.train()
    own = make_batch(range(rank * QUERIES, (rank + 1) * QUERIES)).to(device)
    contrastive.backward(engine, own, args, contrastive.objective_of(args), lambda piece: None)
    engine.step()
    found = engines.full_parameters(engine)
    result = {"ranks": world, "stage": zero.get("stage", 0)}
    if rank == 0:
        expected = step_alone(alone.to(device), make_batch(range(world * QUERIES)).to(device), args)
        result["difference"] = difference(before, found, expected)
    if world > 1:
        result |= time_all_reduce(device)
    return result


def tiny_encoder() -> Encoder:
    """A two-layer BERT. Its random weights are large, since small ones give all texts nearly the same vector."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.15, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Encoder(build_backbone(AutoModel, config), "mean")


def build_engine(model: Encoder, zero: dict, world: int):
    values = configs.auto_values(
        micro_batch=QUERIES, accumulation=1, world=world, clip=0.0, precision="fp32",
        elements=engines.count_elements(model), trainable=engines.count_elements(model, trainable=True),
        learning_rate=ADAM["lr"], betas=ADAM["betas"], epsilon=ADAM["eps"], weight_decay=0.0, total_steps=1, warmup_steps=0,
    )  # fmt: skip
    config = configs.merge_config({"zero_optimization": zero}, "the doctor's test", values)
    groups = engines.parameter_groups(model, 0.0)
    return engines.build(model, config, groups, adam=ADAM, optim="adamw_torch", schedule=None)


def make_batch(queries: range) -> collate.ContrastiveBatch:
    """These queries and their passages. A text's tokens and length depend on its number only."""
    count = len(queries)
    passages = range(queries.start * GROUP, queries.stop * GROUP)

    def text(kind: int, number: int) -> np.ndarray:
        generator = np.random.default_rng([SEED, kind, number])
        return generator.integers(5, VOCABULARY, generator.integers(4, 24)).astype(np.int64)

    texts, _ = packed.pack([*map(partial(text, 0), queries), *map(partial(text, 1), passages)])
    own_BG = torch.arange(count * GROUP).unflatten(0, (count, GROUP))
    hashes_P = torch.tensor(list(passages))
    return collate.ContrastiveBatch(
        texts=texts, queries=count, own_BG=own_BG, hashes_P=hashes_P, known_BK=hashes_P[own_BG[:, :1]],
        own_only_B=torch.zeros(count, dtype=torch.bool), rows_B=torch.tensor(list(queries)),
    )  # fmt: skip


def step_alone(model: Encoder, batch: collate.ContrastiveBatch, args: FinetuneArguments) -> dict[str, torch.Tensor]:
    """The weights after a step on the whole batch in plain torch, without engine and gather."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM, weight_decay=0.0)
    scale = torch.tensor(1 / args.temperature, device=batch.hashes_P.device)
    loss = contrastive_loss(model(batch.texts), scale, batch, contrastive.objective_of(args), cross_device=False).loss
    loss.backward()
    optimizer.step()
    return {name: weight.detach().cpu() for name, weight in model.named_parameters()}


def difference(before: dict, found: dict, expected: dict) -> float:
    """The largest difference between the found and expected weights, relative to the largest expected change."""
    largest = max(float((expected[name] - weight).abs().max()) for name, weight in before.items())
    apart = torch.stack([(found[name] - expected[name]).abs().max() for name in before])
    return float(apart.max()) / largest  # max of a tensor: nan stays nan


def time_all_reduce(device: torch.device, times: int = 5) -> dict:
    """The fastest of several all_reduces; each rank sends 2 (N - 1) / N of the bytes."""
    values, seconds = torch.ones(REDUCED_BYTES // 4, device=device), []
    for _ in range(times + 1):  # the first opens the connections
        collectives.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        float(values[0])  # waits for the device
        seconds.append(time.perf_counter() - started)
        values.fill_(1.0)
    world = collectives.world_size()
    fastest = min(seconds[1:])
    return {"seconds": fastest, "bytes_per_second": 2 * (world - 1) / world * REDUCED_BYTES / fastest}
