"""What a step of bge_ds is made of, measured apart: `python benchmarks/own_parts.py JSON`; prints one line of JSON.

`what` in the JSON text:
  step    the encoder's forward and backward alone on the batches of a training run, and the matrix products they need
  loss    the contrastive loss alone, on as many ranks as were started
  model   writes a model of one of SHAPES with random weights

Shapes: T tokens, N texts, D features, O and I outputs and inputs of a linear layer, B queries, P passages.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig

from bge_ds.data import collate
from bge_ds.data.sampling import sampler
from bge_ds.data.shards import shard_reader
from bge_ds.distributed import collectives
from bge_ds.losses import contrastive
from bge_ds.losses.gather import contrastive_loss
from bge_ds.modeling.encoder import Encoder
from bge_ds.modeling.flops import backbone_flops, linear_flops

SQUARE = {"cpu": 2048, "cuda": 8192}  # side of the square product that stands for the best rate of the machine


def seconds_of(work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def typical(work, device: torch.device, times: int = 5) -> float:
    """Median time of `work`, the first call left out."""
    work()
    return statistics.median(seconds_of(work, device) for _ in range(times))


# ------------------------------------------------------------------------------------------------ matrix products


def linear_shapes(backbone: torch.nn.Module) -> list[tuple[int, int]]:
    """(outputs, inputs) of every linear layer that works on all tokens; the pooler's output is never used."""
    layers = [(name, m) for name, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)]
    return [tuple(m.weight.shape) for name, m in layers if not name.startswith("pooler")]


def linear_seconds(tokens: int, shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> float:
    """Time of the three products of every linear layer (output, gradient of the input, gradient of the weight)."""
    total = 0.0
    for shape in sorted(set(shapes)):
        w_OI = torch.randn(shape, dtype=dtype, device=device)
        x_TI = torch.randn(tokens, shape[1], dtype=dtype, device=device)
        dy_TO = torch.randn(tokens, shape[0], dtype=dtype, device=device)
        once = sum(product_seconds(a, b) for a, b in ((x_TI, w_OI.T), (dy_TO, w_OI), (dy_TO.T, x_TI)))
        total += once * shapes.count(shape)
    return total


def product_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Into memory that is there already: fetching fresh memory is no part of what a product needs."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    return typical(lambda: torch.mm(a, b, out=out), a.device)


def square_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one large square product."""
    n = SQUARE[device.type]
    return 2 * n**3 / product_seconds(*(torch.randn(n, n, dtype=dtype, device=device) for _ in range(2)))


# ------------------------------------------------------------------------------------------------ the encoder alone


def same_batches(asked: dict) -> list[collate.ContrastiveBatch]:
    """The batches of a run with --train_sampling_strategy sequential over the same shards."""
    data = shard_reader.open_folder(Path(asked["shards"]))
    spans = tuple(source.rows for source in data.manifest.sources)
    line = sampler.EpochSampler(seed=42, spans=spans, global_batch=asked["batch"], shuffle=False)
    options = dict(
        seed=42, group_size=asked["group"], query_max_len=asked["query_max_len"], passage_max_len=asked["passage_max_len"]
    )
    return [collate.collate_groups(data, *line.step_rows(step), **options) for step in range(asked["steps"])]


def measure_step(asked: dict) -> dict:
    """Seconds of forward and backward for each batch, FLOPs of their products, and the rates those were measured at."""
    device = torch.device("cuda" if asked["cuda"] else "cpu")
    dtype = torch.bfloat16 if asked["bf16"] else torch.float32
    encoder = Encoder.load(asked["model"], "mean", True).to(device=device, dtype=dtype).train()
    config, shapes = encoder.backbone.config, linear_shapes(encoder.backbone)
    seconds, tokens, flops, linear = [], [], [], []
    for batch in same_batches(asked):
        texts = batch.texts.to(device)
        gradient_ND = torch.randn(len(texts.place_N), config.hidden_size, device=device)
        encoder.zero_grad(set_to_none=True)
        seconds.append(seconds_of(lambda: encoder(texts).backward(gradient_ND), device))  # noqa: B023
        flops.append(backbone_flops(encoder.backbone, texts.runs))
        linear.append(linear_seconds(texts.tokens, shapes, dtype, device))
        tokens.append(texts.tokens)
    rate = sum(linear_flops(encoder.backbone, t) for t in tokens) / sum(linear)
    return {"seconds": seconds, "tokens": tokens, "flops": flops, "layer_rate": rate, "square_rate": square_rate(dtype, device)}


# ------------------------------------------------------------------------------------------------ the loss alone


def made_up_batch(queries: int, group: int) -> collate.ContrastiveBatch:
    """A batch of full groups without texts, every passage different from all others on all ranks."""
    passages = queries * group
    hashes_P = torch.arange(passages) + 1 + collectives.rank() * passages
    own_BG = torch.arange(passages).view(queries, group)
    return collate.ContrastiveBatch(
        texts=None, queries=queries, own_BG=own_BG, hashes_P=hashes_P, known_BK=hashes_P[own_BG[:, :1]],
        own_only_B=torch.zeros(queries, dtype=torch.bool), rows_B=torch.arange(queries),
    )  # fmt: skip


def measure_loss(asked: dict) -> dict | None:
    """Seconds of the loss, forward and backward with what is gathered, on rank 0."""
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(collectives.rank())
    batch, seconds = made_up_batch(asked["batch"], asked["group"]), []
    shares = [batch.share] * collectives.world_size()
    for _ in range(asked["steps"]):
        vectors_ND = torch.randn(asked["batch"] * (1 + asked["group"]), asked["width"])
        vectors_ND = torch.nn.functional.normalize(vectors_ND, dim=-1).requires_grad_()
        torch.distributed.barrier()
        began = time.perf_counter()
        parts = contrastive_loss(
            vectors_ND, 1 / asked["temperature"], batch, contrastive.ContrastiveSettings(), collectives.world_size() > 1, shares
        )
        parts.loss.backward()
        seconds.append(time.perf_counter() - began)
    first = collectives.rank() == 0
    torch.distributed.destroy_process_group()
    return {"seconds": seconds} if first else None


# ------------------------------------------------------------------------------------------------ models with random weights

SHAPES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    # Little but a vocabulary, and that XLM-R's.
    "vocabulary": dict(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536, vocab_size=250_002
    ),
}


def write_model(asked: dict) -> dict:
    """A BERT of the shape with random weights and the tokenizer of another model."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    shape = {"vocab_size": int(np.ceil(len(tokenizer) / 64)) * 64} | SHAPES[asked["shape"]]
    config = BertConfig(max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, **shape)
    folder = Path(asked["output"])
    shutil.rmtree(folder, ignore_errors=True)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder)}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    result = {"step": measure_step, "loss": measure_loss, "model": write_model}[asked["what"]](asked)
    if result is not None:
        print(json.dumps(result), flush=True)
