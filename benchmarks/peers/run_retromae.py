"""FlagEmbedding's own RetroMAE command (`FlagEmbedding.baai_general_embedding.retromae_pretrain.run`), its steps timed.

The command's `main` runs as it is, with its model, collator and trainer. It has no place for a callback, so the trainer's
class is replaced by one that takes the times and reads the texts in the order of the file; nothing that it computes changes.
With `"what": "input"` in the JSON text, its dataset and collator alone; `"tokenized"`: with every text's ids made beforehand.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

from FlagEmbedding.baai_general_embedding.retromae_pretrain import run
from FlagEmbedding.baai_general_embedding.retromae_pretrain.data import DatasetForPretraining, RetroMAECollator
from steps import measure, peak_bytes, report
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer

PACKAGES = ("FlagEmbedding", "torch", "transformers")


def flags(setting: dict) -> list[str]:
    values = {
        "model_name_or_path": setting["model"],
        "output_dir": setting["output"],
        "train_data": setting["data"],
        "max_seq_length": setting["max_seq_length"],
        "per_device_train_batch_size": setting["batch"],
        "max_steps": setting["steps"],
        "learning_rate": setting["learning_rate"],
        "optim": "adamw_torch_fused",
        "bf16": setting["bf16"],
        "use_cpu": not setting["cuda"],
        "dataloader_num_workers": setting["workers"],
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def train(setting: dict) -> None:
    class TimedInOrder(run.PreTrainer):
        def _get_train_sampler(self):
            return SequentialSampler(self.train_dataset)

        def train(self, **options):
            measure(self, partial(super().train, **options), PACKAGES, setting["cuda"])

    run.PreTrainer = TimedInOrder
    sys.argv = [run.__file__, *flags(setting)]
    run.main()


def with_ids_ready(tokenizer, texts: list[str], length: int):
    """The tokenizer, whose `encode` finds ids made beforehand; the same object, as the collator asks for its class."""
    ids = {text: tokenizer.encode(text, max_length=length, truncation=True) for text in texts}
    tokenizer.encode = lambda text, **options: list(ids[text])  # a copy: the collator writes into it
    return tokenizer


def time_input(setting: dict) -> None:
    """As a DataLoader without workers fetches: the items of a batch, then the collator. Its probabilities are the command's."""
    dataset = DatasetForPretraining(setting["data"])
    length, batch = setting["max_seq_length"], setting["batch"]
    collator = RetroMAECollator(
        AutoTokenizer.from_pretrained(setting["model"]),
        max_seq_length=length,
        encoder_mlm_probability=0.3,
        decoder_mlm_probability=0.5,
    )
    if setting["tokenized"]:
        with_ids_ready(collator.tokenizer, [dataset[row] for row in range(batch * setting["steps"])], length)
    seconds, masks = [], []
    for step in range(setting["steps"]):
        began = time.perf_counter()
        made = collator([dataset[row] for row in range(step * batch, (step + 1) * batch)])
        seconds.append(time.perf_counter() - began)
        masks.append(made["encoder_attention_mask"])
    tokens, padded = [int(mask.sum()) for mask in masks], [mask.numel() for mask in masks]
    report(seconds, tokens, padded, peak_bytes(False), PACKAGES)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    time_input(asked) if asked["what"] == "input" else train(asked)
