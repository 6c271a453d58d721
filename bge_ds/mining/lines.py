"""Groups as lines of JSON, or as rows of tables: the plan of their texts, and the same lines with other negatives.

Texts are told apart without the white space around them. The plan has their texts on the disk:

    passages.arrow   `text`: each distinct passage
    queries.arrow    `text`: each distinct query, with its prompt before it
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash

from bge_ds.checkpoint import filesystem
from bge_ds.data.files import PARTIAL
from bge_ds.data.preprocess import validate
from bge_ds.data.preprocess.input_files import ENDINGS, Source, find_sources, read_segments
from bge_ds.data.ragged import inside
from bge_ds.data.shards import digests
from bge_ds.mining.plan import DIGEST, PASSAGES, QUERIES, Written, write_arrays

_PACKED = {".gz": "gzip", ".zst": "zstd"}
_BATCH = 1024  # texts


class Lines:
    """Groups of files of lines or tables, and a pool of others' texts; see `plan.Input`."""

    def __init__(self, paths: list[str], pool: list[str] | None, known: Path) -> None:
        """pool: None: the texts of the groups. Raises ValueError for paths without a file."""
        self.sources, self.known = find_sources(paths), known
        self.pool = None if pool is None else find_sources(pool)

    def check_output(self, output: Path, overwrite: bool) -> None:
        if not output.name.endswith(ENDINGS) or output.is_dir():
            raise ValueError(f"--output {output}: name a file that ends in {', '.join(ENDINGS)}")
        if same := [source for source in [*self.sources, *(self.pool or [])] if source.path.resolve() == output.resolve()]:
            raise ValueError(f"--output {output} is read as {same[0].name}: name another file")
        if output.exists() and not overwrite:
            raise ValueError(f"--output {output} is there already: name another file, or give --overwrite")

    def identity(self) -> dict[str, Any]:
        files = {"--input": self.sources, "--candidate_pool": self.pool}
        return {name: given and digests.of_sources(given, self.known) for name, given in files.items()}

    def write_plan(self, folder: Path, query_prompt: str) -> dict[str, int]:
        def passages(group: dict[str, Any]) -> Iterator[str]:
            return itertools.chain(group["pos"], group["neg"] if self.pool is None else ())

        def with_prompt(group: dict[str, Any]) -> str:
            return (query_prompt if group.get("prompt") is None else group["prompt"]) + group["query"]

        texts, prompted, plain = bytearray(), bytearray(), bytearray()
        for text in self._pool_texts():
            texts += digest(text)
        candidates, pos_G, all_G = len(texts) // DIGEST, array("q"), array("q")
        for group in groups_of(self.sources):
            begin = len(texts) // DIGEST
            for text in passages(group):
                texts += digest(text)
            pos_G.append(len(group["pos"]))
            all_G.append(len(texts) // DIGEST - begin)
            plain += digest(group["query"])
            prompted += digest(with_prompt(group))
        for given, count in ((self.sources, len(pos_G)), (self.pool, candidates)):
            if given is not None and not count:
                raise ValueError(f"{', '.join(source.name for source in given)}: no line to read")
        begins_G, pos_G = candidates + np.cumsum(all_G) - all_G, np.array(pos_G)
        places = np.repeat(begins_G, pos_G) + inside(pos_G)
        pool = len(texts) // DIGEST if self.pool is None else candidates
        firsts = write_arrays(folder, texts, pool, prompted, plain, places, pos_G)
        counts = firsts.counts
        all_texts = itertools.chain(self._pool_texts(), itertools.chain.from_iterable(map(passages, groups_of(self.sources))))
        _write_texts(folder / f"{PASSAGES}.arrow", itertools.compress(all_texts, firsts.passages), counts["passages"])
        queries = itertools.compress(map(with_prompt, groups_of(self.sources)), firsts.queries)
        _write_texts(folder / f"{QUERIES}.arrow", queries, counts["queries"])
        return counts

    def token_ids(self, name: str, folder: Path | None = None) -> None:
        """None, as there are texts."""

    @contextlib.contextmanager
    def written(
        self, output: Path, folder: Path, negatives: Iterator[np.ndarray], job: str, overwrite: bool
    ) -> Iterator[Written]:
        partial, text = output.with_name(f".{output.name}{PARTIAL}"), stored_texts(folder)
        try:
            lost = self._write(partial, output.name, ([text(row) for row in rows.tolist()] for rows in negatives))
            yield Written(digests.of_files([partial], self.known)[0], lost)
            os.replace(partial, output)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def hash_of(self, output: Path) -> str | None:
        return digests.of_files([output], self.known)[0]

    def _pool_texts(self) -> Iterator[str]:
        return iter(()) if self.pool is None else texts_of(self.pool)

    def _write(self, path: Path, name: str, negatives: Iterator[list[str]]) -> int:
        """Writes the file at `path` that is to be called `name`; returns how many lines lost their `neg_scores`."""
        lost = 0
        with pa.output_stream(str(path), compression=_PACKED.get(Path(name).suffix), buffer_size=1 << 20) as out:
            for group, texts in zip(groups_of(self.sources), negatives, strict=True):
                group["neg"] = texts
                lost += group.pop("neg_scores", None) is not None
                out.write(as_line(group))
        filesystem.sync_one(path)
        return lost


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
    """What texts of one content share."""
    return xxhash.xxh3_128_digest(text.strip().encode())


def _write_texts(path: Path, texts: Iterable[str], count: int) -> None:
    """An Arrow file of one column, `text`, in batches of _BATCH. Raises ValueError unless there are `count`."""
    schema, texts = pa.schema([("text", pa.string())]), iter(texts)
    with pa.ipc.new_file(str(path), schema) as writer:
        while batch := list(itertools.islice(texts, _BATCH)):
            writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema=schema))
            count -= len(batch)
    if count:
        raise ValueError("the input was changed while it was read: run the same command again")


def stored_texts(folder: Path) -> Callable[[int], str]:
    """The text of each passage of a plan."""
    file = pa.ipc.open_file(pa.memory_map(str(folder / f"{PASSAGES}.arrow")))
    batch = lru_cache(_BATCH)(file.get_batch)
    return lambda passage: batch(passage // _BATCH).column(0)[passage % _BATCH].as_py()
