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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bge_ds.data.preprocess import corpus_index, validate, word_segmentation
from bge_ds.data.preprocess.input_files import Block
from bge_ds.data.preprocess.instructions import PLAIN, SYMMETRIC, before, is_format
from bge_ds.data.preprocess.rows import BlockRows, GroupRows, PassageRows, TextRows
from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.shards import shard_reader

# What decides the rows of a kind, with the defaults; the manifest keeps it.
SETTINGS: dict[str, dict[str, Any]] = {
    "pretrain": {"max_seq_length": 512, "word_segmenter": word_segmentation.NONE},
    "finetune": {
        "query_max_len": 32,
        "passage_max_len": 128,
        "query_instruction_for_retrieval": "",
        "passage_instruction_for_retrieval": "",
        "query_instruction_format": PLAIN,
        "passages_by_type": False,
    },
}
LENGTHS = ("max_seq_length", "query_max_len", "passage_max_len")
EMPTY = "{} is an empty text to this tokenizer: it gives no token"
SEEN_LIMIT = 500_000  # passages a worker remembers (about 60 MB); past it some are tokenised again, no row changes


@dataclass(frozen=True)
class PreprocessSettings:
    """All that decides the rows, beside the input itself: the trainers' own flag names."""

    kind: str
    on_error: str = "raise"
    max_seq_length: int = 0  # tokens, special tokens included, like the two below
    query_max_len: int = 0
    passage_max_len: int = 0
    query_instruction_for_retrieval: str = ""  # put before each query as it is
    passage_instruction_for_retrieval: str = ""
    query_instruction_format: str = PLAIN  # how a line's own `prompt` is joined with its query
    passages_by_type: bool = False  # passages of lines of a SYMMETRIC type begin as their query does
    word_segmenter: str = word_segmentation.NONE  # of pretrain: a name of `word_segmentation.SEGMENTERS`
    columns: tuple[tuple[str, str], ...] = ()  # (field, its name in the input)
    stage: str = "rows"  # "corpus": the lines are a corpus's passages; "by_id": groups that name those

    @property
    def form(self) -> str:
        """What a line holds: a key of `validate.KEYS`."""
        return self.kind if self.stage == "rows" else self.stage

    def at_stage(self, stage: str) -> "PreprocessSettings":
        """The same for another kind of lines, with the columns that those have."""
        return replace(self, stage=stage, columns=tuple(pair for pair in self.columns if pair[0] in validate.KEYS[stage]))

    def input_columns(self) -> tuple[str, ...]:
        """The columns that a table is read for."""
        named = dict(self.columns)
        return tuple(dict.fromkeys(named.get(name, name) for name in validate.KEYS[self.form]))

    def named(self) -> dict[str, Any]:
        """The settings that belong to the kind, as the manifest keeps them."""
        return {name: getattr(self, name) for name in SETTINGS[self.kind]}

    def check(self, encoder: validate.BatchTokenizer) -> None:
        """Raises ValueError for a length that leaves no room for text, and for a format that does not end in it."""
        if self.kind == "pretrain":
            encoder.check_room(self.max_seq_length, "max_seq_length")
        else:
            if not is_format(form := self.query_instruction_format):
                raise ValueError(f"query_instruction_format {form!r} must hold {{}} twice, the second time at its end")
            encoder.check_room(self.query_max_len, "query_max_len", self.query_instruction_for_retrieval)
            encoder.check_room(self.passage_max_len, "passage_max_len", self.passage_instruction_for_retrieval)


# ---------------------------------------------------------------------------------------------------------- workers


class Worker:
    """Turns blocks into compact arrays. The blocks it is given come in the order of the input, others between them."""

    def __init__(self, settings: PreprocessSettings, tokenizer: validate.TokenizerCore, index: Path | None = None) -> None:
        self.settings, self.encoder = settings, validate.BatchTokenizer(tokenizer, settings.word_segmenter)
        self.id_type = shard_reader.id_type(tokenizer.vocab_size).to_pandas_dtype()
        self.seen: set[bytes] = set()
        self.segment: tuple[int, int] | None = None  # that `seen` belongs to
        self.index = corpus_index.IdIndex(index) if index else None

    def __call__(self, block: Block) -> BlockRows:
        """The rows of a block; `bad` lists (line of the segment from 0, reason)."""
        if self.segment != (block.source, block.segment):
            self.segment, self.seen = (block.source, block.segment), set()
        lines = block.lines()
        found, bad = [], []
        for number, record in validate.records(lines, block.first, self.settings.form, self.settings.columns):
            (bad if isinstance(record, str) else found).append((number, record))
        make = {"finetune": self._groups, "by_id": self._groups_by_id}.get(self.settings.form, self._texts)
        rows, cuts, reasons = make([record for _, record in found])
        good = [number for i, (number, _) in enumerate(found) if i not in reasons]
        # What only the tokenizer sees comes later, maybe for an earlier line.
        bad = sorted(bad + [(found[i][0], reason) for i, reason in reasons.items()])
        return BlockRows(len(good), bad, good[0] if good else None, len(lines), cuts, rows)

    def _texts(self, records: list[dict[str, Any]]) -> tuple[TextRows | PassageRows, np.ndarray, dict[int, str]]:
        """(rows, tokens cut off each text, what is wrong by the record's place) of texts, or of a corpus's passages."""
        settings, words = self.settings, self.settings.form == "pretrain"
        length = settings.max_seq_length if words else settings.passage_max_len
        texts = [record["text"] for record in records]
        made = self.encoder.encode(texts, length, settings.passage_instruction_for_retrieval, words)
        spoken = made.ids.lengths > 0
        ids = self._ids(made, spoken.nonzero()[0])
        rows = TextRows(ids, made.words) if words else PassageRows(ids, _hashes(list(itertools.compress(texts, spoken))))
        return rows, made.cuts[spoken], {i: EMPTY.format('"text"') for i in (~spoken).nonzero()[0].tolist()}

    def _groups(self, records: list[dict[str, Any]]) -> tuple[GroupRows, np.ndarray, dict[int, str]]:
        """As `_texts`, of groups that hold texts. Passages that an earlier block of the segment had are sent as hashes."""
        passages = [
            (text, prefix)
            for record, prefix in zip(records, map(self._passage_prefix, records), strict=True)
            for name in ("pos", "neg")
            for text in record[name]
        ]
        keys = {passage: self._key(*passage) for passage in passages}
        new = [passage for passage, key in keys.items() if key not in self.seen]
        made = self.encoder.encode([text for text, _ in new], self.settings.passage_max_len, [prefix for _, prefix in new])
        place = {keys[passage]: i for i, passage in enumerate(new)}
        named: dict[bytes, int] = {}  # the passages of good lines, numbered as they come

        def refs(record: dict[str, Any]) -> list[list[int]]:
            prefix = self._passage_prefix(record)
            for name in ("pos", "neg"):
                for i, text in enumerate(record[name]):
                    if (at := place.get(keys[text, prefix])) is not None and not made.ids.lengths[at]:
                        raise ValueError(EMPTY.format(f'"{name}"[{i}]'))
            return [[named.setdefault(keys[text, prefix], len(named)) for text in record[name]] for name in ("pos", "neg")]

        rows, cuts, reasons = self._with_queries(records, refs)
        rows.keys, rows.sent = list(named), np.array([key in place for key in named], bool)
        sent = np.array([place[key] for key in named if key in place], np.int64)
        rows.passages = PassageRows(self._ids(made, sent), _hashes([new[i][0] for i in sent.tolist()]))
        rows.passage_cuts = made.cuts[sent]
        self.seen.update(named)
        if len(self.seen) > SEEN_LIMIT:
            self.seen.clear()
        return rows, cuts, reasons

    def _key(self, text: str, prefix: str) -> bytes:
        """Tells the passages of a segment apart: by their text, and by what stands before it where that is not the usual."""
        if prefix != self.settings.passage_instruction_for_retrieval:
            text = f"{prefix}\0{text}"
        return xxhash.xxh3_128_digest(text.encode())

    def _query_prefix(self, record: dict[str, Any]) -> str:
        if record.get("prompt") is None:
            return self.settings.query_instruction_for_retrieval
        return before(self.settings.query_instruction_format, record["prompt"])

    def _passage_prefix(self, record: dict[str, Any]) -> str:
        if self.settings.passages_by_type and record.get("type") in SYMMETRIC:
            return self._query_prefix(record)
        return self.settings.passage_instruction_for_retrieval

    def _groups_by_id(self, records: list[dict[str, Any]]) -> tuple[GroupRows, np.ndarray, dict[int, str]]:
        """As `_groups`, of groups that name passages of the corpus."""

        def refs(record: dict[str, Any]) -> list[np.ndarray]:
            if self.settings.passages_by_type and record.get("type") in SYMMETRIC:
                raise ValueError(
                    f'"type" {record["type"]} puts the query\'s instruction before passages, and those of a corpus are there '
                    "already: give such lines with their texts"
                )
            ids, positives = [*record["pos_ids"], *record["neg_ids"]], len(record["pos_ids"])
            found = self.index.rows(ids)
            if (found < 0).any():
                k = int(np.argmax(found < 0))
                name, i = ("pos_ids", k) if k < positives else ("neg_ids", k - positives)
                raise ValueError(f'"{name}"[{i}] {ids[k]!r} is no _id of the corpus')
            return np.split(found, [positives])

        return self._with_queries(records, refs)

    def _with_queries(self, records: list[dict[str, Any]], refs: Callable) -> tuple[GroupRows, np.ndarray, dict[int, str]]:
        """Groups; refs: a record -> numbers of its positives and negatives, or a ValueError."""
        length, prefixes = self.settings.query_max_len, list(map(self._query_prefix, records))
        queries = self.encoder.encode([record["query"] for record in records], length, prefixes)
        groups, good, reasons = [], [], {}
        for i, record in enumerate(records):
            try:
                if record.get("prompt"):
                    self.encoder.check_room(length, '"prompt": query_max_len', prefixes[i])
                if (prefix := self._passage_prefix(record)) != self.settings.passage_instruction_for_retrieval:
                    self.encoder.check_room(self.settings.passage_max_len, '"prompt": passage_max_len', prefix)
                if not queries.ids.lengths[i]:
                    raise ValueError(EMPTY.format('"query"'))
                groups.append((*refs(record), *map(record.get, ("pos_scores", "neg_scores", "type", "prompt"))))
                good.append(i)
            except ValueError as error:
                reasons[i] = str(error)
        columns = list(zip(*groups, strict=True)) or [()] * 6
        return GroupRows(self._ids(queries, np.array(good, np.int64)), columns), queries.cuts[good], reasons

    def _ids(self, made: validate.TokenizedTexts, texts: np.ndarray) -> RaggedArrays:
        """The ids of some of the texts, in the shards' type."""
        ids = made.ids.take(texts)
        return ids._replace(values=ids.values.astype(self.id_type))


def _hashes(texts: list[str]) -> np.ndarray:
    return np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in texts], np.uint64)


_worker: Worker  # of this process, when it is a worker process
Job = tuple[PreprocessSettings, validate.TokenizerCore]


def _start(settings: PreprocessSettings, tokenizer: validate.TokenizerCore, index: Path | None) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to report, once
    # A killed parent cannot stop its workers, and an idle worker would wait for its next block for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker = Worker(settings, tokenizer, index)


def _work(block: Block) -> BlockRows:
    return _worker(block)


def run_blocks(
    blocks: Iterable[Block], job: Job, num_proc: int, index: Path | None = None
) -> Iterator[tuple[Block, BlockRows | None]]:
    """Pairs of (block, its rows), in the order of the blocks; None for a block that ends something.

    One block alone, or one process, needs no pool. `index` is the corpus's, where groups name passages by id."""
    blocks = iter(blocks)
    head: list[Block] = []
    while sum(not block.ends for block in head) < 2 and (block := next(blocks, None)) is not None:
        head.append(block)
    if num_proc <= 1 or sum(not block.ends for block in head) < 2:
        worker = Worker(*job, index)
        yield from ((block, None if block.ends else worker(block)) for block in itertools.chain(head, blocks))
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
                yield first, future.result() if future else None
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result() if future else None
    except BrokenProcessPool as error:
        raise ChildProcessError("a worker process died (out of memory?): try a smaller --num_proc") from error
    finally:
        pool.shutdown(cancel_futures=True)
