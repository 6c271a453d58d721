"""Hard negatives for training groups: plan, encode, search, select, write; blocks of groups are shared by the ranks.

Shapes: Q queries, G groups of a block, N negatives, D features.

Rank r of R mines blocks r, r + R, r + 2 R and so on. A block's bytes depend neither on the ranks nor on other blocks. Ranks
exchange nothing but files (`work.py`); each waits once, until all vectors are there.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bge_ds.data.preprocess.prepare import cache_folder
from bge_ds.data.shards.manifest_file import MANIFEST
from bge_ds.encoding import run as encoding
from bge_ds.encoding.output import locked
from bge_ds.encoding.vectors import Vectors, open_vectors
from bge_ds.evaluation.embedder import Side
from bge_ds.mining import search, selection
from bge_ds.mining.lines import Lines
from bge_ds.mining.plan import PASSAGES, QUERIES, Input, Plan
from bge_ds.mining.search import ExactSearch, FaissSearch
from bge_ds.mining.selection import Rules
from bge_ds.mining.shards import Shards
from bge_ds.mining.work import INDEX, Mined, Report, Task, Work

SIDES: dict[str, Side] = {QUERIES: "query", PASSAGES: "passage"}


@dataclass(frozen=True)
class Options:
    """What is mined, with which model, into what; the flags of `bge_ds.mine`, see `--help`."""

    model_name_or_path: str
    input: list[str]
    output: Path
    candidate_pool: list[str] | None = None
    rules: Rules = field(default_factory=Rules)
    index: Literal["exact", "faiss"] = "exact"
    probes: int | None = None
    search_batch_size: int | None = None
    work: Path | None = None
    overwrite: bool = False
    query_max_len: int | None = None
    passage_max_len: int | None = None
    batch_size: int | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    pooling: str | None = None
    normalize: bool | None = None
    cache_dir: str | None = None
    use_cpu: bool = False
    bf16: bool = False

    @property
    def work_folder(self) -> Path:
        return self.work or self.output.with_name(f".{self.output.name}.mining")

    def encoding(self, name: str) -> encoding.Options:
        """How the queries or the passages of the plan are encoded."""
        side = SIDES[name]
        prompt = {f"{side}_prompt": getattr(self, f"{side}_prompt")}
        return encoding.Options(
            self.model_name_or_path, [str(self.work_folder / f"{name}.arrow")], self.work_folder / name, side=side,
            max_len=getattr(self, f"{side}_max_len"), batch_size=self.batch_size, pooling=self.pooling,
            normalize=self.normalize, cache_dir=self.cache_dir, use_cpu=self.use_cpu, bf16=self.bf16, **prompt,
        )  # fmt: skip


def mine(options: Options) -> Report | None:
    """Mines this rank's share; the report where the output is there by then, None where other ranks are at it still.

    Rank and number of ranks are the launcher's RANK and WORLD_SIZE. Raises ValueError for whatever the user can fix, before
    the model is loaded where possible.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    task = task_of(options)
    work = Work(options.work_folder, options.output, task, keep=options.work is not None, overwrite=options.overwrite)
    try:
        with work.joined() as made:
            if made is None:
                _say(f"{options.output} is there and undamaged: nothing to do")
                return work.report()
            if rank == 0:
                _say(", ".join(f"{count:,} {name}" for name, count in work.counts.items()))
            queries, passages = encode(options, task.input)
            exact = ExactSearch(
                passages, work.counts["pool"], task.rules.range_for_sampling[1], encoding.prepare_device(options.use_cpu),
                options.search_batch_size or search.TILE,
            )  # fmt: skip
            found = exact if options.index == "exact" else open_faiss(options, exact)
            blocks = work.blocks()
            for block in range(rank, len(blocks), world):
                if not work.is_finished(block):
                    work.write(block, mine_block(made, blocks[block], queries, passages, found, task.rules, exact.pool))
                    if rank == 0:
                        _say(f"mined up to group {blocks[block].stop:,} of {work.counts['groups']:,}")
            return work.finish(lambda: None if found is exact else search.recall(found, exact, queries))
    except OSError as error:
        place = error.filename or work.folder
        raise ValueError(f"{place}: {error.strerror or error}: fix that; the same command continues") from error


def task_of(options: Options) -> Task:
    """What is mined. Raises ValueError for paths and settings that cannot serve."""
    source = open_input(options)
    source.check_output(options.output, overwrite=True)
    if options.probes is not None and options.index == "exact":
        raise ValueError("--probes has no effect on the exact index: drop it, or give --index faiss")
    if options.index == "faiss":
        search.load_faiss()
    settings = {side: encoding.settings_of(options.encoding(name), source.token_ids(name)) for name, side in SIDES.items()}
    how = {"index": options.index, "probes": options.probes}
    return Task(source, settings, options.rules, how)


def open_input(options: Options) -> Lines | Shards:
    """The groups. Raises ValueError for paths that do not go together."""
    known = cache_folder(options.cache_dir)
    shards = _shards_of(options.input)
    if shards and (others := [path for path in options.input if path not in shards]):
        raise ValueError(f"--input: {shards[0]} is a folder of shards and {others[0]} is not: mine them one after the other")
    if shards and options.candidate_pool:
        raise ValueError("--candidate_pool: the candidates of shards are their own passages: drop it, or mine from lines")
    if pool := _shards_of(options.candidate_pool or []):
        raise ValueError(f"--candidate_pool {pool[0]} is a folder of shards, which hold token ids: give lines of `text`")
    if shards:
        return Shards(shards, options.model_name_or_path, known, options.cache_dir)
    return Lines(options.input, options.candidate_pool, known)


def _shards_of(paths: list[str]) -> list[str]:
    return [path for path in paths if (Path(path) / MANIFEST).is_file()]


def encode(options: Options, source: Input) -> tuple[Vectors, Vectors]:
    """(queries, passages), encoded by all ranks together."""
    alone = True
    for name in SIDES:
        how, texts = options.encoding(name), source.token_ids(name, options.work_folder)
        if texts is None and name == QUERIES:
            how = replace(how, query_prompt="")  # the texts of a plan hold their prompts
        alone &= encoding.encode(how, texts) is not None
    if not alone:
        _say("waiting for the vectors of the other ranks")
    folders = [options.work_folder / name for name in SIDES]
    while not all((folder / MANIFEST).is_file() for folder in folders):
        time.sleep(0.2)
    return open_vectors(folders[0]), open_vectors(folders[1])


def open_faiss(options: Options, exact: ExactSearch) -> FaissSearch:
    """The index, built by whoever comes first."""
    path = options.work_folder / INDEX
    with locked(options.work_folder):
        if not path.exists():
            search.build_index(path, exact.passages, exact.pool)
    return FaissSearch(search.open_index(path, options.probes), exact.kept)


def mine_block(
    made: Plan, groups: range, queries: Vectors, passages: Vectors, found: ExactSearch | FaissSearch, rules: Rules, pool: int
) -> Mined:
    """The negatives of a block of groups."""
    vectors_Q, place_G = np.unique(made.vector[groups.start : groups.stop], return_inverse=True)
    queries_QD = queries[vectors_Q]
    scores_QK, rows_QK = found(queries_QD)
    query_G = made.query[groups.start : groups.stop].tolist()
    lowest_G = lowest_positives(made, query_G, queries_QD, place_G, passages) if rules.has_margin else np.zeros(len(groups))
    rows_GN = np.full((len(groups), rules.negative_number), -1)
    filled_G, dropped_R = np.zeros(len(groups), np.int64), np.zeros(len(selection.REASONS), np.int64)
    for g, (group, query, place) in enumerate(zip(groups, query_G, place_G.tolist(), strict=True)):
        never: dict[str, Any] = {"positives_E": made.positives_of(query), "own": int(made.own[query]), "lowest": lowest_G[g]}
        chosen, dropped = selection.choose(group, rows_QK[place], scores_QK[place], **never, rules=rules)
        dropped_R += dropped
        if not rules.no_fill and len(chosen) < rules.negative_number:
            own_1D = queries_QD[place : place + 1]
            more = selection.fill(
                group, chosen, **never, rules=rules, pool=pool,
                score=lambda rows_K, own_1D=own_1D: search.products(own_1D, passages, rows_K),
            )  # fmt: skip
            filled_G[g] = len(more)
            chosen = np.concatenate([chosen, more])
        rows_GN[g, : len(chosen)] = chosen
    return Mined(rows_GN, filled_G, dropped_R)


def lowest_positives(
    made: Plan, query_G: list[int], queries_QD: np.ndarray, place_G: np.ndarray, passages: Vectors
) -> np.ndarray:
    """Of each group, the score of its query's lowest-scoring positive."""
    positives = [made.positives_of(query) for query in query_G]
    counts_G = np.fromiter(map(len, positives), np.int64, len(positives))
    scores = search.products(queries_QD[np.repeat(place_G, counts_G)], passages, np.concatenate(positives))
    return np.minimum.reduceat(scores, np.cumsum(counts_G) - counts_G)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
