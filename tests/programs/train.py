"""Ranks that train with the commands, one run after the other.

Arguments: JSON of [[command, flags]]; "print" to print a run's ValueError and go on with the next one.
"""

import json

from bge_ds import finetune, pretrain, rerank
from bge_ds.config.arguments import FinetuneArguments, PretrainArguments, RerankArguments

COMMANDS = {
    "finetune": (finetune.train, FinetuneArguments),
    "pretrain": (pretrain.train, PretrainArguments),
    "rerank": (rerank.train, RerankArguments),
}


def train(command: str, flags: dict) -> None:
    work, kind = COMMANDS[command]
    work(kind.build(**flags, use_cpu=True))


def main(runs: str, errors: str = "raise") -> None:
    for command, flags in json.loads(runs):
        try:
            train(command, flags)
        except ValueError as error:
            if errors == "raise":
                raise
            print(f"refused: {error}", flush=True)
