"""Inputs -> a folder of shards, segment by segment, so that it can be shared out, killed and gone on with.

Memory holds some blocks and one segment's passages, whatever the input. Each segment that is finished has a record
(`segment_writer.py`); a run of the same job does only what has none, and the manifest is made of the records alone
(`merge.py`). So the bytes of the result depend on the input and the settings, not on processes, parts or kills.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import orjson
import xxhash
from tqdm import tqdm

from bge_ds import __version__
from bge_ds.data.preprocess import corpus_index, input_files, merge, output_folder, segment_writer, validate
from bge_ds.data.preprocess.input_files import Block, Source
from bge_ds.data.preprocess.rows import BlockRows
from bge_ds.data.preprocess.workers import Job, PreprocessSettings, run_blocks
from bge_ds.data.shards import shard_reader
from bge_ds.data.shards.manifest_file import (
    MANIFEST,
    PART,
    SCHEMA_VERSION,
    SKIPPED,
    Header,
    Manifest,
    Part,
    PartSource,
    TokenizerEntry,
    read_part,
    write_part,
)

SHOWN = 20  # skipped lines that are listed on the screen


@dataclass(frozen=True)
class Share:
    """Which segments a run makes, and of how much of the input. All of it by default."""

    part: int = 1  # counts from 1
    of: int = 1
    sample: int = 0  # the first lines of each source alone; 0: all

    def __post_init__(self) -> None:
        if not 1 <= self.part <= self.of:
            raise ValueError(f"--partition {self.part}/{self.of}: give i/n with i from 1 to n, e.g. 1/{max(1, self.of)}")
        if self.sample and self.of > 1:
            raise ValueError("--sample is a quick look, --partition shares out a whole input: give one of them")

    def takes(self, source: int, segment: int) -> bool:
        return (source + segment) % self.of == self.part - 1


def build(
    output: Path,
    inputs: list[Source],
    job: Job,
    *,
    num_proc: int = 0,
    shard_bytes: int = shard_reader.SHARD_BYTES,
    overwrite: bool = False,
    corpus_inputs: list[Source] | None = None,
    share: Share | None = None,
    say: Callable[[str], None] = print,
) -> Manifest | Part:
    """Preprocesses inputs into the folder `output`, which appears when all is written. Returns the manifest.

    `num_proc` 0 means one process for each core this one may use; `shard_bytes` is a segment's bytes of the input. With
    a share of several parts the result is a part for `merge.merge`, and what is returned is what it is of. A killed run
    is gone on with by the same call. Raises ValueError that names file and line."""
    settings, tokenizer = job
    settings.check(validate.BatchTokenizer(tokenizer, settings.word_segmenter))
    share = share or Share()
    if not num_proc:
        num_proc = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    run = _Build(inputs, corpus_inputs or [], settings, tokenizer, shard_bytes, share, num_proc)
    run.refuse_empty()
    with output_folder.new_folder(output, overwrite, run.job_hash(), say) as folder:
        if not (folder / MANIFEST).exists() and not (share.of > 1 and (folder / PART).exists()):
            run.write(folder, say)
            part = run.part(folder)
            if share.of == 1:
                merge.assemble(folder, [folder], part)
            else:
                corpus_index.remove_index(folder / segment_writer.JOURNAL)
                write_part(folder, part)
        result = merge.finish(folder) if share.of == 1 else read_part(folder)
    if share.of == 1:
        tell(output, result, tokenizer.name, say)
    return result


def tell(output: Path, manifest: Manifest, tokenizer: str, say: Callable[[str], None]) -> None:
    """Says which lines were skipped, and whether the tokenizer knows the language."""
    counts = manifest.counts
    if counts["skipped"]:
        with open(output / SKIPPED, "rb") as file:
            for line in map(orjson.loads, itertools.islice(file, SHOWN)):
                say(f"skipped {line['file']}:{line['line']}: {line['reason']}")
        say(f"skipped {counts['skipped']} lines in all, listed in {output / SKIPPED}")
    if counts["unknown_tokens"] > counts["tokens"] / 10:
        percent = 100 * counts["unknown_tokens"] / counts["tokens"]
        say(f"warning: {percent:.0f} % of the tokens are unknown to {tokenizer}: is it made for this language?")


@dataclass
class _Build:
    """One call of `build`: what goes in, and the steps to the records of all its segments."""

    inputs: list[Source]
    corpus: list[Source]
    settings: PreprocessSettings
    tokenizer: validate.TokenizerCore
    cut: int
    share: Share
    num_proc: int

    def refuse_empty(self) -> None:
        """Raises ValueError for an empty file now, where the end of a long run would bring it up."""
        for source in [*self.corpus, *(self.inputs if self.settings.on_error == "raise" else [])]:
            if not source.hub and not source.is_table and source.num_bytes() == 0:
                raise ValueError(f"{source.name}: the file is empty: it holds no line")

    def plan(self) -> list[Any]:
        """All that decides the rows and their places, but for the bytes of the inputs."""
        settings = asdict(self.settings)
        return [SCHEMA_VERSION, __version__, settings, self.tokenizer.fingerprint, self.cut, self.share.sample]

    def job_hash(self) -> str:
        """Tells whether what a killed run left can be gone on with: the same job on inputs that nobody touched."""
        plan = self.plan()
        plan[2] |= {"on_error": ""}  # a segment without a bad line is the same under both
        inputs = [[source.identity() for source in group] for group in (self.inputs, self.corpus)]
        return xxhash.xxh3_128_hexdigest(orjson.dumps([plan, inputs, self.share.part, self.share.of]))

    def part(self, folder: Path) -> Part:
        """What `merge.merge` needs to know of a run beside its records."""
        tokenizer = msgspec.convert(self.tokenizer, TokenizerEntry, from_attributes=True)
        header = Header(
            kind=self.settings.kind, bge_ds_version=__version__, tokenizer=tokenizer, sample=self.share.sample or None,
            **self.settings.named(),
        )  # fmt: skip

        def listed(stage: str, group: list[Source]) -> list[PartSource]:
            counts = [segment_writer.count_segments(folder, stage, number) for number in range(len(group))]
            return [
                PartSource(path=source.name, first_number=source.first_number, segments=count)
                for source, count in zip(group, counts, strict=True)
            ]

        # Times are left out: hosts may have copies of the inputs.
        sizes = [[source.name, source.num_bytes()] for source in (*self.inputs, *self.corpus)]
        return Part(
            schema_version=SCHEMA_VERSION, part=self.share.part, of=self.share.of,
            plan=xxhash.xxh3_128_hexdigest(orjson.dumps([self.plan(), sizes])),
            on_error=self.settings.on_error, header=header,
            sources=listed("rows", self.inputs), corpus=listed("corpus", self.corpus),
        )  # fmt: skip

    def write(self, folder: Path, say: Callable[[str], None]) -> None:
        """Makes all segments of this run's share that have no record yet."""
        (folder / segment_writer.JOURNAL).mkdir(exist_ok=True)
        if known := sum(1 for _ in (folder / segment_writer.JOURNAL).glob("*-*-*.json")):
            say(f"going on with {known} finished segments in {folder}")
        stages = [("rows", self.inputs, self.settings, None)]
        if self.corpus:
            journal = folder / segment_writer.JOURNAL
            # Groups refer to a corpus by rows, so no line of it may be passed over.
            entries = replace(self.settings.at_stage("corpus"), on_error="raise")
            stages = [("corpus", self.corpus, entries, None)]
            stages += [("rows", self.inputs, self.settings.at_stage("by_id"), journal)]
        size = sum(source.num_bytes() for _, group, _, _ in stages for source in group)
        with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="preprocess", disable=None) as bar:
            for stage, group, settings, index in stages:
                if index is not None and not (index / corpus_index.ENTRIES).exists():
                    corpus_index.build_index(index, self.corpus, self.cut, stages[0][2].columns)
                blocks = itertools.chain.from_iterable(
                    self._blocks(folder, stage, number, source, settings) for number, source in enumerate(group)
                )
                results = run_blocks(blocks, (settings, self.tokenizer), self.num_proc, index)
                with contextlib.closing(results):
                    self._take(folder, stage, group, settings, results, bar)

    def _blocks(self, folder: Path, stage: str, number: int, source: Source, settings: PreprocessSettings) -> Iterator[Block]:
        done = segment_writer.finished(folder, stage, number, clean=settings.on_error == "raise")
        count = segment_writer.count_segments(folder, stage, number)
        mine = partial(self.share.takes, number)
        if count is not None and all(k in done for k in range(count) if mine(k)):
            return
        sample = self.share.sample if stage == "rows" else 0
        wanted = mine if sample else lambda k: mine(k) and k not in done
        columns = settings.input_columns()
        yield from input_files.read_segments(source, number, self.cut, wanted, columns=columns, sample=sample)

    def _take(
        self,
        folder: Path,
        stage: str,
        group: list[Source],
        settings: PreprocessSettings,
        results: Iterable[tuple[Block, BlockRows | None]],
        bar: Any,
    ) -> None:
        """Writes what the workers send, which comes in the order of the input."""
        writer: segment_writer.SegmentWriter | None = None
        try:
            for block, result in results:
                if block.ends == "source":
                    segment_writer.end_source(folder, stage, block.source, block.segment)
                    continue
                if writer is None:
                    writer = segment_writer.SegmentWriter(folder, block.source, block.segment, settings, self.tokenizer)
                assert (writer.source, writer.segment) == (block.source, block.segment)
                if block.ends:
                    writer.finish()
                    writer = None
                    continue
                if result.bad and settings.on_error == "raise":
                    number, reason = result.bad[0]
                    place = input_files.place_of(group[block.source], block, number, self.cut, settings.input_columns())
                    raise ValueError(f"{place}: {reason}")
                writer.add(result)
                bar.update(block.advance)
        finally:
            if writer is not None:
                writer.abort()
