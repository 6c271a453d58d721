"""The command `python -m bge_ds.rerank`. Arguments: its own."""

import sys

from bge_ds import rerank


def main(*words: str) -> None:
    sys.exit(rerank.main(list(words)))
