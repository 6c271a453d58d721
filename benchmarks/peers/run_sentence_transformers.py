"""sentence-transformers' own trainer with one of its ranking losses, its steps timed.

`"loss"` in the JSON text: plain (MultipleNegativesRankingLoss) or cached (CachedMultipleNegativesRankingLoss), the latter
with `"mini_batch"` texts a piece, or `"mini_batch_tokens"` tokens a piece.
"""

from __future__ import annotations

import json
import sys

from datasets import Dataset
from sentence_transformers import (
    DefaultBatchSampler,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from steps import measure
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments


class InOrder(DefaultBatchSampler):
    """Batches in the order of the file, as on every side: the same texts in the same steps."""

    def __init__(self, dataset, **options):
        super().__init__(SequentialSampler(dataset), **options)


def read(file: str, group: int) -> Dataset:
    """Columns anchor, positive and one for each negative of a group."""
    columns: dict[str, list[str]] = {}
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            negatives = {f"negative_{i}": text for i, text in enumerate(row["neg"][: group - 1])}
            for name, text in {"anchor": row["query"], "positive": row["pos"][0], **negatives}.items():
                columns.setdefault(name, []).append(text)
    return Dataset.from_dict(columns)


def arguments(setting: dict, kind: type) -> TrainingArguments:
    return kind(
        output_dir=setting["output"],
        per_device_train_batch_size=setting["batch"],
        max_steps=setting["steps"],
        learning_rate=setting["learning_rate"],
        bf16=setting["bf16"],
        use_cpu=not setting["cuda"],
        batch_sampler=InOrder,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    )


def train(setting: dict) -> None:
    model = SentenceTransformer(setting["model"], device="cuda" if setting["cuda"] else "cpu")
    # One limit for all columns; the driver checks that no query was longer than its own (the tokens are the other sides').
    model.max_seq_length = setting["passage_max_len"]
    scale = 1 / setting["temperature"]
    if setting["loss"] == "plain":
        loss = losses.MultipleNegativesRankingLoss(model, scale=scale)
    else:
        pieces = {"mini_batch_size": setting["mini_batch"]} if setting["mini_batch"] else {}
        pieces |= {"mini_batch_num_tokens": setting["mini_batch_tokens"]} if setting["mini_batch_tokens"] else {}
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, **pieces)
    args, data = arguments(setting, SentenceTransformerTrainingArguments), read(setting["data"], setting["group"])
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
    measure(trainer, trainer.train, ("sentence-transformers", "torch", "transformers"), setting["cuda"])


if __name__ == "__main__":
    train(json.loads(sys.argv[1]))
