"""Worker processes that turn blocks of input into compact arrays, and the pool that feeds them in order.

The parent cuts the input into blocks; workers check and tokenise them; the parent takes the results in the order of the
input. So the output is the same for any number of workers. A worker sends the ids of a passage only the first time that
it meets it in a segment: what it sent before was for an earlier block of that segment, so the parent has it by then.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from . import corpus, records, segmenting, shards, tables
from .sources import Block

LENGTHS = {"pretrain": {"max_seq_length": 512}, "finetune": {"query_max_len": 32, "passage_max_len": 128}}
INSTRUCTIONS = {"pretrain": (), "finetune": ("query_instruction_for_retrieval", "passage_instruction_for_retrieval")}
WORDS = {"pretrain": ("word_segmenter",), "finetune": ()}  # what decides words, which fine-tuning has no use for
SEEN_LIMIT = 500_000  # passages a worker remembers (about 60 MB); past it some are tokenised again, no row changes


@dataclass(frozen=True)
class Settings:
    """All that decides the rows, beside the input itself: the trainers' own flag names."""

    kind: str
    on_error: str = "raise"
    max_seq_length: int = 0  # tokens, special tokens included, like the two below
    query_max_len: int = 0
    passage_max_len: int = 0
    query_instruction_for_retrieval: str = ""  # put before each query as it is
    passage_instruction_for_retrieval: str = ""
    word_segmenter: str = segmenting.NONE  # of pretrain: a name of `segmenting.SEGMENTERS`
    columns: tuple[tuple[str, str], ...] = ()  # (field, its name in the input)
    stage: str = "rows"  # "corpus": the lines are a corpus's passages; "by_id": groups that name those

    @property
    def form(self) -> str:
        """What a line holds: a key of `records.KEYS`."""
        return self.kind if self.stage == "rows" else self.stage

    def at_stage(self, stage: str) -> "Settings":
        """The same for another kind of lines, with the columns that those have."""
        return replace(self, stage=stage, columns=tuple(pair for pair in self.columns if pair[0] in records.KEYS[stage]))

    def input_columns(self) -> tuple[str, ...]:
        """The columns that a table is read for."""
        named = dict(self.columns)
        return tuple(dict.fromkeys(named.get(name, name) for name in records.KEYS[self.form]))

    def named(self) -> dict[str, Any]:
        """The lengths and instructions that belong to the kind, as the manifest keeps them."""
        return {name: getattr(self, name) for name in (*LENGTHS[self.kind], *INSTRUCTIONS[self.kind], *WORDS[self.kind])}

    def check(self, encoder: records.Encoder) -> None:
        """Raises ValueError for a length that leaves no room for text."""
        if self.kind == "pretrain":
            encoder.check_room(self.max_seq_length, "max_seq_length")
        else:
            encoder.check_room(self.query_max_len, "query_max_len", self.query_instruction_for_retrieval)
            encoder.check_room(self.passage_max_len, "passage_max_len", self.passage_instruction_for_retrieval)


# ---------------------------------------------------------------------------------------------------------- workers


class Worker:
    """Turns blocks into compact arrays. The blocks it is given come in the order of the input, others between them."""

    def __init__(self, settings: Settings, tokenizer: records.TokenizerCore, index: Path | None = None) -> None:
        self.settings, self.encoder = settings, records.Encoder(tokenizer, settings.word_segmenter)
        self.id_type = shards.id_type(tokenizer.vocab_size).to_pandas_dtype()
        self.seen: set[bytes] = set()
        self.segment: tuple[int, int] | None = None  # that `seen` belongs to
        self.index = corpus.IdIndex(index) if index else None

    def __call__(self, block: Block) -> dict[str, Any]:
        """The rows of a block; `bad` lists (line of the segment from 0, reason). With on_error "raise" it stops there."""
        take = {"pretrain": self._text, "finetune": self._group, "corpus": self._entry, "by_id": self._named_group}
        take_one, form = take[self.settings.form], self.settings.form
        rows: dict[str, list[Any]] = {"texts": [], "words": [], "cuts": [], "passages": [], "hashes": [], "groups": []}
        self._local: dict[bytes, int] = {}
        if self.segment != (block.source, block.segment):
            self.segment, self.seen = (block.source, block.segment), set()
        good, bad, first = 0, [], None
        for number, raw in self._lines(block):
            try:
                if isinstance(raw, bytes):
                    record = records.parse_line(raw, form, self.settings.columns)
                elif isinstance(raw, ValueError):
                    raise raw
                else:
                    record = records.check(raw, form, self.settings.columns)
                take_one(record, rows)
                good, first = good + 1, number if first is None else first
            except ValueError as error:
                bad.append((number, str(error)))
                if self.settings.on_error == "raise":
                    break
        pack = self._pack_groups if form in ("finetune", "by_id") else self._pack_texts
        return {"good": good, "bad": bad, "first": first, "lines": self._count_lines, **pack(rows)}

    def _lines(self, block: Block) -> Iterator[tuple[int, Any]]:
        """(number in the segment, line or row) of all that are not blank."""
        if block.is_arrow:
            try:
                found: list[Any] = tables.unpack(block.data)
            except (ValueError, pa.ArrowException) as error:
                found = [ValueError(f"the rows from here on cannot be decoded: {error}")]
            self._count_lines = len(found)
            yield from enumerate(found, block.first)
            return
        lines = block.data.split(b"\n")
        self._count_lines = len(lines) - (not lines[-1])
        for number, raw in enumerate(lines, block.first):
            if raw.strip():
                yield number, raw

    def _text(self, record: dict[str, Any], rows: dict[str, list[Any]]) -> None:
        (ids,), (words,), (cut,) = self.encoder.ids_and_words([record["text"]], self.settings.max_seq_length)
        if not ids:
            raise ValueError('"text" is an empty text to this tokenizer: it gives no token')
        rows["texts"].append(ids)
        rows["words"].append(words)
        rows["cuts"].append(cut)

    def _entry(self, record: dict[str, Any], rows: dict[str, list[Any]]) -> None:
        prefix = self.settings.passage_instruction_for_retrieval
        (ids,), (cut,) = self.encoder.ids([record["text"]], self.settings.passage_max_len, prefix)
        if not ids:
            raise ValueError('"text" is an empty text to this tokenizer: it gives no token')
        rows["texts"].append(ids)
        rows["hashes"].append(xxhash.xxh3_64_intdigest(record["text"].encode()))
        rows["cuts"].append(cut)

    def _query(self, record: dict[str, Any]) -> tuple[list[int], bool]:
        prompt, length = record.get("prompt"), self.settings.query_max_len
        if prompt:
            self.encoder.check_room(length, '"prompt": query_max_len', prompt)
        instruction = self.settings.query_instruction_for_retrieval if prompt is None else prompt
        (query,), (query_cut,) = self.encoder.ids([record["query"]], length, instruction)
        if not query:
            raise ValueError('"query" is an empty text to this tokenizer: it gives no token')
        return query, query_cut

    def _named_group(self, record: dict[str, Any], rows: dict[str, list[Any]]) -> None:
        query, query_cut = self._query(record)
        ids = [*record["pos_ids"], *record["neg_ids"]]
        found = self.index.rows(ids)
        if (found < 0).any():
            k = int(np.argmax(found < 0))
            name, i = ("pos_ids", k) if k < len(record["pos_ids"]) else ("neg_ids", k - len(record["pos_ids"]))
            raise ValueError(f'"{name}"[{i}] {ids[k]!r} is no _id of the corpus')
        refs = np.split(found, [len(record["pos_ids"])])
        others = [record.get(name) for name in ("pos_scores", "neg_scores", "type", "prompt")]
        rows["groups"].append((query, *refs, *others))
        rows["cuts"].append(query_cut)

    def _group(self, record: dict[str, Any], rows: dict[str, list[Any]]) -> None:
        query, query_cut = self._query(record)
        keys: dict[str, list[bytes]] = {}
        fresh: dict[bytes, tuple[list[int], int, bool]] = {}
        for name in ("pos", "neg"):
            keys[name] = []
            for i, text in enumerate(record[name]):
                encoded = text.encode()
                key = xxhash.xxh3_128_digest(encoded)
                keys[name].append(key)
                if key not in self.seen and key not in fresh:
                    prefix = self.settings.passage_instruction_for_retrieval
                    (ids,), (cut,) = self.encoder.ids([text], self.settings.passage_max_len, prefix)
                    if not ids:
                        raise ValueError(f'"{name}"[{i}] is an empty text to this tokenizer: it gives no token')
                    fresh[key] = (ids, xxhash.xxh3_64_intdigest(encoded), cut)
        # Only now that the whole line is good may its passages count as seen.
        self.seen.update(fresh)
        for key in itertools.chain(*keys.values()):
            if key not in self._local:
                self._local[key] = len(self._local)
                rows["hashes"].append(key)
                rows["passages"].append(fresh.get(key))
        refs = [[self._local[key] for key in keys[name]] for name in ("pos", "neg")]
        others = [record.get(name) for name in ("pos_scores", "neg_scores", "type", "prompt")]
        rows["groups"].append((query, *refs, *others))
        rows["cuts"].append(query_cut)

    def _pack_texts(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        words = np.concatenate(rows["words"]) if rows["words"] else np.zeros(0)
        ids, lengths = self._join(rows["texts"])
        hashes = np.array(rows["hashes"], dtype=np.uint64)
        words = words.astype(np.int32)
        return {"ids": ids, "lengths": lengths, "words": words, "hash": hashes, "cuts": sum(rows["cuts"])}

    def _pack_groups(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        if len(self.seen) > SEEN_LIMIT:
            self.seen.clear()
        sent = [passage for passage in rows["passages"] if passage is not None]
        ids, lengths = self._join([ids for ids, _, _ in sent])
        return {
            "cuts": sum(rows["cuts"]),
            "keys": rows["hashes"],
            "sent": np.array([passage is not None for passage in rows["passages"]], dtype=bool),
            "ids": ids,
            "lengths": lengths,
            "hash": np.array([number for _, number, _ in sent], dtype=np.uint64),
            "passage_cuts": np.array([cut for _, _, cut in sent], dtype=bool),
            "query": self._join([group[0] for group in rows["groups"]]),
            "columns": list(zip(*rows["groups"], strict=True))[1:] or [()] * 6,
        }

    def _join(self, lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Lists of ids -> (all ids end to end, lengths)."""
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        flat = np.fromiter(itertools.chain.from_iterable(lists), dtype=self.id_type, count=int(lengths.sum()))
        return flat, lengths


_worker: Worker  # of this process, when it is a worker process
Job = tuple[Settings, records.TokenizerCore]


def _start(settings: Settings, tokenizer: records.TokenizerCore, index: Path | None) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to report, once
    # A killed parent cannot stop its workers, and an idle worker would wait for its next block for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker = Worker(settings, tokenizer, index)


def _work(block: Block) -> dict[str, Any]:
    return _worker(block)


def run_blocks(
    blocks: Iterable[Block], job: Job, num_proc: int, index: Path | None = None
) -> Iterator[tuple[Block, dict[str, Any]]]:
    """Pairs of (block, its rows), in the order of the blocks; {} for a block that ends something.

    One block alone, or one process, needs no pool. `index` is the corpus's, where groups name passages by id."""
    blocks = iter(blocks)
    head: list[Block] = []
    while sum(not block.ends for block in head) < 2 and (block := next(blocks, None)) is not None:
        head.append(block)
    if num_proc <= 1 or sum(not block.ends for block in head) < 2:
        worker = Worker(*job, index)
        yield from ((block, {} if block.ends else worker(block)) for block in itertools.chain(head, blocks))
        return
    # Forked where the system can: spawning would import the trainer's whole command, torch included, in every worker.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    pool = ProcessPoolExecutor(num_proc, context, initializer=_start, initargs=(*job, index))
    waiting: deque[tuple[Block, Any]] = deque()
    try:
        for block in itertools.chain(head, blocks):
            waiting.append((block, None if block.ends else pool.submit(_work, block)))
            if len(waiting) > 2 * num_proc:
                first, future = waiting.popleft()
                yield first, future.result() if future else {}
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result() if future else {}
    except BrokenProcessPool as error:
        raise ChildProcessError("a worker process died (out of memory?): try a smaller --num_proc") from error
    finally:
        pool.shutdown(cancel_futures=True)
