"""What is mined: the distinct passages and queries of the input, and which passages are each query's positives.

Shapes: G groups, Q distinct query texts, N texts of the input, U distinct passages.

Texts are told apart by digests of what the input (`lines.py`, `shards.py`) takes for their content. Memory holds 16 bytes a
text of the input, and some 60 while they are sorted. Passages are numbered by first occurrence: first the pool, in the order of
the input, then positives that are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from bge_ds.encoding.inputs import ShardInput

PASSAGES, QUERIES = "passages", "queries"
ARRAYS = (
    "vector",  # G: number of the query with its prompt, among the distinct ones
    "query",  # G: number q of the query's text
    "own",  # Q: the passage that equals the query, or -1
    "positives",  # of each q, its passages, rising, end to end
    "starts",  # Q + 1: where those of each q begin
)
DIGEST = 16  # bytes


class Written(NamedTuple):
    """An output. hash: of all its bytes. lost: groups that had `neg_scores`, which fit the old negatives."""

    hash: str
    lost: int


class Input(Protocol):
    """Groups as lines or as shards: how their plan is made, what of them is encoded, and what they are written as."""

    def check_output(self, output: Path, overwrite: bool) -> None:
        """Raises ValueError for an output that is there already, or that cannot be written."""

    def identity(self) -> dict[str, Any]:
        """By flag, hashes of all that is read. Files that have not changed are not read again."""

    def write_plan(self, folder: Path, query_prompt: str) -> dict[str, int]:
        """Writes ARRAYS, and what the methods below need; returns how many `groups`, `queries`, `pool` (possible negatives) and
        `passages` there are. query_prompt: of groups without a prompt of their own. Raises ValueError for a bad group."""

    def token_ids(self, name: str, folder: Path | None = None) -> ShardInput | None:
        """The PASSAGES or QUERIES of the plan in `folder`, or all where that is not written yet; None: they are texts, in
        NAME.arrow there."""

    def written(
        self, output: Path, folder: Path, negatives: Iterator[np.ndarray], job: str, overwrite: bool
    ) -> AbstractContextManager[Written]:
        """Writes the output, which appears when the block ends without an error.

        negatives: of each group in the order of the input, passages of the plan in `folder`. job: a hash of all that decides
        the output."""

    def hash_of(self, output: Path) -> str | None:
        """The hash of an output that is there; None for one that is damaged. Raises FileNotFoundError where there is none."""


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


class Firsts(NamedTuple):
    """What a plan keeps of its texts. passages: bool, for each text of the input. queries: bool, for each group."""

    passages: np.ndarray
    queries: np.ndarray
    counts: dict[str, int]


def write_arrays(
    folder: Path, texts: bytearray, candidates: int, prompted: bytearray, plain: bytearray, positives: np.ndarray,
    pos_G: np.ndarray,
) -> Firsts:  # fmt: skip
    """Writes ARRAYS. Digests: texts, the first `candidates` of which are the pool, and of each group, `prompted`, its query
    with the prompt, and `plain`, without. positives: of each group pos_G places in `texts`, end to end."""
    (vector_G, is_query), (rows_N, is_passage) = distinct(prompted), distinct(texts + plain)
    is_passage = is_passage[: len(texts) // DIGEST]
    pool = int(is_passage[:candidates].sum())
    arrays = {"vector": vector_G, **_positives(distinct(plain), rows_N[positives], pos_G, rows_N[-len(pos_G) :], pool)}
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", arrays[name])
    counts = {"groups": len(pos_G), "queries": int(is_query.sum()), "pool": pool, "passages": int(is_passage.sum())}
    return Firsts(is_passage, is_query, counts)


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


class Plan:
    """A plan that was written: its arrays, mapped."""

    def __init__(self, folder: Path) -> None:
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
        self.vector, self.query, self.own, self.positives, self.starts = arrays

    def positives_of(self, query: int) -> np.ndarray:
        """The passages that are positives of a query text in any group."""
        return self.positives[self.starts[query] : self.starts[query + 1]]
