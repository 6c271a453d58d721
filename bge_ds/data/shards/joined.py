"""Several folders of shards read as one: rows of the second follow those of the first, and so on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import xxhash

from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.shards.manifest_file import Manifest


class Joined:
    """Readers of one kind and tokenizer, asked as one reader is; each row goes to the folder that holds it.

    reopen: makes the same of the folders' paths in another process. Raises ValueError for folders that do not fit together.
    """

    def __init__(self, readers: Sequence[Any], reopen: Callable[[list], Any]) -> None:
        self.readers, self.reopen = list(readers), reopen
        self.folders = [folder for reader in readers for folder in reader.folders]
        first, *others = readers
        for reader in others:
            for name, of in (("kind", lambda made: made.kind), ("tokenizer", lambda made: made.tokenizer.fingerprint)):
                if of(reader.manifest) != of(first.manifest):
                    raise ValueError(
                        f"{first.folders[0]} and {reader.folders[0]} do not go together, each has a {name} of its own: give "
                        f"folders of one {name}, or preprocess again"
                    )
        self.starts = _starts([len(reader) for reader in readers])
        self.passage_starts = _starts([getattr(reader, "num_passages", 0) for reader in readers])
        self.fingerprint: str = xxhash.xxh3_128_hexdigest("\0".join(reader.fingerprint for reader in readers).encode())
        self.manifest = _join_manifests([reader.manifest for reader in readers], self.starts)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reopen, (self.folders,)

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def num_passages(self) -> int:
        return self.passage_starts[-1]

    def texts(self, rows_N: np.ndarray) -> tuple[RaggedArrays, ...]:
        return self._collect(self.starts, rows_N, lambda k, rows: self.readers[k].texts(rows))

    def ids(self, row: int) -> np.ndarray:
        k = _find(self.starts, row)
        return self.readers[k].ids(row - self.starts[k])

    def words(self, row: int) -> np.ndarray:
        k = _find(self.starts, row)
        return self.readers[k].words(row - self.starts[k])

    def lengths(self, rows_K: np.ndarray, *longest: int) -> np.ndarray:
        return self._gather(self.starts, rows_K, np.int64, lambda reader, rows: reader.lengths(rows, *longest))

    def queries(self, rows_B: np.ndarray) -> RaggedArrays:
        return self._collect(self.starts, rows_B, lambda k, rows: (self.readers[k].queries(rows),))[0]

    def passage_rows(self, rows_B: np.ndarray) -> tuple[RaggedArrays, ...]:
        def ask(k: int, rows: np.ndarray) -> tuple[RaggedArrays, ...]:
            first = self.passage_starts[k]
            return tuple(part._replace(values=part.values + first) for part in self.readers[k].passage_rows(rows))

        return self._collect(self.starts, rows_B, ask)

    def scores(self, rows_B: np.ndarray) -> tuple[RaggedArrays, ...]:
        return self._collect(self.starts, rows_B, lambda k, rows: self.readers[k].scores(rows))

    def group(self, row: int) -> Any:
        k = _find(self.starts, row)
        group = self.readers[k].group(row - self.starts[k])
        first = self.passage_starts[k]
        return group._replace(pos=group.pos + first, neg=group.neg + first) if first else group

    def notes(self, row: int) -> tuple[str | None, str | None]:
        k = _find(self.starts, row)
        return self.readers[k].notes(row - self.starts[k])

    def passages(self, prows_K: np.ndarray) -> RaggedArrays:
        return self._collect(self.passage_starts, prows_K, lambda k, rows: (self.readers[k].passages(rows),))[0]

    def passage(self, prow: int) -> np.ndarray:
        k = _find(self.passage_starts, prow)
        return self.readers[k].passage(prow - self.passage_starts[k])

    def hashes(self, prows: np.ndarray) -> np.ndarray:
        flat = np.asarray(prows, np.int64).ravel()
        found = self._gather(self.passage_starts, flat, np.uint64, lambda reader, rows: reader.hashes(rows))
        return found.reshape(np.shape(prows))

    def first_without_scores(self) -> int | None:
        for start, reader in zip(self.starts, self.readers, strict=False):
            if (row := reader.first_without_scores()) is not None:
                return start + row
        return None

    def _gather(self, starts: list[int], rows_K: np.ndarray, dtype: type, ask: Callable) -> np.ndarray:
        """What each folder answers for its rows, in the order asked."""
        found_K = np.empty(len(rows_K), dtype)
        for k, here in self._by_folder(starts, rows_K):
            found_K[here] = ask(self.readers[k], rows_K[here] - starts[k])
        return found_K

    def _collect(
        self, starts: list[int], rows_K: np.ndarray, ask: Callable[[int, np.ndarray], tuple]
    ) -> tuple[RaggedArrays, ...]:
        """The `RaggedArrays` that each folder (by its number) answers for its rows, put together in the order asked."""
        here, answers = [], []
        for k, places in self._by_folder(starts, rows_K):
            here.append(places)
            answers.append(ask(k, rows_K[places] - starts[k]))
        if len(answers) == 1:
            return answers[0]
        back = np.argsort(np.concatenate(here))
        return tuple(RaggedArrays.join(parts).take(back) for parts in zip(*answers, strict=True))

    def _by_folder(self, starts: list[int], rows_K: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(folder, places in `rows_K` of its rows) of each folder that has one."""
        folder_K = np.searchsorted(starts, rows_K, side="right") - 1
        for k in np.unique(folder_K).tolist():
            if not 0 <= k < len(self.readers):
                raise IndexError(f"rows {rows_K.min()} to {rows_K.max()} of folders that have {starts[-1]}")
            yield k, np.flatnonzero(folder_K == k)


def _starts(sizes: list[int]) -> list[int]:
    return [0, *np.cumsum(sizes).tolist()]


def _find(starts: list[int], row: int) -> int:
    if not 0 <= row < starts[-1]:
        raise IndexError(f"row {row} of folders that have {starts[-1]}")
    return bisect_right(starts, row) - 1


def _join_manifests(manifests: list[Manifest], starts: list[int]) -> Manifest:
    """One manifest in the form of a folder's; each source has its rows shifted and the `folder` (a number) it is of.

    Lengths are the smallest. An instruction that differs between the folders is None.
    """
    changed: dict[str, Any] = {}
    for name in ("max_seq_length", "query_max_len", "passage_max_len"):
        changed[name] = min((getattr(made, name) for made in manifests), key=lambda length: length or 0)
    for name in ("query_instruction_for_retrieval", "passage_instruction_for_retrieval"):
        values = {getattr(made, name) for made in manifests}
        changed[name] = values.pop() if len(values) == 1 else None
    names = dict.fromkeys(name for made in manifests for name in made.counts)
    sources = [
        msgspec.structs.replace(source, rows=(start + source.rows[0], start + source.rows[1]), folder=k)
        for k, (made, start) in enumerate(zip(manifests, starts, strict=False))
        for source in made.sources
    ]
    return msgspec.structs.replace(
        manifests[0],
        **changed,
        counts={name: sum(made.counts.get(name, 0) for made in manifests) for name in names},
        sources=sources,
        shards=[entry for made in manifests for entry in made.shards],
    )
