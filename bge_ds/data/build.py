"""Lines of JSON -> shards, in parallel.

The parent cuts the input into blocks of lines; worker processes check and tokenise them; the parent takes the results
in the order of the input and writes them. So the output is the same for any number of workers, and memory holds a few
blocks (and 128 bits a distinct passage, to tell passages apart). A worker sends the ids of a passage only the first
time it meets it: what it sent before was for an earlier block, so the parent has it by then.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash
from tqdm import tqdm

from .. import __version__
from . import folders, records, shards

LENGTHS = {"pretrain": {"max_seq_length": 512}, "finetune": {"query_max_len": 32, "passage_max_len": 128}}
INSTRUCTIONS = {"pretrain": (), "finetune": ("query_instruction_for_retrieval", "passage_instruction_for_retrieval")}
SEEN_LIMIT = 2_000_000  # passages a worker remembers (about 200 MB); past it some are tokenised again, no row changes
SHOWN = 20  # skipped lines that are listed on the screen


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

    def named(self) -> dict[str, Any]:
        """The lengths and instructions that belong to the kind, as the manifest keeps them."""
        return {name: getattr(self, name) for name in (*LENGTHS[self.kind], *INSTRUCTIONS[self.kind])}

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

    def __init__(self, settings: Settings, tokenizer: records.TokenizerCore) -> None:
        self.settings, self.encoder = settings, records.Encoder(tokenizer)
        self.id_type = shards.id_type(tokenizer.vocab_size).to_pandas_dtype()
        self.seen: set[bytes] = set()

    def __call__(self, block: records.Block) -> dict[str, Any]:
        """The rows of a block; `bad` lists (line, reason). With on_error "raise" it stops at the first bad line."""
        take = self._text if self.settings.kind == "pretrain" else self._group
        rows: dict[str, list[Any]] = {"texts": [], "words": [], "cuts": [], "passages": [], "hashes": [], "groups": []}
        self._local: dict[bytes, int] = {}
        good, bad, first = 0, [], None
        for number, raw in enumerate(block.data.split(b"\n"), block.first):
            if not raw.strip():
                continue
            try:
                take(records.parse_line(raw, self.settings.kind), rows)
                good, first = good + 1, number if first is None else first
            except ValueError as error:
                bad.append((number, str(error)))
                if self.settings.on_error == "raise":
                    break
        pack = self._pack_texts if take == self._text else self._pack_groups
        return {"good": good, "bad": bad, "first": first, **pack(rows)}

    def _text(self, record: dict[str, Any], rows: dict[str, list[Any]]) -> None:
        (ids,), (words,), (cut,) = self.encoder.ids_and_words([record["text"]], self.settings.max_seq_length)
        if not ids:
            raise ValueError('"text" is an empty text to this tokenizer: it gives no token')
        rows["texts"].append(ids)
        rows["words"].append(words)
        rows["cuts"].append(cut)

    def _group(self, record: dict[str, Any], rows: dict[str, list[Any]]) -> None:
        prompt, length = record.get("prompt"), self.settings.query_max_len
        if prompt:
            self.encoder.check_room(length, '"prompt": query_max_len', prompt)
        instruction = self.settings.query_instruction_for_retrieval if prompt is None else prompt
        (query,), (query_cut,) = self.encoder.ids([record["query"]], length, instruction)
        if not query:
            raise ValueError('"query" is an empty text to this tokenizer: it gives no token')
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
        return {"ids": ids, "lengths": lengths, "words": words.astype(np.int32), "cuts": sum(rows["cuts"])}

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


def _start(settings: Settings, tokenizer: records.TokenizerCore) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to report, once
    # A killed parent cannot stop its workers, and an idle worker would wait for its next block for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker = Worker(settings, tokenizer)


def _work(block: records.Block) -> dict[str, Any]:
    return _worker(block)


Job = tuple[Settings, records.TokenizerCore]


def run_blocks(blocks: Iterable[records.Block], job: Job, num_proc: int) -> Iterator[tuple[records.Block, dict]]:
    """Pairs of (block, its rows), in the order of the blocks. One block alone, or one process, needs no pool."""
    blocks = iter(blocks)
    head = list(itertools.islice(blocks, 2))
    if num_proc <= 1 or len(head) < 2:
        worker = Worker(*job)
        yield from ((block, worker(block)) for block in itertools.chain(head, blocks))
        return
    # Forked where the system can: spawning would import the trainer's whole command, torch included, in every worker.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    pool = ProcessPoolExecutor(num_proc, context, initializer=_start, initargs=job)
    waiting: deque[tuple[records.Block, Any]] = deque()
    try:
        for block in itertools.chain(head, blocks):
            waiting.append((block, pool.submit(_work, block)))
            if len(waiting) > 2 * num_proc:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError("a worker process died (out of memory?): try a smaller --num_proc") from error
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------------- building


class Builder:
    """Takes the rows of all blocks in order and writes the tables, the list of skipped lines and the manifest."""

    def __init__(self, folder: Path, sources: list[records.Source], job: Job, shard_bytes: int) -> None:
        self.folder, self.sources, (self.settings, self.tokenizer) = folder, sources, job
        fields = shards.schemas(self.settings.kind, self.tokenizer.vocab_size, self.settings.max_seq_length)
        self.writers = {name: shards.TableWriter(folder, name, schema, shard_bytes) for name, schema in fields.items()}
        self.good, self.bad = [0] * len(sources), [0] * len(sources)
        self.skipped: list[dict[str, Any]] = []
        self.rows: dict[bytes, int] = {}  # 128-bit hash of a passage -> its row
        self.place = ""  # of the first good line
        self.tokens = self.unknown = self.cut = self.named = self.alone = 0
        self.at = 0  # the source that the last block came from

    def add(self, block: records.Block, result: dict[str, Any]) -> None:
        """Takes one block's rows. Raises ValueError for its first bad line, unless such lines are skipped."""
        path = self.sources[block.source].path
        self._leave_sources(block.source)
        for line, reason in result["bad"]:
            if self.settings.on_error == "raise":
                raise ValueError(f"{path}:{line}: {reason}")
            self.skipped.append({"file": str(path), "line": line, "reason": reason})
        self.good[block.source] += result["good"]
        self.bad[block.source] += len(result["bad"])
        if result["good"]:
            self.place = self.place or f"{path}:{result['first']}"
            self.cut += int(result["cuts"])
            (self._add_texts if self.settings.kind == "pretrain" else self._add_groups)(result)

    def _leave_sources(self, upto: int) -> None:
        """Raises ValueError for, or lists as skipped, a source before `upto` that turned out to hold no line."""
        for i in range(self.at, upto):
            if self.good[i] + self.bad[i] == 0:
                if self.settings.on_error == "raise":
                    raise ValueError(f"{self.sources[i].path}: the file is empty: it holds no line")
                self.skipped.append({"file": str(self.sources[i].path), "line": 0, "reason": "the file is empty"})
        self.at = upto

    def _add_texts(self, result: dict[str, Any]) -> None:
        types = [field.type.value_type for field in self.writers["texts"].schema]
        values = (result["ids"], result["words"])
        lists = (shards.list_array(v, result["lengths"], t) for v, t in zip(values, types, strict=True))
        self.writers["texts"].write(list(lists))
        self._count(result["ids"])

    def _add_groups(self, result: dict[str, Any]) -> None:
        new = np.array([key not in self.rows for key in result["keys"]])
        for key in result["keys"]:
            self.rows.setdefault(key, len(self.rows))
        at = np.array([self.rows[key] for key in result["keys"]], dtype=np.int64)
        assert not (new & ~result["sent"]).any(), "a worker left out a passage that no earlier block holds"
        keep = new[result["sent"]]
        ids = result["ids"][np.repeat(keep, result["lengths"])]
        fields = self.writers["passages"].schema
        lists = shards.list_array(ids, result["lengths"][keep], fields.field("ids").type.value_type)
        if keep.any():
            self.writers["passages"].write([lists, pa.array(result["hash"][keep])])
        query, lengths = result["query"]
        columns: list[pa.Array] = [shards.list_array(query, lengths, fields.field("ids").type.value_type)]
        for refs in result["columns"][:2]:
            counts = np.fromiter(map(len, refs), dtype=np.int64, count=len(refs))
            flat = np.fromiter(itertools.chain.from_iterable(refs), dtype=np.int64, count=int(counts.sum()))
            columns.append(shards.list_array(at[flat], counts, pa.int64()))
            self.named += len(flat)
        self.alone += sum(not refs for refs in result["columns"][1])
        groups = self.writers["groups"].schema
        columns += [pa.array(values, groups.types[3 + i]) for i, values in enumerate(result["columns"][2:])]
        self.writers["groups"].write(columns)
        self._count(ids)
        self._count(query)
        self.cut += int(result["passage_cuts"][keep].sum())

    def _count(self, ids: np.ndarray) -> None:
        self.tokens += len(ids)
        self.unknown += int((ids == self.tokenizer.unknown_id).sum()) if self.tokenizer.unknown_id >= 0 else 0

    def finish(self) -> dict[str, Any]:
        """Closes the tables, writes the manifest and returns it. Raises ValueError where no row can be trained on."""
        self._leave_sources(len(self.sources))
        total = sum(self.good)
        if not total:
            bad = self.skipped[0]
            place = f"{bad['file']}:{bad['line']}: {bad['reason']}"
            raise ValueError(f"no line is good: {len(self.skipped)} skipped, the first is {place}")
        if self.settings.kind == "pretrain":
            counts = {"texts": total}
        else:
            if self.alone == total and (total == 1 or len(self.rows) == 1):
                raise ValueError(
                    f'{self.place}: nothing to compare against: no line has a "neg" text, and no other line has another'
                    " positive, which could serve as one: add negatives or more lines"
                )
            counts = {"groups": total, "passages": len(self.rows), "duplicates": self.named - len(self.rows)}
            counts["groups_without_negatives"] = self.alone
        counts |= {"tokens": self.tokens, "unknown_tokens": self.unknown, "cut_texts": self.cut}
        counts["skipped"] = len(self.skipped)
        if self.skipped:
            lines = b"".join(orjson.dumps(line) + b"\n" for line in self.skipped)
            (self.folder / shards.SKIPPED).write_bytes(lines)
        ends = [0, *itertools.accumulate(self.good)]
        core = self.tokenizer
        manifest = {
            "kind": self.settings.kind,
            "bge_ds_version": __version__,
            "tokenizer": {name: getattr(core, name) for name in ("name", "fingerprint", "vocab_size")}
            | {"prefix_ids": list(core.prefix_ids), "suffix_ids": list(core.suffix_ids)},
            **self.settings.named(),
            "counts": counts,
            "sources": [{"path": str(source.path), "rows": [ends[i], ends[i + 1]]} for i, source in enumerate(self.sources)],
            "shards": [entry for writer in self.writers.values() for entry in writer.close()],
        }
        return shards.write_manifest(self.folder, manifest)

    def abort(self) -> None:
        """Closes the open files of a failed run."""
        for writer in self.writers.values():
            writer.abort()


def build(
    output: Path,
    sources: list[records.Source],
    job: Job,
    *,
    num_proc: int = 0,
    shard_bytes: int = shards.SHARD_BYTES,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Preprocesses sources into the folder `output`, which appears when all is written. Returns the manifest.

    `num_proc` 0 means one process for each core this one may use. Raises ValueError that names file and line."""
    job[0].check(records.Encoder(job[1]))
    if not num_proc:
        num_proc = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = sum(source.num_bytes() for source in sources)
    blocks = itertools.chain.from_iterable(records.read_blocks(source, i) for i, source in enumerate(sources))
    with folders.new_folder(output, overwrite) as folder:
        builder = Builder(folder, sources, job, shard_bytes)
        try:
            with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="preprocess", disable=None) as bar:
                for block, result in run_blocks(blocks, job, num_proc):
                    builder.add(block, result)
                    bar.update(block.advance)
            manifest = builder.finish()
        finally:
            builder.abort()
    for line in builder.skipped[:SHOWN]:
        say(f"skipped {line['file']}:{line['line']}: {line['reason']}")
    if builder.skipped:
        say(f"skipped {len(builder.skipped)} lines in all, listed in {output / shards.SKIPPED}")
    if builder.unknown > builder.tokens / 10:
        share = 100 * builder.unknown / builder.tokens
        say(f"warning: {share:.0f} % of the tokens are unknown to {job[1].name}: is it made for this language?")
    return manifest
