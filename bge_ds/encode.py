"""Texts to vectors on disk: `python -m bge_ds.encode --model_name_or_path M --input corpus.jsonl --output vectors`.

Under `deepspeed` or `torchrun` the ranks share the work. Killed and started again, it continues. The vectors are opened by
`bge_ds.encoding.vectors.open_vectors`, or as the `.npy` files that they are.
"""

from __future__ import annotations

import argparse
import sys
import typing
from pathlib import Path

from bge_ds.config.embedding_flags import add_embedding_flags
from bge_ds.config.parser import CommandParser, exit_status, positive_int
from bge_ds.encoding.manifest import DType
from bge_ds.evaluation import DEFAULT_LENGTHS


def parser() -> argparse.ArgumentParser:
    p = CommandParser(prog="bge_ds.encode", description=__doc__.split("\n")[0].split(": ")[0], allow_abbrev=False)
    add = p.add_argument
    query, passage = DEFAULT_LENGTHS["query_max_len"], DEFAULT_LENGTHS["passage_max_len"]
    add("--model_name_or_path", required=True, help="folder or hub name of the model")
    add("--input", required=True, nargs="+", metavar="PATH",
        help="files of `text` (`title`, `_id`), folders, quoted globs, hub data sets, or folders of shards")  # fmt: skip
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the vectors go")
    add("--side", choices=("query", "passage"), default="passage", help="whose prompt and length the texts get")
    add("--max_len", type=positive_int,
        help=f"tokens, prompt and special tokens included (queries {query}, passages {passage})")  # fmt: skip
    add("--dim", type=positive_int, help="first features that are kept, normalised again (default: all)")
    add("--dtype", choices=typing.get_args(DType), default="float32", help="type of the features on disk")
    add("--columns", nargs="+", default=[], metavar="FIELD=COLUMN", help="what the input calls a field, e.g. text=contents")
    add("--allow_empty", action="store_true", help="encode texts that are empty, too")
    add("--overwrite", action="store_true", help="replace vectors of another job in --output")
    add_embedding_flags(p)
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # which launchers add
    return p


def run(args: argparse.Namespace) -> None:
    from bge_ds.encoding.run import Options, encode  # torch is loaded here: --help needs none of it

    given = {name: value for name, value in vars(args).items() if name != "local_rank"}
    if (made := encode(Options(**given))) is not None:
        settings = made.settings
        counts = f"{made.counts['texts']:,} vectors of {settings.dim} features in {settings.dtype}"
        print(f"wrote {args.output}: {counts}, {made.counts['tokens']:,} tokens")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 2 after a one-line message about a mistake of the user."""
    args = parser().parse_args(argv)
    return exit_status(lambda: run(args), "the same command continues from the blocks that are finished")


if __name__ == "__main__":
    sys.exit(main())
