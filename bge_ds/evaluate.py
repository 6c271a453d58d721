"""Retrieval quality of an embedding model: `python -m bge_ds.evaluate --model_name_or_path M --data FOLDER`.

A folder is in BEIR's form: `corpus.jsonl` (`_id`, optional `title`, `text`), `queries.jsonl` (`_id`, `text`) and
`qrels.tsv` or `qrels/test.tsv` (query-id, corpus-id, score), each plain or `.gz`.

Shapes: Q queries, D features.

The search is exact. The corpus is encoded in blocks and only the best passages of each query are kept, so memory does not grow
with the corpus. All lines are checked before the model is loaded, so that a mistake is found within seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import typing
from pathlib import Path

from bge_ds.config.embedding_flags import add_embedding_flags
from bge_ds.config.parser import positive_int
from bge_ds.data.files import write_whole
from bge_ds.evaluation import DEFAULT_LENGTHS

if typing.TYPE_CHECKING:
    from bge_ds.evaluation.embedder import Embedder


def load_embedder(args: argparse.Namespace) -> Embedder:
    """The model with the settings of the flags; prints what they are and where they come from."""
    from bge_ds.evaluation.embedder import Embedder

    given = {name: value for name, value in vars(args).items() if name not in ("model_name_or_path", "data", "output", "bm25")}
    embedder = Embedder.load(args.model_name_or_path, **given)
    print(f"{args.model_name_or_path} {embedder.describe()}", file=sys.stderr)
    print(", ".join(f"{key} {value}" for key, value in embedder.lengths.items()), file=sys.stderr)
    return embedder


def table(rows: list[tuple[str, dict[str, float]]], head: str = "data") -> str:
    """The measures of each named row, as text in columns."""
    from bge_ds.evaluation.retrieval import NAMES

    width = max(len(head), *(len(name) for name, _ in rows))
    lines = [f"{head:<{width}}  " + "  ".join(f"{name:>10}" for name in NAMES)]
    lines += [f"{name:<{width}}  " + "  ".join(f"{values[n]:>10.4f}" for n in NAMES) for name, values in rows]
    return "\n".join(lines)


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bge_ds.evaluate", description=__doc__.split("\n")[0].split(": ")[0])
    add = p.add_argument
    add("--model_name_or_path", required=True, help="folder or hub name of the model")
    add("--data", required=True, nargs="+", type=Path, metavar="FOLDER", help="folders in BEIR's form")
    for name, default in DEFAULT_LENGTHS.items():
        add(f"--{name}", type=positive_int, help=f"tokens, prompt and special tokens included ({default})")
    add_embedding_flags(p)
    add("--bm25", type=float, metavar="WEIGHT",
        help="also rank by words (BM25), and by both: similarity + WEIGHT x BM25 / its best score; try 0.25")  # fmt: skip
    add("--output", type=Path, metavar="FILE.json", help="also write the figures and settings here")
    return p


def run(args: argparse.Namespace) -> None:
    from bge_ds.data.beir import read_folder
    from bge_ds.evaluation.retrieval import VECTORS, evaluate_with

    names = [folder.resolve().name for folder in args.data]
    if args.output is not None and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder: name a file, such as {args.output}/scores.json")
    sets = [read_folder(folder) for folder in args.data]
    embedder = load_embedder(args)
    # Two folders of one name (`a/dev`, `b/dev`) are told apart by the path that was given.
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, args.data, strict=True)]
    results: dict[str, dict[str, float]] = {}
    for label, data in zip(labels, sets, strict=True):
        for kind, values in evaluate_with(data, embedder, args.bm25).items():
            results[label if kind == VECTORS else f"{label}, {kind}"] = values
    print(table(list(results.items())))
    for label, values in results.items():
        if values["queries_left_out"]:
            print(f"{label}: {values['queries_left_out']} queries have no relevant passage and were left out")
    if args.output is not None:
        content = {"model": args.model_name_or_path, "settings": embedder.effective(), "results": results}
        write_json(args.output, content)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 2 after a one-line message about a mistake of the user."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
