"""Folders in BEIR's form: a corpus, queries, and which passages are relevant to a query. Every line is checked."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from bge_ds.data.preprocess import input_files, validate

_SPLITS = ("train", "dev", "test", "val", "valid", "validation", "eval")  # names that need their parent's to tell them apart


@dataclass
class RetrievalSet:
    """A checked BEIR folder. Passages stay on disk: `passages()` reads them again, in the order of `passage_ids`.

    Equal texts are encoded and searched once, as `distinct()` gives them: two encodings may differ in their last bit, and
    the order of equal texts would be random. firsts: the row of each distinct text. copies: its index -> its other rows.
    """

    name: str
    corpus: Path
    passage_ids: list[str]
    queries: dict[str, str]  # those that have at least one relevant passage
    qrels: dict[str, dict[str, int]]  # query id -> passage id -> grade
    firsts: list[int]
    copies: dict[int, list[int]]
    unjudged: int = 0  # queries left out because no passage is relevant to them

    def passages(self) -> Iterator[str]:
        return (text for _, _, text in read_texts(self.corpus))

    def distinct(self) -> Iterator[str]:
        firsts = iter(self.firsts)
        wanted = next(firsts)
        for row, text in enumerate(self.passages()):
            if row == wanted:
                yield text
                wanted = next(firsts, -1)


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` that exists in `folder`, plain or with `.gz`."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise ValueError(f"{folder} holds no {' or '.join(names)} (plain or .gz): give a folder in BEIR's form")


def read_texts(path: Path) -> Iterator[tuple[str, str, str]]:
    """(`file:line`, id, text) of each line of a corpus or of queries."""
    for place, line in input_files.read_lines(path):
        try:
            row = validate.parse_object(line)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        identity, text, title = row.get("_id"), row.get("text"), row.get("title") or ""
        if not isinstance(identity, str) or not identity:
            raise ValueError(f"{place}: _id must be a non-empty string, not {identity!r}")
        if not isinstance(text, str) or not isinstance(title, str):
            raise ValueError(f"{place}: text (and title, where there is one) must be a string")
        yield place, identity, validate.with_title(title, text)


def read_qrels(path: Path, passages: Collection[str], queries: Collection[str]) -> dict[str, dict[str, int]]:
    """query id -> passage id -> grade. Ids that are not in `passages` or `queries` are errors."""
    qrels: dict[str, dict[str, int]] = {}
    for index, (place, line) in enumerate(input_files.read_lines(path)):
        try:
            fields = line.decode().rstrip("\r").split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line)") from None
        if len(fields) != 3:
            raise ValueError(f"{place}: {len(fields)} tab-separated fields, not query-id, corpus-id, score")
        query, passage, grade = fields
        try:
            value = int(grade)
        except ValueError:
            if index == 0:
                continue  # the header
            raise ValueError(f"{place}: the score must be a whole number, not {grade!r}") from None
        if query not in queries:
            raise ValueError(f"{place}: query {query!r} is not among the queries of this folder")
        if passage not in passages:
            raise ValueError(f"{place}: passage {passage!r} is not in the corpus of this folder")
        qrels.setdefault(query, {})[passage] = value
    return qrels


def read_folder(folder: Path, flag: str = "--data") -> RetrievalSet:
    """Reads and checks a BEIR folder. Raises ValueError, naming file and line."""
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: no such folder")
    corpus, queries_file = find_file(folder, "corpus.jsonl"), find_file(folder, "queries.jsonl")
    qrels_file = find_file(folder, "qrels.tsv", "qrels/test.tsv")
    places: dict[str, str] = {}
    known: dict[int, int] = {}  # hash of a text -> its index
    firsts, copies = [], {}
    for row, (place, identity, text) in enumerate(read_texts(corpus)):
        if identity in places:
            raise ValueError(f"{place}: passage {identity!r} was given before, at {places[identity]}")
        places[identity] = place
        index = known.setdefault(xxhash.xxh3_128_intdigest(text.encode()), len(firsts))
        if index == len(firsts):
            firsts.append(row)
        else:
            copies.setdefault(index, []).append(row)
    if not places:
        raise ValueError(f"{corpus}: an empty corpus")
    queries: dict[str, str] = {}
    for place, identity, text in read_texts(queries_file):
        if identity in queries:
            raise ValueError(f"{place}: query {identity!r} was given before")
        if not text:
            raise ValueError(f"{place}: an empty query")
        queries[identity] = text
    qrels = read_qrels(qrels_file, places.keys(), queries)
    qrels = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not qrels:
        raise ValueError(f"{qrels_file}: no query has a relevant passage (a score above 0)")
    kept = {query: queries[query] for query in qrels}
    return RetrievalSet(folder.name, corpus, list(places), kept, qrels, firsts, copies, len(queries) - len(kept))


def read_folders(folders: list[Path], flag: str) -> dict[str, RetrievalSet]:
    """The checked sets of several folders under distinct names (see `names_of`)."""
    return {name: read_folder(folder, flag) for name, folder in zip(names_of(folders), folders, strict=True)}


def names_of(folders: list[Path]) -> list[str]:
    """A name for each folder: its own, with its parent's before it (`debian_dev`) where needed, or else the whole path."""
    folders = [folder.resolve() for folder in folders]
    if len(set(folders)) < len(folders):
        raise ValueError(f"the same folder twice: {', '.join(map(str, folders))}; give each once")
    own = [folder.name for folder in folders]
    names = [
        f"{folder.parent.name}_{folder.name}" if own.count(folder.name) > 1 or folder.name.lower() in _SPLITS else folder.name
        for folder in folders
    ]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
