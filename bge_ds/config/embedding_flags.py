"""Flags of the commands that turn texts into vectors with a trained model."""

from __future__ import annotations

import argparse
import typing

from bge_ds.config.arguments import FinetuneArguments
from bge_ds.config.parser import positive_int, to_bool

POOLINGS = typing.get_args(typing.get_type_hints(FinetuneArguments)["sentence_pooling_method"])


def add_embedding_flags(parser: argparse.ArgumentParser) -> None:
    """Adds those that say how texts become vectors. Their names in the result are those that `Embedder.load` takes."""
    add = parser.add_argument
    add("--batch_size", type=positive_int, help="full-length texts a batch; of shorter ones, more (64, on a CPU 8)")
    add("--query_instruction_for_retrieval", dest="query_prompt", metavar="TEXT",
        help="prefix of queries (default: the model's stored prompt)")  # fmt: skip
    add("--passage_instruction_for_retrieval", dest="passage_prompt", metavar="TEXT",
        help="prefix of passages (default: the stored prompt)")  # fmt: skip
    add_model_flags(parser)
    add("--use_cpu", action="store_true", help="even where there is a GPU")
    add("--bf16", action="store_true", help="matrix products in bf16; vectors and scores stay fp32")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds those that say how token vectors become a text's, and where the model is kept; named likewise."""
    add = parser.add_argument
    add("--sentence_pooling_method", dest="pooling", choices=POOLINGS, help="default: what the model's files say")
    add("--normalize_embeddings", dest="normalize", type=to_bool, metavar="True|False", help="default: likewise")
    add("--cache_dir", help="where models fetched from the hub are kept")
