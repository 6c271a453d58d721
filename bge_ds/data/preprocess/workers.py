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

from bge_ds.data.preprocess import corpus_index, table_files, validate, word_segmentation
from bge_ds.data.preprocess.input_files import Block
from bge_ds.data.preprocess.rows import BlockRows, GroupRows, PassageRows, TextRows
from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.shards import shard_reader

LENGTHS = {"pretrain": {"max_seq_length": 512}, "finetune": {"query_max_len": 32, "passage_max_len": 128}}
INSTRUCTIONS = {"pretrain": (), "finetune": ("query_instruction_for_retrieval", "passage_instruction_for_retrieval")}
WORDS = {"pretrain": ("word_segmenter",), "finetune": ()}  # what decides words, which fine-tuning has no use for
EMPTY = "{} is an empty text to this tokenizer: it gives no token"
NumberedRecord = tuple[int, dict[str, Any]]  # (number in its segment, what it holds)
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
        """The lengths and instructions that belong to the kind, as the manifest keeps them."""
        return {name: getattr(self, name) for name in (*LENGTHS[self.kind], *INSTRUCTIONS[self.kind], *WORDS[self.kind])}

    def check(self, encoder: validate.BatchTokenizer) -> None:
        """Raises ValueError for a length that leaves no room for text."""
        if self.kind == "pretrain":
            encoder.check_room(self.max_seq_length, "max_seq_length")
        else:
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
        """The rows of a block; `bad` lists (line of the segment from 0, reason). With on_error "raise" it stops there."""
        form, stops = self.settings.form, self.settings.on_error == "raise"
        if self.segment != (block.source, block.segment):
            self.segment, self.seen = (block.source, block.segment), set()
        found: list[tuple[int, dict[str, Any]]] = []
        bad: list[tuple[int, str]] = []
        for number, raw in self._lines(block):
            try:
                if isinstance(raw, bytes):
                    record = validate.parse_line(raw, form, self.settings.columns)
                elif isinstance(raw, ValueError):
                    raise raw
                else:
                    record = validate.check(raw, form, self.settings.columns)
                found.append((number, record))
            except ValueError as error:
                bad.append((number, str(error)))
                if stops:
                    break
        good, more, cuts, rows = self._texts(found) if form == "pretrain" else self._rows(found)
        # What only the tokenizer sees comes later, maybe for an earlier line.
        bad = sorted(bad + more)[: 1 if stops else None]
        return BlockRows(len(good), bad, good[0] if good else None, self._count_lines, cuts, rows)

    def _lines(self, block: Block) -> Iterator[tuple[int, Any]]:
        """(number in the segment, line or row) of all that are not blank."""
        if block.is_arrow:
            try:
                found: list[Any] = table_files.from_bytes(block.data)
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

    def _texts(self, found: list[NumberedRecord]) -> tuple[list[int], list[tuple[int, str]], int, TextRows]:
        """As `_rows`; all texts as one array."""
        made = self.encoder.encode([record["text"] for _, record in found], self.settings.max_seq_length)
        if made.silent.any() and self.settings.on_error == "raise":
            first = int(np.argmax(made.silent))
            good, _, cuts, rows = self._texts(found[:first])
            return good, [(found[first][0], EMPTY.format('"text"'))], cuts, rows
        bad = [(number, EMPTY.format('"text"')) for (number, _), silent in zip(found, made.silent, strict=True) if silent]
        good = [number for (number, _), silent in zip(found, made.silent, strict=True) if not silent]
        ids = RaggedArrays(made.ids.astype(self.id_type), made.lengths)
        return good, bad, int(made.cuts.sum()), TextRows(ids, made.words)

    def _rows(self, found: list[NumberedRecord]) -> tuple[list[int], list[tuple[int, str]], int, PassageRows | GroupRows]:
        """(numbers of the good lines, the bad ones, texts cut, rows) of entries or groups; stops at a bad one as told."""
        form = self.settings.form
        take = {"finetune": self._group, "corpus": self._entry, "by_id": self._named_group}[form]
        rows: dict[str, list[Any]] = {"texts": [], "cuts": [], "passages": [], "hashes": [], "groups": []}
        self._local: dict[bytes, int] = {}
        good, bad = [], []
        for (number, record), texts in zip(found, self._encode_ahead([record for _, record in found]), strict=True):
            try:
                take(record, texts, rows)
                good.append(number)
            except ValueError as error:
                bad.append((number, str(error)))
                if self.settings.on_error == "raise":
                    break
        self._keys, self._fresh = {}, {}
        pack = {"corpus": self._pack_entries, "by_id": self._pack_named_groups, "finetune": self._pack_groups}[form]
        return good, bad, int(sum(rows["cuts"])), pack(rows)

    def _encode_ahead(self, found: list[dict[str, Any]]) -> Iterable[Any]:
        """For each record (ids, cut) of its text or query, all encoded at once. New passages of groups go to `_fresh`."""
        settings = self.settings
        instruction = settings.passage_instruction_for_retrieval
        if settings.form == "corpus":
            texts = [record["text"] for record in found]
            return zip(*self.encoder.ids(texts, settings.passage_max_len, instruction), strict=True)
        if settings.form == "finetune":
            # Of the lines that prove bad too: what counts as seen is told line by line.
            passages = (text for record in found for name in ("pos", "neg") for text in record[name])
            self._keys = {text: xxhash.xxh3_128_digest(text.encode()) for text in passages}
            new = [text for text, key in self._keys.items() if key not in self.seen]
            self._fresh = dict(
                zip(new, zip(*self.encoder.ids(new, settings.passage_max_len, instruction), strict=True), strict=True)
            )
        queries, before = [record["query"] for record in found], [self._instruction(record) for record in found]
        return zip(*self.encoder.ids(queries, settings.query_max_len, before), strict=True)

    def _instruction(self, record: dict[str, Any]) -> str:
        prompt = record.get("prompt")
        return self.settings.query_instruction_for_retrieval if prompt is None else prompt

    def _entry(self, record: dict[str, Any], text: tuple[list[int], bool], rows: dict[str, list[Any]]) -> None:
        ids, cut = text
        if not ids:
            raise ValueError(EMPTY.format('"text"'))
        rows["texts"].append(ids)
        rows["hashes"].append(xxhash.xxh3_64_intdigest(record["text"].encode()))
        rows["cuts"].append(cut)

    def _check_query(self, record: dict[str, Any], ids: list[int]) -> None:
        if prompt := record.get("prompt"):
            self.encoder.check_room(self.settings.query_max_len, '"prompt": query_max_len', prompt)
        if not ids:
            raise ValueError(EMPTY.format('"query"'))

    def _named_group(self, record: dict[str, Any], text: tuple[list[int], bool], rows: dict[str, list[Any]]) -> None:
        query, query_cut = text
        self._check_query(record, query)
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

    def _group(self, record: dict[str, Any], text: tuple[list[int], bool], rows: dict[str, list[Any]]) -> None:
        query, query_cut = text
        self._check_query(record, query)
        keys: dict[str, list[bytes]] = {}
        fresh: dict[bytes, tuple[list[int], int, bool]] = {}
        for name in ("pos", "neg"):
            keys[name] = []
            for i, passage in enumerate(record[name]):
                key = self._keys[passage]
                keys[name].append(key)
                if key not in self.seen and key not in fresh:
                    ids, cut = self._fresh[passage]
                    if not ids:
                        raise ValueError(EMPTY.format(f'"{name}"[{i}]'))
                    fresh[key] = (ids, xxhash.xxh3_64_intdigest(passage.encode()), cut)
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

    def _pack_entries(self, rows: dict[str, list[Any]]) -> PassageRows:
        return PassageRows(self._join(rows["texts"]), np.array(rows["hashes"], dtype=np.uint64))

    def _pack_named_groups(self, rows: dict[str, list[Any]]) -> GroupRows:
        columns = list(zip(*rows["groups"], strict=True))[1:] or [()] * 6
        return GroupRows(self._join([group[0] for group in rows["groups"]]), columns)

    def _pack_groups(self, rows: dict[str, list[Any]]) -> GroupRows:
        if len(self.seen) > SEEN_LIMIT:
            self.seen.clear()
        sent = [passage for passage in rows["passages"] if passage is not None]
        made = self._pack_named_groups(rows)
        made.keys = rows["hashes"]
        made.sent = np.array([passage is not None for passage in rows["passages"]], dtype=bool)
        hashes = np.array([number for _, number, _ in sent], dtype=np.uint64)
        made.passages = PassageRows(self._join([ids for ids, _, _ in sent]), hashes)
        made.passage_cuts = np.array([cut for _, _, cut in sent], dtype=bool)
        return made

    def _join(self, lists: list[list[int]]) -> RaggedArrays:
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        flat = np.fromiter(itertools.chain.from_iterable(lists), dtype=self.id_type, count=int(lengths.sum()))
        return RaggedArrays(flat, lengths)


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
