"""Groups as folders of fine-tuning shards: the plan of their token ids, and the same shards with other negatives.

Nothing is tokenized. Passages are told apart by their ids as training reads them: cut to the shortest `passage_max_len` of the
folders. So ids that are equal are one passage, which has one vector, whatever segment or folder it is from. A query equals a
passage where their ids are equal without special tokens and instructions. The plan has rows of the joined tables on the disk:

    passages.npy   of each distinct passage, its first row
    queries.npy    of each distinct query with its prompt, the first group

The output names the passages that are stored already, as `--corpus` of the preprocessing does: their files are linked.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import xxhash

from bge_ds import __version__
from bge_ds.data.files import link_or_copy
from bge_ds.data.preprocess import output_folder, validate
from bge_ds.data.preprocess.input_files import ENDINGS
from bge_ds.data.ragged import RaggedArrays, stretches
from bge_ds.data.shards import integrity
from bge_ds.data.shards.manifest_file import (
    Manifest,
    ShardEntry,
    SourceEntry,
    join_manifests,
    read_manifest,
    write_manifest,
)
from bge_ds.data.shards.shard_reader import FinetuneShards, list_array, schemas
from bge_ds.data.shards.shard_writer import TableWriter
from bge_ds.encoding.inputs import ShardInput
from bge_ds.mining.plan import PASSAGES, QUERIES, Written, write_arrays

_READ = 16384  # passages at a time
_SIDES = {PASSAGES: "passage", QUERIES: "query"}


class Shards:
    """Groups of folders of shards that are read as one; see `plan.Input`."""

    def __init__(self, folders: list[str], tokenizer: str, known: Path, cache_dir: str | None = None) -> None:
        """tokenizer: that the shards were made with. Raises ValueError for folders that do not go together, or hold no
        queries."""
        self.folders, self.tokenizer, self.known, self.cache_dir = folders, tokenizer, known, cache_dir
        opened = ShardInput(folders, "query")
        if not isinstance(opened.shards, FinetuneShards):
            raise ValueError(
                f"--input {folders[0]} holds texts for pre-training, without queries: give what bge_ds.preprocess finetune made"
            )
        self.shards, self.manifests = opened.shards, opened.manifests

    def check_output(self, output: Path, overwrite: bool) -> None:
        if output.name.endswith(ENDINGS):
            raise ValueError(f"--output {output}: the negatives of shards are written as shards: name a folder")
        if same := [folder for folder in self.folders if Path(folder).resolve() == output.resolve()]:
            raise ValueError(f"--output {output} is read as --input {same[0]}: name another folder")
        output_folder.check_output(output, overwrite)

    def identity(self) -> dict[str, Any]:
        return {"--input": [read_manifest(Path(folder)).fingerprint for folder in self.folders]}

    def token_ids(self, name: str, folder: Path | None = None) -> ShardInput:
        rows = None if folder is None else np.load(folder / f"{name}.npy", mmap_mode="r")
        return ShardInput(self.folders, _SIDES[name], rows)

    def write_plan(self, folder: Path, query_prompt: str) -> dict[str, int]:
        joined, read = self.shards.manifest, _TokenReader(self.shards.manifest, self.tokenizer, self.cache_dir)
        passage_prompt = joined.passage_instruction_for_retrieval or ""
        texts, prompted, plain, positives, counts = bytearray(), bytearray(), bytearray(), [], []
        for first in range(0, self.shards.num_passages, _READ):
            rows_K = np.arange(first, min(first + _READ, self.shards.num_passages))
            ids = read.cut(self.shards.passages(rows_K), joined.passage_max_len)
            texts += _digests(read.content(ids, passage_prompt))
        for first, batches in self.shards.group_shards():
            for batch in batches:
                ids = read.cut(_ragged(batch.column("query")), joined.query_max_len)
                prompts = [query_prompt if given is None else given for given in batch.column("prompt").to_pylist()]
                prompted += _digests(ids)
                plain += _digests(read.contents(ids, prompts))
                pos = _ragged(batch.column("pos"))
                positives.append(pos.values + first)
                counts.append(pos.lengths)
        places, pos_G = np.concatenate(positives), np.concatenate(counts)
        firsts = write_arrays(folder, texts, len(texts), prompted, plain, places, pos_G)
        np.save(folder / f"{PASSAGES}.npy", np.flatnonzero(firsts.passages))
        np.save(folder / f"{QUERIES}.npy", np.flatnonzero(firsts.queries))
        return firsts.counts

    @contextlib.contextmanager
    def written(
        self, output: Path, folder: Path, negatives: Iterator[np.ndarray], job: str, overwrite: bool
    ) -> Iterator[Written]:
        stored = np.load(folder / f"{PASSAGES}.npy", mmap_mode="r")
        with output_folder.new_folder(output, overwrite, job) as partial:
            shutil.rmtree(partial)  # of a killed run
            partial.mkdir()
            passages, corpus = self._link_passages(partial)
            groups = self._write_groups(partial, (stored[rows] for rows in negatives))
            manifest = self._write_manifest(partial, corpus, [*passages, *groups.entries], groups.alone)
            yield Written(manifest.fingerprint, groups.lost)

    def hash_of(self, output: Path) -> str | None:
        if not output.exists():
            raise FileNotFoundError(output)
        try:
            integrity.check_hashes(output, self.known)
            return read_manifest(output).fingerprint
        except ValueError:
            return None

    # ------------------------------------------------------------------------------------------------------- the parts

    def _link_passages(self, target: Path) -> tuple[list[ShardEntry], list[SourceEntry]]:
        """The passages of all folders under the names that they have in one: as files, and as the sources of a corpus."""
        entries: list[ShardEntry] = []
        corpus: list[SourceEntry] = []
        row = 0
        for name, manifest in zip(self.folders, self.manifests, strict=True):
            begin, sources = len(corpus), manifest.corpus or manifest.sources
            rows = [0] * len(sources)
            for entry in manifest.shards:
                if entry.table == "passages":
                    source = begin + entry.source
                    file = f"passages-{source:05d}-{entry.segment:06d}.arrow"
                    link_or_copy(Path(name) / entry.file, target / file)
                    entries.append(msgspec.structs.replace(entry, file=file, source=source))
                    rows[entry.source] += entry.rows
            for source, count in zip(sources, rows, strict=True):
                corpus.append(SourceEntry(path=source.path, rows=(row, row + count)))
                row += count
        return entries, corpus

    def _write_groups(self, target: Path, negatives: Iterator[np.ndarray]) -> _Groups:
        """The groups of all folders, with rows of the joined table of passages."""
        schema = schemas("finetune", self.shards.manifest.tokenizer.vocab_size)["groups"]
        made, shards = _Groups([], 0, 0), self.shards.group_shards()
        begin = 0
        for manifest in self.manifests:
            for entry in manifest.shards:
                if entry.table != "groups":
                    continue
                first, batches = next(shards)
                writer = TableWriter(target, "groups", schema, begin + entry.source, entry.segment)
                try:
                    for batch in batches:
                        neg = RaggedArrays.of(list(islice(negatives, batch.num_rows)))
                        writer.write(_columns(batch, first, neg))
                        made = made.add(batch, neg)
                    made.entries.extend(writer.close())
                finally:
                    writer.abort()
            begin += len(manifest.sources)
        return made

    def _write_manifest(self, target: Path, corpus: list[SourceEntry], shards: list[ShardEntry], alone: int) -> Manifest:
        joined = join_manifests(self.manifests)
        counts = {name: count for name, count in joined.counts.items() if name != "duplicates"}
        changed = msgspec.structs.replace(
            joined, bge_ds_version=__version__, corpus=corpus, counts=counts | {"groups_without_negatives": alone},
            sources=[msgspec.structs.replace(source, folder=0) for source in joined.sources], shards=shards,
        )  # fmt: skip
        return write_manifest(target, msgspec.to_builtins(changed))


class _Groups(NamedTuple):
    """Groups that were written. alone: of them, how many have no negative; lost: how many lost `neg_scores`."""

    entries: list[ShardEntry]
    alone: int
    lost: int

    def add(self, batch: pa.RecordBatch, neg: RaggedArrays) -> _Groups:
        scores = batch.column("neg_scores")
        return _Groups(self.entries, self.alone + int((neg.lengths == 0).sum()), self.lost + len(scores) - scores.null_count)


def _columns(batch: pa.RecordBatch, first: int, neg: RaggedArrays) -> list[pa.Array]:
    """A batch of groups with positives that count from the first passage of all, these negatives, and no scores of others."""
    pos = _ragged(batch.column("pos"))
    changed = {
        "pos": list_array(pos.values + first, pos.lengths, pa.int64()),
        "neg": list_array(neg.values, neg.lengths, pa.int64()),
        "neg_scores": pa.nulls(batch.num_rows, batch.schema.field("neg_scores").type),
    }
    return [changed.get(name, batch.column(name)) for name in batch.schema.names]


class _TokenReader:
    """Token ids of one tokenizer without what is not the text's."""

    def __init__(self, manifest: Manifest, tokenizer: str, cache_dir: str | None) -> None:
        self.before, self.after = len(manifest.tokenizer.prefix_ids), len(manifest.tokenizer.suffix_ids)
        self._backend = validate.load_tokenizer(tokenizer, cache_dir).backend_tokenizer

    def cut(self, ids: RaggedArrays, length: int | None) -> RaggedArrays:
        """As training reads them."""
        return ids.cut(length or 0, self.after)

    def content(self, ids: RaggedArrays, prompt: str) -> RaggedArrays:
        """Ids without special tokens and without a prompt, where they begin with that one's own."""
        found = ids.inner(self.before, self.after)
        # The space behind a prompt is part of the word behind it, or no token.
        prompt_P = np.array(self._backend.encode(prompt.rstrip(), add_special_tokens=False).ids, np.int64)
        if not len(prompt_P):
            return found
        taken_K = np.zeros(len(found.lengths), np.int64)
        long = np.flatnonzero(found.lengths > len(prompt_P))
        heads = found.values[found.starts[long][:, None] + np.arange(len(prompt_P))]
        taken_K[long[(heads == prompt_P).all(axis=1)]] = len(prompt_P)
        lengths_K = found.lengths - taken_K
        return RaggedArrays(stretches(found.values, found.starts + taken_K, lengths_K), lengths_K)

    def contents(self, ids: RaggedArrays, prompts: list[str]) -> RaggedArrays:
        """The same, each with a prompt of its own."""
        if len(set(prompts)) == 1:
            return self.content(ids, prompts[0])
        found: list[Any] = [None] * len(prompts)
        for prompt in sorted(set(prompts)):
            places = [k for k, other in enumerate(prompts) if other == prompt]
            for k, content in zip(places, self.content(ids.take(np.array(places)), prompt).split(), strict=True):
                found[k] = content
        return RaggedArrays.of(found)


def _ragged(column: pa.ListArray) -> RaggedArrays:
    return RaggedArrays(column.flatten().to_numpy(), column.value_lengths().to_numpy().astype(np.int64))


def _digests(ids: RaggedArrays) -> bytes:
    """What equal ids share, end to end."""
    data = memoryview(ids.values.astype(np.int32)).cast("B")
    ends = (4 * np.cumsum(ids.lengths)).tolist()
    return b"".join(xxhash.xxh3_128_digest(data[a:b]) for a, b in zip([0, *ends], ends, strict=False))
