"""A command of bge_ds. Arguments: its name, such as finetune, and its own."""

import importlib
import sys


def main(name: str, *words: str) -> None:
    sys.exit(importlib.import_module(f"bge_ds.{name}").main(list(words)))
