"""Ranks that train at ZeRO 3 on a model loaded whole or sharded, as each run asks. Argument: JSON of [[command, flags]]."""

import contextlib
import json

from bge_ds.deepspeed_engine import engine as engines
from programs.train import train


def main(runs: str) -> None:
    sharded_loading, built = engines.sharded_loading, engines.build
    for command, flags in json.loads(runs):
        sharded = flags.pop("sharded")

        # What is added, or enlarged by tokens, after the loading.
        added = ("lora_", "decoder.", *(["word_embeddings"] if "additional_special_tokens" in flags else []))

        def build(model, *args, sharded=sharded, added=added, **kwargs):
            loaded = [p for n, p in model.named_parameters() if not any(a in n for a in added)]
            assert all(hasattr(p, "ds_id") == sharded for p in loaded)
            return built(model, *args, **kwargs)

        engines.sharded_loading = sharded_loading if sharded else lambda *args, **kwargs: contextlib.nullcontext()
        engines.build = build
        train(command, flags)
