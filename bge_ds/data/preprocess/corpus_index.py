"""A corpus's index: id -> row of the passage table, in memory that does not grow with the corpus.

128-bit hashes of the ids are written to buckets by their first byte, each bucket is sorted on its own, and the sorted
buckets end to end are one sorted file (32 bytes an id), which workers map and search. At 1e9 passages a bucket takes
125 MB while it is sorted. Rows count the lines in the order of the files, so every part of a partitioned run builds the
same index without tokenising what is another's.
"""

import shutil
from pathlib import Path

import numpy as np
import xxhash

from bge_ds.data.preprocess import validate
from bge_ds.data.preprocess.input_files import Source, place_of, read_segments

BUCKETS = 256
HELD = 1 << 20  # ids that are gathered before they go to their buckets
ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8"), ("place", "<i8")])
KEYS, ENTRIES = "ids-keys.bin", "ids-entries.bin"


def build_index(folder: Path, sources: list[Source], cut: int, columns: tuple[tuple[str, str], ...]) -> list[list[int]]:
    """Writes the index of a corpus into `folder`; returns the rows of each segment of each source.

    Raises ValueError for a line that is no entry of a corpus and for an id given twice, naming file and line."""
    buckets = folder / "ids-buckets"
    shutil.rmtree(buckets, ignore_errors=True)  # of a killed run
    buckets.mkdir(parents=True)
    names = dict(columns)
    wanted = tuple(names.get(name, name) for name in validate.KEYS["corpus"])
    held: list[tuple[bytes, int, int]] = []
    counts: list[list[int]] = []
    row = 0
    for index, source in enumerate(sources):
        counts.append([])
        count = 0
        for block in read_segments(source, index, cut, columns=wanted):
            if block.ends:
                if block.ends == "segment":
                    counts[-1].append(count)
                    count = 0
                continue
            for number, entry in validate.records(block.lines(), block.first, "corpus", columns):
                if isinstance(entry, str):
                    raise ValueError(f"{place_of(source, block, number, cut, wanted)}: {entry}")
                place = index << 48 | block.segment << 28 | number
                held.append((xxhash.xxh3_128_digest(entry["_id"].encode()), row, place))
                row, count = row + 1, count + 1
            if len(held) >= HELD:
                _scatter(buckets, held)
                held = []
    _scatter(buckets, held)
    _join(folder, buckets, sources, cut, wanted)
    return counts


def _scatter(buckets: Path, held: list[tuple[bytes, int, int]]) -> None:
    found = np.empty(len(held), ENTRY)
    halves = np.frombuffer(b"".join(key for key, _, _ in held), dtype=">u8").reshape(-1, 2)
    found["high"], found["low"] = halves[:, 0], halves[:, 1]
    found["row"], found["place"] = [row for _, row, _ in held], [place for _, _, place in held]
    found = found[np.argsort(found["high"], kind="stable")]
    bounds = np.searchsorted(found["high"] >> np.uint64(56), np.arange(BUCKETS + 1))
    for k in np.flatnonzero(np.diff(bounds)):
        with open(buckets / f"{k:03d}", "ab") as file:
            found[bounds[k] : bounds[k + 1]].tofile(file)


def _join(folder: Path, buckets: Path, sources: list[Source], cut: int, columns: tuple[str, ...]) -> None:
    with open(folder / f"{KEYS}.draft", "wb") as keys, open(folder / f"{ENTRIES}.draft", "wb") as entries:
        for path in sorted(buckets.iterdir()):
            found = np.fromfile(path, ENTRY)
            found = found[np.lexsort((found["row"], found["low"], found["high"]))]
            same = (found["high"][1:] == found["high"][:-1]) & (found["low"][1:] == found["low"][:-1])
            if same.any():
                k = int(np.argmax(same))
                places = [_place(int(found["place"][i]), sources, cut, columns) for i in (k, k + 1)]
                raise ValueError(f"{places[1]}: its _id is that of {places[0]} already: each passage has an _id of its own")
            found["high"].tofile(keys)
            found.tofile(entries)
    shutil.rmtree(buckets)
    (folder / f"{KEYS}.draft").replace(folder / KEYS)
    (folder / f"{ENTRIES}.draft").replace(folder / ENTRIES)


def _place(packed: int, sources: list[Source], cut: int, columns: tuple[str, ...]) -> str:
    source, segment, number = packed >> 48, packed >> 28 & (1 << 20) - 1, packed & (1 << 28) - 1
    only = read_segments(sources[source], source, cut, lambda k: k == segment, columns=columns)
    return place_of(sources[source], next(only), number, cut, columns)


def remove_index(folder: Path) -> None:
    """Removes what `build_index` wrote."""
    for name in (KEYS, ENTRIES):
        (folder / name).unlink(missing_ok=True)


class IdIndex:
    """The rows of ids, searched in the mapped file."""

    def __init__(self, folder: Path) -> None:
        size = (folder / KEYS).stat().st_size
        self._keys = np.memmap(folder / KEYS, "<u8", "r") if size else np.empty(0, np.uint64)
        self._entries = np.memmap(folder / ENTRIES, ENTRY, "r") if size else np.empty(0, ENTRY)

    def rows(self, ids: list[str]) -> np.ndarray:
        """Rows of the passage table, int64, of the length of `ids`; -1 for an id that the corpus lacks."""
        wanted = b"".join(xxhash.xxh3_128_digest(identity.encode()) for identity in ids)
        halves = np.frombuffer(wanted, dtype=">u8").reshape(-1, 2).astype(np.uint64)
        found = np.full(len(ids), -1, np.int64)
        for i, at in enumerate(np.searchsorted(self._keys, halves[:, 0]).tolist()):
            while at < len(self._keys) and self._keys[at] == halves[i, 0]:  # two ids may share half of a hash
                if self._entries["low"][at] == halves[i, 1]:
                    found[i] = self._entries["row"][at]
                at += 1
        return found
