"""What in a run's data and settings will hurt, said before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from bge_ds.config.arguments import FinetuneArguments, PretrainArguments
from bge_ds.data import diagnosis
from bge_ds.data.beir import RetrievalSet
from bge_ds.data.diagnosis import PAGE
from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.shards.shard_reader import FinetuneShards, PretrainShards
from bge_ds.evaluation import retrieval
from bge_ds.evaluation.embedder import EmbeddingSettings
from bge_ds.modeling.retromae import read_objective

FEWEST_NEGATIVES = 3
TOKENS_A_PARAMETER = 2  # of pre-training from scratch, below which it cost more than it gained
SEPARABLE = 0.3  # share of the loss of guessing that must be reachable with orthogonal negatives


def of_finetuning(
    args: FinetuneArguments, data: FinetuneShards, tokenizer: PreTrainedTokenizerBase, negatives: int,
    eval_sets: Mapping[str, RetrievalSet],
) -> list[str]:  # fmt: skip
    """Findings about shards, model, temperature, batch and --eval_data. negatives: that a query is compared with."""
    found = diagnosis.of_shards(data) + _of_model(args)
    if args.sentence_pooling_method == "last_token" and not data.manifest.tokenizer.suffix_ids:
        found.append(
            "the tokenizer puts no token at the end of a text, so --sentence_pooling_method last_token takes the state of its "
            "last word: save one that does, by AutoTokenizer.from_pretrained(MODEL, add_eos_token=True), and give its folder "
            f"as --tokenizer_name ({PAGE}#end-token)"
        )
    found += _of_loss(args.temperature, negatives) if args.normalize_embeddings else []
    for name, of in eval_sets.items():
        texts = [(args.query_instruction_for_retrieval or "") + text for text in of.queries.values()]
        ids = retrieval.tokenize(tokenizer, texts, args.query_max_len)
        found += diagnosis.leaked(data, name, RaggedArrays.of_lists(ids, np.int32))
    return found


def of_pretraining(args: PretrainArguments, data: PretrainShards, parameters: int, epochs: float) -> list[str]:
    """Findings about shards and length of the run. parameters: of the encoder. epochs: of the whole run."""
    found = diagnosis.of_shards(data)
    if args.model_name_or_path:
        return found
    rows = diagnosis.sample(data)
    tokens = epochs * len(data) * float(np.minimum(data.lengths(rows), args.max_seq_length).mean())
    if tokens < TOKENS_A_PARAMETER * parameters:
        found.append(
            f"this run sees {tokens:,.0f} tokens for the {parameters:,} parameters of a random encoder: with fewer than "
            f"{TOKENS_A_PARAMETER} for each, fine-tuning without pre-training was better; raise --max_steps or "
            f"--num_train_epochs, add texts, or take a smaller model ({PAGE}#few-tokens)"
        )
    return found


def _of_model(args: FinetuneArguments) -> list[str]:
    """Pooling and instruction that differ from those that the model's own files name, or were pre-trained for."""
    folder, pooling = Path(args.model_name_or_path), args.sentence_pooling_method
    objective, found = read_objective(folder), []
    if objective in ("retromae", "dupmae") and pooling != "cls":
        found.append(
            f"{folder} was pre-trained by {objective}, which trains the vector of [CLS], and this run pools by {pooling}: "
            f"pre-training gains little or costs; give --sentence_pooling_method cls ({PAGE}#pooling)"
        )
    if objective == "mlm" and pooling == "cls":
        found.append(
            f"{folder} was pre-trained by mlm, which trains no vector of [CLS], and this run pools by it: pre-training costs "
            f"more than it gains; pre-train with --objective retromae, or give --sentence_pooling_method mean ({PAGE}#pooling)"
        )
    if not (folder / "modules.json").is_file():
        return found
    stored = EmbeddingSettings.read(folder)
    if stored.pooling != pooling:
        found.append(
            f"{folder} pools by {stored.pooling}, this run by {pooling}: much is lost; give "
            f"--sentence_pooling_method {stored.pooling} ({PAGE}#pooling)"
        )
    if stored.query_prompt and not args.query_instruction_for_retrieval:
        found.append(
            f"{folder} was trained with the query instruction {stored.query_prompt!r}, this run has none; give "
            f"--query_instruction_for_retrieval ({PAGE}#instructions)"
        )
    return found


def _of_loss(temperature: float, negatives: int) -> list[str]:
    """Where the loss stays high even for perfect vectors: similarities are at most 1, so 1 / temperature is all their range."""
    if negatives < FEWEST_NEGATIVES:
        return [
            f"a query is compared with {negatives} negatives; raise --per_device_train_batch_size or --train_group_size, or "
            f"use --negatives_cross_device ({PAGE}#batch)"
        ]
    reachable = math.log1p(negatives * math.exp(-1 / temperature)) / math.log1p(negatives)
    if reachable < SEPARABLE:
        return []
    return [
        f"with --temperature {temperature:g} and {negatives} negatives the loss cannot fall below {reachable:.0%} of that of "
        f"guessing, even if positives are equal and negatives orthogonal; 0.01 to 0.1 are usual ({PAGE}#temperature)"
    ]
