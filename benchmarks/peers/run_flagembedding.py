"""FlagEmbedding's own fine-tuning command (`FlagEmbedding.finetune.embedder.encoder_only.base`), its steps timed.

The command's argument classes, runner, model, collator and trainer are used as they are; a callback takes the times.
With `"what": "rerank"` in the JSON text, the command that trains rerankers
(`FlagEmbedding.finetune.reranker.encoder_only.base`); with `"what": "loss"`, the embedder's loss alone on given vectors, on as
many ranks as were started.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import torch
import torch.distributed as dist
from FlagEmbedding.abc.finetune.reranker import (
    AbsRerankerDataArguments,
    AbsRerankerModelArguments,
    AbsRerankerTrainingArguments,
)
from FlagEmbedding.finetune.embedder.encoder_only.base import (
    EncoderOnlyEmbedderDataArguments,
    EncoderOnlyEmbedderModelArguments,
    EncoderOnlyEmbedderRunner,
    EncoderOnlyEmbedderTrainingArguments,
)
from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel
from FlagEmbedding.finetune.reranker.encoder_only.base import EncoderOnlyRerankerRunner
from steps import measure
from transformers import HfArgumentParser


def flags(setting: dict) -> list[str]:
    values = {
        "model_name_or_path": setting["model"],
        "output_dir": setting["output"],
        "train_data": setting["data"],
        "cache_path": setting["output"] + "/cache",
        "train_group_size": setting["group"],
        "query_max_len": setting["query_max_len"],
        "passage_max_len": setting["passage_max_len"],
        "per_device_train_batch_size": setting["batch"],
        "max_steps": setting["steps"],
        "learning_rate": setting["learning_rate"],
        "bf16": setting["bf16"],
        "use_cpu": not setting["cuda"],
        # The order of the file, as on every side: the same texts in the same steps.
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
    }
    if setting["what"] != "rerank":
        values |= {"sentence_pooling_method": "mean", "normalize_embeddings": True, "temperature": setting["temperature"]}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def train(setting: dict) -> None:
    kinds = (EncoderOnlyEmbedderModelArguments, EncoderOnlyEmbedderDataArguments, EncoderOnlyEmbedderTrainingArguments)
    make = EncoderOnlyEmbedderRunner
    if setting["what"] == "rerank":
        kinds, make = (
            (AbsRerankerModelArguments, AbsRerankerDataArguments, AbsRerankerTrainingArguments),
            EncoderOnlyRerankerRunner,
        )
    model, data, training = HfArgumentParser(kinds).parse_args_into_dataclasses(flags(setting))
    runner = make(model_args=model, data_args=data, training_args=training)
    measure(runner.trainer, runner.run, ("FlagEmbedding", "torch", "transformers"), setting["cuda"])


class GivenVectors(BiEncoderOnlyEmbedderModel):
    """The model with its vectors given instead of encoded: what is left of a forward pass is the loss."""

    def encode(self, features):
        return features


def time_loss(setting: dict) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = GivenVectors(
        torch.nn.Identity(), negatives_cross_device=dist.get_world_size() > 1, temperature=setting["temperature"]
    )
    rows = (setting["batch"], setting["batch"] * setting["group"])
    seconds = []
    for _ in range(setting["steps"]):
        q_BD, p_PD = (torch.nn.functional.normalize(torch.randn(n, setting["width"]), dim=-1).requires_grad_() for n in rows)
        dist.barrier()
        began = time.perf_counter()
        model(q_BD, p_PD).loss.backward()
        seconds.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        print(json.dumps({"seconds": seconds, "versions": {"FlagEmbedding": version("FlagEmbedding")}}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    time_loss(asked) if asked["what"] == "loss" else train(asked)
