"""What is mined: the distinct passages and queries of the input, and which passages are each query's positives.

Shapes: G groups, Q distinct query texts, N texts of the input, U passages that are stored.

Texts are told apart by a hash of their content, without the white space around it. Memory holds 16 bytes a text of the input,
and some 60 while they are sorted; the texts themselves are on the disk:

    passages.arrow   `text`: first the pool, in the order of the input, then positives that are not in it
    queries.arrow    `text`: each distinct query once, with its prompt before it
    *.npy            ARRAYS
"""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash

from bge_ds.data.preprocess import validate
from bge_ds.data.preprocess.input_files import Source, read_segments
from bge_ds.data.ragged import inside

PASSAGES, QUERIES = "passages", "queries"
ARRAYS = (
    "vector",  # G: row of queries.arrow
    "query",  # G: number q of the query's text
    "own",  # Q: row of the passage that equals the query, or -1
    "positives",  # of each q, rows of passages, rising, end to end
    "starts",  # Q + 1: where those of each q begin
)
_BATCH = 1024  # texts
_DIGEST = 16  # bytes


def groups_of(sources: list[Source]) -> Iterator[dict[str, Any]]:
    """The groups of an input, checked. Raises ValueError for the first bad line, with its file and number."""
    return (group for _, group in _records(sources, "finetune"))


def texts_of(sources: list[Source]) -> Iterator[str]:
    """The texts of a candidate pool, with their titles. Raises ValueError likewise."""
    for place, record in _records(sources, "texts"):
        if not record["text"]:
            raise ValueError(f'{place}: "text" is an empty text')
        yield record["text"]


def _records(sources: list[Source], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, source in enumerate(sources):
        for block in read_segments(source, index, sys.maxsize):
            for number, record in validate.records(block.lines(), block.first, kind):
                place = f"{source.name}:{number + source.first_number}"
                if isinstance(record, str):
                    raise ValueError(f"{place}: {record}")
                if source.is_table and kind == "finetune":
                    try:
                        as_line(record)
                    except TypeError as error:
                        raise ValueError(f"{place}: a value cannot be written as JSON ({error})") from None
                yield place, record


def as_line(group: dict[str, Any]) -> bytes:
    """A group as a line of JSON."""
    return orjson.dumps(group, option=orjson.OPT_APPEND_NEWLINE)


def digest(text: str) -> bytes:
    """16 bytes that texts of one content share."""
    return xxhash.xxh3_128_digest(text.strip().encode())


def distinct(digests: bytes | bytearray) -> tuple[np.ndarray, np.ndarray]:
    """(row of each of N digests, whether it is the first of its row); rows are numbered in the order of their firsts."""
    keys_N2 = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order_N = np.lexsort(keys_N2.T)  # stable: equal ones stay in order
    sorted_N2 = keys_N2[order_N]
    new_N = np.ones(len(order_N), bool)
    new_N[1:] = (sorted_N2[1:] != sorted_N2[:-1]).any(axis=1)
    is_first_N = np.zeros(len(order_N), bool)
    is_first_N[order_N[new_N]] = True
    number_N = np.cumsum(is_first_N) - 1
    rows_N = np.empty(len(order_N), np.int64)
    rows_N[order_N] = number_N[order_N[new_N]][np.cumsum(new_N) - 1]
    return rows_N, is_first_N


def write_plan(folder: Path, sources: list[Source], pool: list[Source] | None, query_prompt: str) -> dict[str, int]:
    """Writes the files of a plan; returns how many `groups`, `queries`, `pool` (possible negatives) and `passages` there are.

    pool: the candidates; None: all positives and negatives. query_prompt: of groups without a `prompt` of their own.
    """

    def passages() -> Iterator[str]:
        yield from () if pool is None else texts_of(pool)
        for group in groups_of(sources):
            yield from group["pos"]
            yield from group["neg"] if pool is None else ()

    def with_prompt(group: dict[str, Any]) -> str:
        return (query_prompt if group.get("prompt") is None else group["prompt"]) + group["query"]

    texts, prompted, plain = bytearray(), bytearray(), bytearray()
    for text in () if pool is None else texts_of(pool):
        texts += digest(text)
    candidates, pos_G, all_G = len(texts) // _DIGEST, array("q"), array("q")
    for group in groups_of(sources):
        begin = len(texts) // _DIGEST
        for text in itertools.chain(group["pos"], group["neg"] if pool is None else ()):
            texts += digest(text)
        pos_G.append(len(group["pos"]))
        all_G.append(len(texts) // _DIGEST - begin)
        plain += digest(group["query"])
        prompted += digest(with_prompt(group))
    for given, count in ((sources, len(pos_G)), (pool, candidates)):
        if given is not None and not count:
            raise ValueError(f"{', '.join(source.name for source in given)}: no line to read")
    (vector_G, is_vector), (rows_N, is_passage) = distinct(prompted), distinct(texts + plain)
    is_passage = is_passage[: len(texts) // _DIGEST]
    stored = int(is_passage.sum())
    size = stored if pool is None else int(is_passage[:candidates].sum())
    begins_G = candidates + np.cumsum(all_G) - all_G
    positives = rows_N[np.repeat(begins_G, pos_G) + inside(np.array(pos_G))]
    arrays = {"vector": vector_G, **_positives(distinct(plain), positives, np.array(pos_G), rows_N[-len(pos_G) :], size)}
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", arrays[name])
    _write_texts(folder / f"{PASSAGES}.arrow", itertools.compress(passages(), is_passage), stored)
    queries = itertools.compress(map(with_prompt, groups_of(sources)), is_vector)
    _write_texts(folder / f"{QUERIES}.arrow", queries, int(is_vector.sum()))
    return {"groups": len(pos_G), "queries": int(is_vector.sum()), "pool": size, "passages": stored}


def _positives(
    queries: tuple[np.ndarray, np.ndarray], positives: np.ndarray, pos_G: np.ndarray, own_G: np.ndarray, pool: int
) -> dict[str, np.ndarray]:
    """The arrays by query text: the positives of all its groups together, and the passage that it equals itself."""
    query_G, is_first_G = queries
    base = int(positives.max()) + 1
    pairs = np.unique(np.repeat(query_G, pos_G) * base + positives)
    own_Q = own_G[is_first_G]
    starts = np.searchsorted(pairs // base, np.arange(len(own_Q) + 1))
    return {"query": query_G, "own": np.where(own_Q < pool, own_Q, -1), "positives": pairs % base, "starts": starts}


def _write_texts(path: Path, texts: Iterable[str], count: int) -> None:
    """An Arrow file of one column, `text`, in batches of _BATCH. Raises ValueError unless there are `count`."""
    schema, texts = pa.schema([("text", pa.string())]), iter(texts)
    with pa.ipc.new_file(str(path), schema) as writer:
        while batch := list(itertools.islice(texts, _BATCH)):
            writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema=schema))
            count -= len(batch)
    if count:
        raise ValueError("the input was changed while it was read: run the same command again")


class Plan:
    """A plan that was written: its arrays, mapped, and the text of any passage."""

    def __init__(self, folder: Path) -> None:
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
        self.vector, self.query, self.own, self.positives, self.starts = arrays
        self._texts = pa.ipc.open_file(pa.memory_map(str(folder / f"{PASSAGES}.arrow")))
        self._batch = lru_cache(_BATCH)(self._texts.get_batch)

    def text(self, passage: int) -> str:
        return self._batch(passage // _BATCH).column(0)[passage % _BATCH].as_py()

    def positives_of(self, query: int) -> np.ndarray:
        """The passages that are positives of a query text in any group."""
        return self.positives[self.starts[query] : self.starts[query + 1]]
