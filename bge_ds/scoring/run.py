"""Scores for training groups: blocks of groups, shared by the ranks.

Block k has the groups [k * BLOCK, (k + 1) * BLOCK) of the input, and rank k modulo the number of ranks scores it. A block is
packed by itself, longest pairs first, so that its bytes do not depend on the ranks. While one is scored, a thread reads and
tokenizes the next. Ranks exchange nothing but files (`job.py`), so none waits for another.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from bge_ds.data.preprocess import validate
from bge_ds.encoding.inputs import columns_of
from bge_ds.encoding.progress import Progress
from bge_ds.encoding.run import hash_of, prepare_device, read_ahead
from bge_ds.evaluation import DEFAULT_LENGTHS
from bge_ds.evaluation.embedder import Embedder, EmbeddingSettings, settings_folder
from bge_ds.modeling import cross_encoder, encoder
from bge_ds.scoring import groups as group_lines
from bge_ds.scoring import job as jobs
from bge_ds.scoring.groups import Group, GroupInput
from bge_ds.scoring.job import Job, Report, Settings
from bge_ds.scoring.teachers import (
    CrossEncoderTeacher,
    EmbedderTeacher,
    PairSettings,
    Read,
    Teacher,
    Tell,
    config_of,
    detect,
    layout_of,
)

BLOCK = 512  # groups
_FILES = ("config.json", "modules.json", "*/config.json", "config_sentence_transformers.json")
# Options that only one kind of teacher heeds, and their flags.
_OF_EMBEDDERS = {
    "query_prompt": "query_instruction_for_retrieval", "passage_prompt": "passage_instruction_for_retrieval",
    "pooling": "sentence_pooling_method", "normalize_embeddings": "normalize_embeddings",
}  # fmt: skip
_OF_CROSS_ENCODERS = {
    "query_instruction": "query_instruction_for_rerank", "passage_instruction": "passage_instruction_for_rerank",
    "prompt": "prompt", "max_len": "max_len", "normalize": "normalize",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is scored, by which teacher, into what; the flags of `bge_ds.score`, see `--help`."""

    model_name_or_path: str
    input: list[str]
    output: Path
    teacher: Literal["cross-encoder", "embedder"] | None = None
    normalize: bool = False
    min_pos_score: float | None = None
    max_neg_score: float | None = None
    max_len: int | None = None
    query_max_len: int | None = None
    passage_max_len: int | None = None
    query_instruction: str | None = None
    passage_instruction: str | None = None
    prompt: str | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    pooling: str | None = None
    normalize_embeddings: bool | None = None
    columns: list[str] = field(default_factory=list)
    batch_size: int | None = None
    overwrite: bool = False
    cache_dir: str | None = None
    use_cpu: bool = False
    bf16: bool = False


class Block(NamedTuple):
    number: int
    groups: list[Group]
    read: Read


def score(options: Options) -> Report | None:
    """Scores this rank's share; the report where all blocks are there by then, None where other ranks are at it still.

    Rank and number of ranks are the launcher's RANK and WORLD_SIZE. Raises ValueError for whatever the user can fix, before
    the model is loaded where possible.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    _check_output(options)
    groups = GroupInput(options.input, columns_of(options.columns, group_lines.FIELDS))
    settings = settings_of(options)
    output = options.output
    job, missing = jobs.take_up(output, settings, groups, BLOCK, rank=rank, world=world, overwrite=options.overwrite)
    if isinstance(job, Report):
        _say(f"{output} is whole and undamaged: nothing to do", rank)
        return job
    own = range(rank, job.num_blocks, world)
    if len(missing) < len(own):
        _say(f"going on: {len(own) - len(missing)} of {len(own)} blocks are finished", rank)
    if missing:
        teacher = load_teacher(options, settings)
        _say(f"{options.model_name_or_path}: {teacher.describe()}", rank)
        total, left = (sum(len(job.rows(block)) for block in blocks) for blocks in (own, missing))
        name = f"rank 0 of {world}: " if world > 1 else ""
        progress = Progress(total, total - left, name, shows=rank == 0, unit="groups")
        score_blocks(output, job, groups, missing, teacher, progress)
        progress.close()
    if (made := jobs.finish(output, job)) is None:
        _say("this rank's blocks are finished; the last rank writes the output", rank)
    return made


def _check_output(options: Options) -> None:
    """Raises ValueError for an output that would be read as input, by this run or the next."""
    output = options.output.resolve()
    for path in map(Path, options.input):
        if path.resolve() in (output, *output.parents):
            raise ValueError(f"--output {options.output} is or lies in --input {path}, which is read: name another place")


def settings_of(options: Options) -> Settings:
    """All that decides the scores. Raises ValueError where flags and model disagree, also on flags without effect."""
    name = options.model_name_or_path
    folder = settings_folder(name, options.cache_dir, _FILES)
    config = config_of(name, options.cache_dir)
    kind = detect(config, folder)
    if options.teacher is not None:
        kind = "embedder" if options.teacher == "embedder" else cross_encoder.kind_of(config)
    _refuse_vain_flags(options, kind)
    shared = {
        "model": name, "model_hash": hash_of(folder, name, options.cache_dir), "teacher": kind, "bf16": options.bf16,
        "normalize": options.normalize, "min_pos_score": options.min_pos_score, "max_neg_score": options.max_neg_score,
        "compressed": options.output.suffix == ".gz",
    }  # fmt: skip
    if kind != "embedder":
        cross_encoder.check(config, kind)
        pairs = pair_settings(options, kind, config)
        layout_of(config, validate.load_tokenizer(name, options.cache_dir), pairs, decoder=kind == "decoder")
        return Settings(**shared, **vars(pairs))
    how = EmbeddingSettings.read(
        folder, pooling=options.pooling, normalize=options.normalize_embeddings, query_prompt=options.query_prompt,
        passage_prompt=options.passage_prompt,
    )  # fmt: skip
    limit = encoder.longest_text(config)
    lengths = {side: getattr(options, side) or min(default, limit) for side, default in DEFAULT_LENGTHS.items()}
    encoder.check_lengths(config, **lengths)
    return Settings(
        **shared, **lengths, query_prompt=how.query_prompt, passage_prompt=how.passage_prompt, pooling=how.pooling,
        normalize_embeddings=how.normalize,
    )  # fmt: skip


def _refuse_vain_flags(options: Options, kind: str | None) -> None:
    vain = _OF_CROSS_ENCODERS if kind == "embedder" else _OF_EMBEDDERS | ({} if kind == "decoder" else {"prompt": "prompt"})
    defaults = {entry.name: entry.default for entry in fields(Options)}
    if given := [flag for option, flag in vain.items() if getattr(options, option) != defaults[option]]:
        taken = {"embedder": "an embedder", "decoder": "a decoder that answers Yes"}.get(kind or "", "an encoder of pairs")
        raise ValueError(
            f"--{given[0]} has no effect on {options.model_name_or_path}, taken for {taken}: drop it, or see --teacher"
        )


def pair_settings(options: Options, kind: cross_encoder.Kind, config) -> PairSettings:
    return PairSettings.of(
        kind, encoder.longest_text(config), max_len=options.max_len, query_max_len=options.query_max_len,
        passage_max_len=options.passage_max_len, query_prompt=options.query_instruction,
        passage_prompt=options.passage_instruction, prompt=options.prompt,
    )  # fmt: skip


def load_teacher(options: Options, settings: Settings) -> Teacher:
    """The model, on this rank's GPU where there are GPUs."""
    prepare_device(options.use_cpu)
    how = {"batch_size": options.batch_size, "bf16": options.bf16, "use_cpu": options.use_cpu, "cache_dir": options.cache_dir}
    if settings.teacher == "embedder":
        return EmbedderTeacher(
            Embedder.load(
                options.model_name_or_path, pooling=settings.pooling, normalize=settings.normalize_embeddings,
                query_prompt=settings.query_prompt, passage_prompt=settings.passage_prompt,
                query_max_len=settings.query_max_len, passage_max_len=settings.passage_max_len, **how,
            )
        )  # fmt: skip
    names = ("max_len", "query_max_len", "passage_max_len", "query_prompt", "passage_prompt", "prompt")
    pairs = PairSettings(**{name: getattr(settings, name) for name in names})
    return CrossEncoderTeacher.load(options.model_name_or_path, settings.teacher, pairs, **how)


def score_blocks(output: Path, job: Job, groups: GroupInput, numbers: list[int], teacher: Teacher, progress: Progress) -> None:
    """Writes these blocks."""
    settings = job.settings
    for block in read_ahead(lambda number: _read(job, groups, number, teacher), numbers):
        progress.tokenized(len(block.groups), block.read.tokens)
        scores = teacher.score(block.read, _share(progress, len(block.groups), block.read.units))
        if not np.isfinite(scores).all():
            _, group_P = group_lines.passages_of(block.groups)
            row = job.rows(block.number)[int(group_P[np.argmin(np.isfinite(scores))])]
            raise ValueError(f"a score of group {row} (counted from 0) is not finite: check the model, and try without --bf16")
        if settings.normalize:
            scores = (1 / (1 + np.exp(-scores.astype(np.float64)))).astype(np.float32)
        kept, counts = group_lines.scored(block.groups, scores, settings.min_pos_score, settings.max_neg_score)
        jobs.write_block(output, job, block.number, kept, counts | {"tokens": block.read.tokens})


def _share(progress: Progress, groups: int, units: int) -> Tell:
    """What a teacher tells its passes: they count pairs or texts, and the progress groups, by their share of a block."""
    told = done = 0

    def tell(some: int, tokens: int) -> None:
        nonlocal told, done
        done += some
        progress.encoded(done * groups // units - told, tokens)
        told = done * groups // units

    return tell


def _read(job: Job, groups: GroupInput, number: int, teacher: Teacher) -> Block:
    found = groups.groups(job.input.starts[number], len(job.rows(number)))
    passages, group_P = group_lines.passages_of(found)
    return Block(number, found, teacher.read([group["query"] for group in found], passages, group_P))


def _say(text: str, rank: int) -> None:
    if rank == 0:
        print(text, file=sys.stderr, flush=True)
