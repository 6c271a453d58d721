"""Retrieval quality of an embedding model: `python -m bge_ds.evaluate --model_name_or_path M --data FOLDER`.

A folder is in BEIR's form: `corpus.jsonl` (`_id`, optional `title`, `text`), `queries.jsonl` (`_id`, `text`) and
`qrels.tsv` or `qrels/test.tsv` (query-id, corpus-id, score), each plain or `.gz`. In place of a model, `--search_results` takes
rankings that another program has made.

Shapes: Q queries, D features.

The search is exact. The corpus is encoded in blocks and only the best passages of each query are kept, so memory does not grow
with the corpus. All lines are checked before the model is loaded, so that a mistake is found within seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path

from bge_ds.config.embedding_flags import add_embedding_flags
from bge_ds.config.parser import exit_status, positive_int
from bge_ds.data.files import write_whole
from bge_ds.evaluation import DEFAULT_LENGTHS

if typing.TYPE_CHECKING:
    from bge_ds.data.beir import RetrievalSet
    from bge_ds.evaluation.embedder import Embedder
    from bge_ds.evaluation.run_files import Run
    from bge_ds.scoring.teachers import Teacher

    # Name, measures and sizes, the ranking best first, name of the run, what was searched.
    Row = tuple[str, dict[str, float], Run, str, RetrievalSet]

_OF_MODEL = (
    "batch_size", "query_prompt", "passage_prompt", "pooling", "normalize", "cache_dir", "use_cpu", "bf16", *DEFAULT_LENGTHS
)  # fmt: skip
_OF_RERANKER = ("batch_size", "cache_dir", "use_cpu", "bf16")
RERANK_DEPTH = 100


def load_embedder(args: argparse.Namespace) -> Embedder:
    """The model with the settings of the flags; prints what they are and where they come from."""
    from bge_ds.evaluation.embedder import Embedder

    given = {name: getattr(args, name) for name in _OF_MODEL}
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
    add("--model_name_or_path", help="folder or hub name of the model")
    add("--search_results", nargs="+", type=Path, metavar="FILE",
        help="in place of a model: TREC runs or JSON {query: {passage: score}}; one a folder, or several of one")  # fmt: skip
    add("--data", required=True, nargs="+", type=Path, metavar="FOLDER", help="folders in BEIR's form")
    for name, default in DEFAULT_LENGTHS.items():
        add(f"--{name}", type=positive_int, help=f"tokens, prompt and special tokens included ({default})")
    add_embedding_flags(p)
    add("--bm25", type=float, metavar="WEIGHT",
        help="also rank by words (BM25), and by both: similarity + WEIGHT x BM25 / its best score; try 0.25")  # fmt: skip
    add(
        "--rerank",
        metavar="MODEL",
        help="cross-encoder: also a row for each ranking with its first passages in this one's order",
    )
    add("--rerank_depth", type=positive_int, help=f"with --rerank: passages of a query that are scored ({RERANK_DEPTH})")
    add("--rerank_max_len", type=positive_int, help="with --rerank: tokens of a pair (512)")
    add("--output", type=Path, metavar="FILE.json", help="also write the figures and settings here")
    add("--run_output", type=Path, metavar="FOLDER", help="also write each ranking here, as a TREC run")
    return p


def check(args: argparse.Namespace) -> None:
    """Refuse what the flags alone make wrong. Raises ValueError."""
    if args.output is not None and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder: name a file, such as {args.output}/scores.json")
    if args.run_output is not None and args.run_output.exists() and not args.run_output.is_dir():
        raise ValueError(f"--run_output {args.run_output} is a file: name a folder, which gets a file for each ranking")
    if len({folder.resolve() for folder in args.data}) < len(args.data):
        raise ValueError(f"--data {' '.join(map(str, args.data))}: the same folder twice; give each once")
    if args.rerank is None and (
        vain := [name for name in ("rerank_depth", "rerank_max_len") if getattr(args, name) is not None]
    ):
        raise ValueError(f"--{vain[0]} has no effect without --rerank; add that or drop --{vain[0]}")
    if args.search_results is None:
        if (args.rerank_depth or 0) > RERANK_DEPTH:
            raise ValueError(
                f"--rerank_depth {args.rerank_depth}: rankings of a model have {RERANK_DEPTH} passages; give fewer"
            )
        if args.model_name_or_path is None:
            raise ValueError("--model_name_or_path is missing: name a model, or give rankings as --search_results")
        return
    flags = {action.dest: action for action in parser()._actions}
    heeded = () if args.rerank is None else _OF_RERANKER
    for name in (name for name in ("model_name_or_path", "bm25", *_OF_MODEL) if name not in heeded):
        if getattr(args, name) != flags[name].default:
            flag = flags[name].option_strings[0]
            raise ValueError(f"{flag} has no effect with --search_results, whose rankings are made; drop one of them")
    folders, files = len(args.data), len(args.search_results)
    if folders not in (1, files):
        raise ValueError(f"--search_results names {files} files for {folders} folders of --data; give one for each")


def rankings_of_model(args: argparse.Namespace, embedder: Embedder, sets: dict[str, RetrievalSet]) -> Iterator[Row]:
    """By vectors and, with --bm25, by words and by both."""
    from bge_ds.evaluation import retrieval, run_files

    for label, data in sets.items():
        started = time.perf_counter()
        found = retrieval.rank_with(data, embedder, args.bm25)
        sizes = retrieval.sizes_of(data) | {"seconds": round(time.perf_counter() - started, 2)}
        for kind, found_Q in found.items():
            values = retrieval.measure(data, retrieval.ranking(data, found_Q)) | sizes
            name = label if kind == retrieval.VECTORS else f"{label}, {kind}"
            yield name, values, run_files.of_found(data, found_Q), f"{Path(args.model_name_or_path).name}-{kind}", data


def rankings_of_files(args: argparse.Namespace, sets: dict[str, RetrievalSet]) -> Iterator[Row]:
    """Those of --search_results. All files are read before the first is judged."""
    from bge_ds.evaluation import retrieval, run_files

    pairs = list(
        zip(list(sets.items()) * (len(args.search_results) if len(sets) == 1 else 1), args.search_results, strict=True)
    )
    own = [path.name for path in args.search_results]
    runs = [run_files.read_run(path, data) for (_, data), path in pairs]
    for ((label, data), path), (run, others) in zip(pairs, runs, strict=True):
        if others:
            print(f"{path}: {others} queries are not judged in {label} and were left out", file=sys.stderr)
        if missing := len(data.queries) - len(run):
            print(f"{path}: {missing} queries of {label} have no passages and count as 0", file=sys.stderr)
        name = label if len(pairs) == len(sets) else f"{label}, {path.name if len(set(own)) == len(own) else path}"
        yield name, retrieval.measure(data, run) | retrieval.sizes_of(data), run_files.in_order(run), path.stem, data


def with_reranked(args: argparse.Namespace, rows: Iterator[Row], teacher: Teacher) -> Iterator[Row]:
    """Each row, then the same in the order of --rerank's scores."""
    from bge_ds.evaluation import retrieval, run_files
    from bge_ds.scoring.rerank import rerank

    for name, values, ranked, tag, data in rows:
        yield name, values, ranked, tag, data
        started = time.perf_counter()
        made = rerank(teacher, data, ranked, args.rerank_depth or RERANK_DEPTH)
        places = run_files.by_place(made)
        sizes = retrieval.sizes_of(data) | {"seconds": round(time.perf_counter() - started, 2)}
        yield f"{name}, reranked", retrieval.measure(data, places) | sizes, made, f"{tag}-reranked", data


def run(args: argparse.Namespace) -> None:
    from bge_ds.data.beir import read_folder
    from bge_ds.evaluation import run_files

    check(args)
    names = [folder.resolve().name for folder in args.data]
    # Two folders of one name (`a/dev`, `b/dev`) are told apart by the path that was given.
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, args.data, strict=True)]
    sets = {label: read_folder(folder) for label, folder in zip(labels, args.data, strict=True)}
    for data in sets.values() if args.run_output is not None else ():
        run_files.check_ids(data)
    teacher = None
    if args.rerank is not None:
        from bge_ds.scoring.rerank import load_reranker

        how = {name: getattr(args, name) for name in _OF_RERANKER}
        teacher = load_reranker(args.rerank, flag="--rerank", max_len=args.rerank_max_len, **how)
        print(f"{args.rerank}: {teacher.describe()}", file=sys.stderr)
    about: dict = {"search_results": [str(path) for path in args.search_results or ()]}
    if args.search_results is not None:
        rows = rankings_of_files(args, sets)
    else:
        embedder = load_embedder(args)
        rows = rankings_of_model(args, embedder, sets)
        about = {"model": args.model_name_or_path, "settings": embedder.effective()}
    if teacher is not None:
        rows, about = (
            with_reranked(args, rows, teacher),
            about | {"rerank": args.rerank, "rerank_settings": vars(teacher.settings)},
        )
    results: dict[str, dict[str, float]] = {}
    for name, values, ranked, tag, _ in rows:
        results[name] = values
        if args.run_output is not None:
            run_files.write_run(args.run_output / f"{name.replace('/', '_')}.trec", ranked, tag)
    print(table(list(results.items())))
    for name, values in results.items():
        if values["queries_left_out"]:
            print(f"{name}: {values['queries_left_out']} queries have no relevant passage and were left out")
    if args.output is not None:
        write_json(args.output, about | {"results": results})


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 2 after a one-line message about a mistake of the user."""
    args = parser().parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
