"""The command `python -m bge_ds.finetune`. Arguments: its own."""

import sys

from bge_ds import finetune


def main(*words: str) -> None:
    sys.exit(finetune.main(list(words)))
