"""Pre-training's parts of our side: `python benchmarks/own_pretraining.py JSON`; prints one line of JSON.

`what` in the JSON text:
  texts   writes the first texts of a file, or texts joined from them until each is long enough
  input   our input pipeline alone: Arrow shards in, batches out, in this process or through a worker of the loader; with
          `masks`, what our model draws in the step is drawn too
  plain   a plain RetroMAE trainer, what the gpu rows compare with: padded, scores of the whole vocabulary at every place
  needed  the products that RetroMAE needs for the batches of a run, and the rate of a large square product

Shapes: N texts, L tokens of a text, T tokens of all texts, D features.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from own_parts import seconds_of, square_rate
from sides import different_texts
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from bge_ds.config.arguments import PretrainArguments
from bge_ds.data import collate, dataloader
from bge_ds.data.sampling import sampler
from bge_ds.data.shards import shard_reader
from bge_ds.kernels import masks, packed
from bge_ds.modeling.flops import attention_flops
from bge_ds.training.metrics import peak_memory

ENCODER_SHARE, DECODER_SHARE = PretrainArguments.encoder_mlm_probability, PretrainArguments.decoder_mlm_probability


# ------------------------------------------------------------------------------------------------ the texts


def write_texts(asked: dict) -> dict:
    """The first `count` different texts of the source; with `least_tokens`, joined until each has so many."""
    texts = different_texts(Path(asked["source"]))
    if asked["least_tokens"]:
        texts = joined(texts, AutoTokenizer.from_pretrained(asked["model"]), asked["least_tokens"])
    found = list(islice(texts, asked["count"]))
    if len(found) < asked["count"]:
        raise SystemExit(
            f"{asked['source']} gives {len(found)} different texts of at least {asked['least_tokens']} tokens, "
            f"{asked['count']} are needed; give more data, smaller batches or fewer steps"
        )
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found)
    Path(asked["target"]).write_text("".join(lines), encoding="utf-8")
    return {"texts": len(found)}


def joined(texts: Iterator[str], tokenizer, least_tokens: int) -> Iterator[str]:
    parts = []
    for text in texts:
        parts.append(text)
        if len(tokenizer(" ".join(parts), verbose=False)["input_ids"]) >= least_tokens:
            yield " ".join(parts)
            parts = []


# ------------------------------------------------------------------------------------------------ the input pipeline


def order_of(asked: dict, data: shard_reader.PretrainShards) -> sampler.EpochSampler:
    """The order of a run with --train_sampling_strategy sequential."""
    spans = tuple(source.rows for source in data.manifest.sources)
    return sampler.EpochSampler(seed=42, spans=spans, global_batch=asked["batch"], shuffle=False)


def batches_of(asked: dict) -> Iterator[collate.PretrainBatch]:
    """The batches of that run, without an end; in this process, or with `worker` as the command's loader gives them."""
    data = shard_reader.open_folder(Path(asked["shards"]))
    line = order_of(asked, data)
    options = {"seed": 42, "max_seq_length": asked["max_seq_length"], "encoder_share": ENCODER_SHARE}
    if not asked.get("worker"):
        step = 0
        while True:
            yield collate.collate_texts(data, *line.step_rows(step), **options)
            step += 1
    steps = dataloader.steps(
        data.folders, line, collate.collate_texts, first_step=0, end_step=asked["steps"] * asked["rounds"],
        accumulation=1, rank=0, world=1, workers=1, pin_memory=False, **options,
    )  # fmt: skip
    for (batch,) in steps:
        yield batch


def time_input(asked: dict) -> dict:
    """One figure for `rounds` batches, which one batch is too quick for: their mean. Epoch after epoch of the same texts."""
    found, seconds, tokens = batches_of(asked), [], []
    if asked.get("masks"):
        mask_id = AutoTokenizer.from_pretrained(asked["model"]).mask_token_id
        found = (draw_masks(batch, mask_id) for batch in found)
    for _ in range(asked["steps"]):
        began = time.perf_counter()
        sizes = [batch.texts.tokens for batch in islice(found, asked["rounds"])]
        seconds.append((time.perf_counter() - began) / asked["rounds"])
        tokens.append(round(sum(sizes) / len(sizes)))
    note = f"mean of {asked['rounds']} batches each"
    return {"note": note, **record(seconds, tokens, tokens, peak_memory(torch.device("cpu")))}


def draw_masks(batch: collate.PretrainBatch, mask_id: int) -> collate.PretrainBatch:
    """The batch, with all other masks made and dropped: our model draws them in the step, FlagEmbedding's collator before."""
    texts, masked_M = batch.texts, batch.masked_M
    key_M = batch.keys_N.repeat_interleave(texts.cu_seqlens.diff())[masked_M]
    masks.corrupt(texts.ids_T[masked_M], key_M, texts.positions_T[masked_M], mask_id=mask_id, vocab_size=30_000)
    words = batch.words_T.split([n * length for n, length in texts.runs])
    keys = batch.keys_N.split([n for n, _ in texts.runs])
    for (n, length), words_T, keys_N in zip(texts.runs, words, keys, strict=True):
        masks.decoder_visible(keys_N, words_T.view(n, length), DECODER_SHARE)
    return batch


def record(seconds: list[float], tokens: list[int], padded: list[int], peak: float) -> dict:
    versions = {"torch": torch.__version__}
    return {"seconds": seconds, "tokens": tokens, "padded": padded, "peak_bytes": peak, "versions": versions}


# ------------------------------------------------------------------------------------------------ the plain trainer


class PlainRetroMAE(nn.Module):
    """Hugging Face's model on padded texts, a post-norm decoder layer with SDPA under a mask, two full cross entropies.

    forward(ids_NL, real_NL) -> the sum of both losses. Masks are drawn token by token, on the device.
    """

    def __init__(self, model: nn.Module, mask_id: int):
        super().__init__()
        width, inner = model.config.hidden_size, model.config.intermediate_size
        self.model, self.mask_id, self.heads = model, mask_id, model.config.num_attention_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.feed = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(model.config.hidden_dropout_prob)

    def forward(self, ids_NL, real_NL):
        inner_NL = real_NL & real_NL.roll(-1, 1)
        inner_NL[:, 0] = False
        masked_NL = inner_NL & (torch.rand_like(ids_NL, dtype=torch.float32) < ENCODER_SHARE)
        out = self.model(ids_NL.masked_fill(masked_NL, self.mask_id), real_NL, output_hidden_states=True)
        first_N1D = out.hidden_states[-1][:, :1]

        embeddings = self.model.base_model.embeddings
        keys_NLD = torch.cat([first_N1D, embeddings(ids_NL)[:, 1:]], 1)
        query_NLD = embeddings(inputs_embeds=first_N1D.expand(keys_NLD.shape))
        states_NLD = self._decode(query_NLD, keys_NLD, real_NL)
        decoder_scores = self.model.cls(states_NLD)
        return cross_entropy(out.logits, ids_NL, masked_NL) + cross_entropy(decoder_scores, ids_NL, inner_NL)

    def _decode(self, query_NLD, keys_NLD, real_NL):
        texts, length = real_NL.shape
        visible_NLL = torch.rand(texts, length, length, device=real_NL.device) >= DECODER_SHARE
        visible_NLL &= real_NL[:, None]
        visible_NLL.diagonal(dim1=1, dim2=2).fill_(False)
        visible_NLL[:, :, 0] = True
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query_NLD), (self.key, keys_NLD), (self.value, keys_NLD))
        )
        dropped = self.model.config.attention_probs_dropout_prob if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_NLL[:, None], dropout_p=dropped)
        x = self.norm_1(query_NLD + self.dropout(self.out(mixed.transpose(1, 2).flatten(2))))
        return self.norm_2(x + self.dropout(self.feed(x)))


def cross_entropy(scores_NLV, ids_NL, predicted_NL):
    return F.cross_entropy(scores_NLV.flatten(0, 1), ids_NL.masked_fill(~predicted_NL, -100).flatten())


def padded(texts: packed.PackedTexts) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_NL, real_NL): the texts as a rectangle, and where it holds a token."""
    rows = torch.tensor_split(texts.ids_T, texts.cu_seqlens[1:-1].long())
    ids_NL = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths_N = texts.cu_seqlens.diff()
    return ids_NL, torch.arange(ids_NL.shape[1])[None] < lengths_N[:, None]


def train_plain(asked: dict) -> dict:
    """fp32 weights, bf16 by autocast, AdamW fused, clipped at 1."""
    device = torch.device("cuda" if asked["cuda"] else "cpu")
    torch.manual_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    model = PlainRetroMAE(AutoModelForMaskedLM.from_pretrained(asked["model"]), tokenizer.mask_token_id).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked["learning_rate"], fused=True)

    def step(ids_NL, real_NL):
        with torch.autocast(device.type, torch.bfloat16, enabled=asked["bf16"]):
            loss = model(ids_NL.to(device), real_NL.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds, tokens, places = [], [], []
    for batch in islice(batches_of(asked), asked["steps"]):
        ids_NL, real_NL = padded(batch.texts)
        seconds.append(seconds_of(lambda: step(ids_NL, real_NL), device))  # noqa: B023
        tokens.append(batch.texts.tokens)
        places.append(ids_NL.numel())
    return record(seconds, tokens, places, peak_memory(device))


def measure_needed(asked: dict) -> dict:
    """FLOPs of each step: encoder, one decoder layer, and the head only at the places that are predicted."""
    device = torch.device("cuda" if asked["cuda"] else "cpu")
    config = AutoConfig.from_pretrained(asked["model"])
    width, layers = config.hidden_size, config.num_hidden_layers + 1
    layer = layers * (4 * width**2 + 2 * width * config.intermediate_size)
    head = (1 + ENCODER_SHARE) * (width**2 + width * config.vocab_size)

    def pairs(batch) -> int:
        return sum(n * length**2 for n, length in batch.texts.runs)

    flops = [
        6.0 * batch.texts.tokens * (layer + head) + attention_flops(width, layers * pairs(batch))
        for batch in islice(batches_of(asked), asked["steps"])
    ]
    return {"flops": flops, "square_rate": square_rate(torch.bfloat16 if asked["bf16"] else torch.float32, device)}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    work = {"texts": write_texts, "input": time_input, "plain": train_plain, "needed": measure_needed}[asked["what"]]
    print(json.dumps(work(asked)), flush=True)
