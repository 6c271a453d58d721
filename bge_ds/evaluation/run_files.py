"""Rankings as files: read in TREC's or BEIR's form, written in TREC's.

    TREC's     a line for each passage: query id, Q0, passage id, rank, score, name of the run
    BEIR's     one JSON object, query id -> passage id -> score; FlagEmbedding's has it under "search_results"

The score decides; equal scores are in the falling order of their ids, as trec_eval has it, and the rank of a line is not used.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bge_ds.data.beir import RetrievalSet
from bge_ds.data.files import write_whole
from bge_ds.data.preprocess import input_files
from bge_ds.evaluation.retrieval import KEPT

Run = dict[str, dict[str, float]]  # query id -> passage id -> score
_FORMS = 'TREC\'s lines "query Q0 passage rank score run" or a JSON object {query: {passage: score}}'


def read_run(path: Path, data: RetrievalSet, flag: str = "--search_results") -> tuple[Run, int]:
    """(the ranking of `data`'s queries, how many other queries the file has).

    Raises ValueError where the file does not rank passages of `data`; it names the file and the line (JSON: query and passage).
    """
    if not path.is_file():
        raise ValueError(f"{flag} {path}: no such file; give {_FORMS}")
    passages = set(data.passage_ids)
    run = _read_json(path, passages) if _starts_an_object(path) else _read_trec(path, passages)
    kept = {query: run[query] for query in data.queries if query in run}
    if not kept:
        raise ValueError(f"{path}: none of its {len(run)} queries is one that {data.name} has relevant passages for")
    return kept, len(run) - len(kept)


def _starts_an_object(path: Path) -> bool:
    _, first = next(input_files.read_lines(path), ("", b""))
    return first.lstrip().startswith(b"{")


def _read_trec(path: Path, passages: Collection[str]) -> Run:
    run: Run = {}
    for place, line in input_files.read_lines(path):
        try:
            fields = line.decode().split()
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line)") from None
        if len(fields) != 6:
            raise ValueError(f"{place}: {len(fields)} fields, not the 6 of a TREC run; give {_FORMS}")
        query, _, passage, _, score, _ = fields
        found = run.setdefault(query, {})
        if passage in found:
            raise ValueError(f"{place}: passage {passage!r} was given before for query {query!r}")
        found[passage] = _score(score, passage, passages, place)
    return run


def _read_json(path: Path, passages: Collection[str]) -> Run:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            content = json.load(file, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}, column {error.colno}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    content = content.get("search_results", content)
    if not isinstance(content, dict):
        raise ValueError(f'{path}: "search_results" must be an object {{query: {{passage: score}}}}')
    for query, found in content.items():
        if not isinstance(found, dict):
            raise ValueError(f"{path}: query {query!r} must have an object {{passage: score}}, not {str(found)[:40]!r}")
        for passage, score in found.items():
            found[passage] = _score(score, passage, passages, f"{path}: query {query!r}")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _score(given: Any, passage: str, passages: Collection[str], place: str) -> float:
    if passage not in passages:
        raise ValueError(f"{place}: passage {passage!r} is not in the corpus of this folder")
    try:
        score = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{place}: the score of passage {passage!r} must be a finite number, not {given!r}")
    return score


# --------------------------------------------------------------------------------------------------------- writing


def check_ids(data: RetrievalSet) -> None:
    """Raises ValueError for an id that a TREC run cannot hold."""
    for kind, ids in (("query", data.queries), ("passage", data.passage_ids)):
        if bad := next((identity for identity in ids if len(identity.split()) != 1), None):
            raise ValueError(f"--run_output: {data.name} has the {kind} id {bad!r}, and a TREC run parts its fields at spaces")


def of_found(data: RetrievalSet, found_Q: list[dict[int, float]], kept: int = KEPT) -> Run:
    """The ranking by passage ids, best first, of one by distinct texts (`retrieval.rank_with`). kept: of each query."""
    run: Run = {}
    for query, found in zip(data.queries, found_Q, strict=True):
        rows = [(row, score) for index, score in found.items() for row in (data.firsts[index], *data.copies.get(index, ()))]
        run[query] = {data.passage_ids[row]: score for row, score in rows[:kept]}
    return run


def in_order(run: Run) -> Run:
    """A ranking that was read, best first."""
    return {
        query: dict(sorted(sorted(found.items(), reverse=True), key=lambda entry: -entry[1])) for query, found in run.items()
    }


def first_of(run: Run, depth: int) -> dict[str, list[str]]:
    """The first `depth` passages of each query. run: best first."""
    return {query: list(found)[:depth] for query, found in run.items()}


def reordered(run: Run, depth: int, scores: Iterator[float]) -> Run:
    """The ranking with those of `first_of` in the order of new scores, which come in their order; best first.

    Equal scores keep their order. What was deeper stays behind, with scores that fall from the lowest new one.
    """
    made: Run = {}
    for query, top in first_of(run, depth).items():
        new = {passage: next(scores) for passage in top}
        ordered = dict(sorted(new.items(), key=lambda entry: -entry[1]))
        low = min(new.values(), default=0.0)
        rest = list(run[query])[depth:]
        made[query] = ordered | {passage: low - 1 - place for place, passage in enumerate(rest)}
    return made


def by_place(run: Run) -> Run:
    """The ranking, best first, with places for scores, so that measures do not reorder equal scores by passage id."""
    return {query: {passage: -float(place) for place, passage in enumerate(found)} for query, found in run.items()}


def write_run(path: Path, run: Run, tag: str) -> None:
    """A TREC run of a ranking that is in order, best first; the file is replaced as a whole.

    Equal scores are lowered by the least step of fp32 each, so that every program keeps the order.
    """
    lines, tag = [], "_".join(tag.split())
    for query, found in run.items():
        last = np.float32(np.inf)
        for rank, (passage, score) in enumerate(found.items(), start=1):
            last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
            lines.append(f"{query} Q0 {passage} {rank} {last!s} {tag}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines).encode())
