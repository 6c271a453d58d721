"""sentence-transformers' own trainer of cross-encoders, its steps timed.

The loss is ListNet's with labels so far apart that their softmax is 1 and 0: the cross entropy of the positive among its group.
"""

from __future__ import annotations

import json
import sys

from datasets import Dataset
from run_sentence_transformers import arguments
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments, losses
from steps import TokenCounter, measure

APART = 100.0


def read(file: str) -> Dataset:
    columns: dict[str, list] = {"query": [], "passages": [], "labels": []}
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            columns["query"].append(row["query"])
            columns["passages"].append([*row["pos"], *row["neg"]])
            columns["labels"].append([APART] * len(row["pos"]) + [0.0] * len(row["neg"]))
    return Dataset.from_dict(columns)


def counter_of(model: CrossEncoder) -> type[TokenCounter]:
    """A counter of what the model makes of texts: the loss hands it texts, not the trainer tensors."""

    class Counter(TokenCounter):
        def __init__(self, training_step):
            super().__init__(training_step)
            self.preprocess, model.preprocess = model.preprocess, self.count

        def __call__(self, *inputs, **options):
            self.counts.append([])
            self.padded.append(0)
            return self.training_step(*inputs, **options)

        def count(self, *pairs, **options):
            made = self.preprocess(*pairs, **options)
            self.counts[-1].append(made["attention_mask"].sum())
            self.padded[-1] += made["attention_mask"].numel()
            return made

    return Counter


def train(setting: dict) -> None:
    length = setting["query_max_len"] + setting["passage_max_len"]
    model = CrossEncoder(setting["model"], max_length=length, device="cuda" if setting["cuda"] else "cpu")
    args = arguments(setting, CrossEncoderTrainingArguments)
    trainer = CrossEncoderTrainer(model=model, args=args, train_dataset=read(setting["data"]), loss=losses.ListNetLoss(model))
    packages = ("sentence-transformers", "torch", "transformers")
    measure(trainer, trainer.train, packages, setting["cuda"], counter_of(model))
    model.save_pretrained(setting["output"])


if __name__ == "__main__":
    train(json.loads(sys.argv[1]))
