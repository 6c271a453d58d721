"""The other sides of benchmarks/gpu.sh: padded models as most loops run them, and sentence-transformers.

All have 16-bit weights and torch's AdamW, as our side has there, and take the batch's own ids.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_setting import GROUP, Place, optimizer_of
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, BertTokenizerFast

from bge_ds.data import collate


def padded(rows: list[torch.Tensor], place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of texts, N x L each."""
    ids_NL = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real_NL = torch.arange(ids_NL.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]
    return ids_NL.to(place.device), real_NL.long().to(place.device)


def rows_of(batch: collate.ContrastiveBatch) -> list[torch.Tensor]:
    """The ids of each text, queries first, on the CPU."""
    texts = batch.texts
    rows = torch.tensor_split(texts.ids_T.cpu(), texts.cu_seqlens[1:-1].cpu().long())
    return [rows[k] for k in texts.place_N.tolist()]


def padded_finetuning(place: Place, config, batch: collate.ContrastiveBatch) -> Callable[[], None]:
    """The plain loop: a padded model with SDPA, queries and passages apart, cross entropy over all passages."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="sdpa").to(place.device, place.dtype).train()
    optimizer = optimizer_of(model, place)
    rows = rows_of(batch)
    sides = [padded(part, place) for part in (rows[: batch.queries], rows[batch.queries :])]
    target_B = torch.arange(batch.queries, device=place.device) * GROUP

    def step() -> None:
        q_BD, p_PD = (F.normalize(model(ids, real).last_hidden_state[:, 0].float(), dim=-1) for ids, real in sides)
        F.cross_entropy(q_BD @ p_PD.T / 0.02, target_B).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def padded_pretraining(place: Place, config, batch: collate.PretrainBatch) -> Callable[[], None]:
    """The plain loop: SDPA with the decoder's masks, logits of all positions."""
    from own_pretraining import PlainRetroMAE
    from own_pretraining import padded as padded_texts

    model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa")
    model.config.output_hidden_states = True
    plain = PlainRetroMAE(model, 4).to(place.device, place.dtype).train()
    rows, optimizer = [x.to(place.device) for x in padded_texts(batch.texts)], optimizer_of(plain, place)

    def step() -> None:
        plain(*rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sentence_transformers_finetuning(
    place: Place, config, batch: collate.ContrastiveBatch, mini_batch_tokens: int | None
) -> Callable[[], None]:
    """sentence-transformers' ranking loss, whole or cached in pieces of so many tokens, each column padded by itself.

    Where flash_attn is installed its models run without padding. ModuleNotFoundError where the package itself is not.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses, modules

    torch.manual_seed(0)
    attention = "flash_attention_2" if find_spec("flash_attn") and not place.dry else "sdpa"
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(config).save_pretrained(folder)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (Path(folder) / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        BertTokenizerFast(str(Path(folder) / "vocab.txt")).save_pretrained(folder)
        transformer = modules.Transformer(folder, model_kwargs={"attn_implementation": attention})
        model = SentenceTransformer(modules=[transformer, modules.Pooling(config.hidden_size, "cls")], device=str(place.device))
    model = model.to(place.device, place.dtype).train()
    if mini_batch_tokens is None:
        loss = losses.MultipleNegativesRankingLoss(model, scale=50.0)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_num_tokens=mini_batch_tokens)
    optimizer, rows = optimizer_of(model, place), rows_of(batch)
    passages = rows[batch.queries :]
    columns = [rows[: batch.queries], *(passages[place_of::GROUP] for place_of in range(GROUP))]
    features = [dict(zip(("input_ids", "attention_mask"), padded(part, place), strict=True)) for part in columns]

    def step() -> None:
        loss([dict(column) for column in features], None).backward()  # its models add their results to what they are given
        optimizer.step()
        optimizer.zero_grad()

    return step
