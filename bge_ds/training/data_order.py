"""From the arguments and the opened shards to a run's order, and the table that says what it takes of each set.

A set is an entry of --train_data where several are given, else each input file. --same_dataset_within_batch tells files
apart in any case: an entry's share is then divided over its files by their rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np

from bge_ds.config.arguments import TrainArguments
from bge_ds.config.validation import check_token_budget
from bge_ds.data.sampling.length_grouping import WINDOW, LengthGroupedSampler
from bge_ds.data.sampling.mixture import ByEpoch, ByWeight, MixtureSampler, SameDatasetBatchSampler, counts_of
from bge_ds.data.sampling.sampler import EpochSampler, Sampler, mix64
from bge_ds.data.sampling.token_batching import TokenBatchSampler
from bge_ds.data.shards.shard_reader import FinetuneShards, PretrainShards
from bge_ds.distributed import collectives

_SHOWN = 24  # sets in the table

Shards: TypeAlias = FinetuneShards | PretrainShards


def split_weights(entries: list[str]) -> tuple[list[str], list[float] | None]:
    """The paths of --train_data and their weights; None: no entry has one.

    What follows the last '=' of an entry is its weight, unless the whole entry is a path that exists. Raises ValueError for a
    weight that is no number above 0, and where some entries have one and others not.
    """
    paths, weights = [], []
    for entry in entries:
        path, sign, weight = entry.rpartition("=")
        if not sign or Path(entry).exists():
            paths.append(entry)
            continue
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf and path):
            raise ValueError(f"--train_data {entry}: {weight!r} is no weight; give PATH=NUMBER, the number above 0")
        paths.append(path)
        weights.append(value)
    if weights and len(weights) < len(paths):
        bare = next(entry for entry in entries if entry in paths)
        raise ValueError(f"--train_data {bare} has no weight and other entries have one; give each PATH=WEIGHT, or none")
    if weights and len(weights) == 1:
        raise ValueError(f"--train_data {entries[0]}: the weight of a single entry has no effect; give its path alone")
    if len(set(paths)) < len(paths):
        raise ValueError(f"--train_data {' '.join(entries)}: a path stands twice; keep one, with the weight of both")
    return paths, weights or None


@dataclass(frozen=True)
class Set:
    """What the order takes as one set. kept: rows after the cut to max_example_num_per_dataset. share: relative, or None."""

    name: str
    spans: tuple[tuple[int, int], ...]
    kept: int
    skipped: int | None  # bad lines left out when the shards were made; None: not known by file
    share: float | None = None

    @property
    def rows(self) -> int:
        return sum(end - start for start, end in self.spans)


def sets_of(args: TrainArguments, data: Shards) -> list[Set]:
    """The sets of a run, those without rows left out. Raises ValueError where the mixture asked for means nothing."""
    paths, weights = split_weights(args.train_data)
    temperature, same = args.mixing_temperature, getattr(args, "same_dataset_within_batch", False)
    if weights and temperature is not None:
        raise ValueError("--mixing_temperature and the weights of --train_data exclude each other: both are shares; keep one")
    files, left_out = _sort_small(args, data, paths, _files(data, getattr(args, "max_example_num_per_dataset", None)))
    if left_out and not any(file.kept for _, file in files):
        raise ValueError(
            f"--small_threshold {getattr(args, 'small_threshold', 0)} leaves no set of {' '.join(paths)}; lower it"
        )
    if len(data.folders) > 1 and (weights or temperature is not None):  # each entry has a folder of its own
        sets = [_merged(path, [file for k, file in files if k == entry]) for entry, path in enumerate(paths)]
        if empty := [of.name for of in sets if not of.kept]:
            raise ValueError(f"--train_data {empty[0]} holds no rows, so it cannot have a share; leave it out")
    else:
        sets = [file for _, file in files if file.kept]
    if weights:
        sets = [replace(of, share=weight) for of, weight in zip(sets, weights, strict=True)]
    elif temperature is not None:
        sets = [replace(of, share=of.kept ** (1 / temperature)) for of in sets]
    if same:
        by_span = {file.spans[0]: file for _, file in files if file.kept}
        sets = [file for of in sets for file in _split_by_file(of, [by_span[span] for span in of.spans if span in by_span])]
    for flag, given in (("same_dataset_within_batch", same), ("mixing_temperature", temperature is not None)):
        if given and len(sets) < 2 and not (flag == "same_dataset_within_batch" and _has_types(args, data)):
            raise ValueError(f"--{flag} has no effect: {' '.join(paths)} is a single set; give several, or drop --{flag}")
    return sets


def _has_types(args: TrainArguments, data: Shards) -> bool:
    """Whether lines have a `type` that means something, as it does where each batch is of one set."""
    return getattr(args, "heeds_types", False) and bool(cast(FinetuneShards, data).distinct("type") - {"normal"})


def _files(data: Shards, most: int | None) -> list[tuple[int, Set]]:
    """(number of its folder, the file as a set) of each input file."""
    found = []
    for source in data.manifest.sources:
        rows = source.rows[1] - source.rows[0]
        kept = rows if most is None else min(rows, most)
        found.append((source.folder, Set(source.path, (source.rows,), kept, source.skipped)))
    return found


def _sort_small(
    args: TrainArguments, data: Shards, paths: list[str], files: list[tuple[int, Set]]
) -> tuple[list[tuple[int, Set]], list[Set]]:
    """(files with the small ones of each folder merged into one set, what is left out), by FlagEmbedding's two thresholds.

    A folder is an entry of --train_data that holds files, or shards. A small file that is an entry by itself is left out.
    """
    least, least_merged = (getattr(args, name, 0) for name in ("small_threshold", "drop_threshold"))
    small = [(k, file) for k, file in files if 0 < file.kept < least]
    alone = [(k, file) for k, file in small if _folder_of(data, paths, k, file) is None]
    left_out, merged = [file for _, file in alone], []
    for folder in dict.fromkeys(_folder_of(data, paths, k, file) for k, file in small):
        if folder is None:
            continue
        together = [(k, file) for k, file in small if _folder_of(data, paths, k, file) == folder]
        whole = _merged(f"{folder}, {len(together)} small file{'s' * (len(together) > 1)}", [file for _, file in together])
        if whole.kept < least_merged:
            left_out.append(whole)
        else:
            merged.append((together[0][0], whole))
    return [pair for pair in files if pair not in small] + merged, left_out


def _folder_of(data: Shards, paths: list[str], k: int, file: Set) -> str | None:
    own = str(data.folders[k])
    if own in paths:
        return own
    return next((entry for entry in paths if Path(entry) in Path(file.name).parents), None)


def _merged(name: str, files: list[Set]) -> Set:
    skipped = [file.skipped for file in files if file.skipped is not None]
    spans = tuple(span for file in files for span in file.spans)
    return Set(name, spans, sum(file.kept for file in files), sum(skipped) if len(skipped) == len(files) else None)


def _split_by_file(of: Set, files: list[Set]) -> list[Set]:
    """The files of a set, each with its part by rows of the set's share."""
    return [replace(file, share=None if of.share is None else of.share * file.kept / of.kept) for file in files]


def make_order(args: TrainArguments, data: Shards) -> Sampler:
    """What each step takes of the shards `data`: a number of texts, or of tokens where --per_device_train_tokens is given."""
    seed = args.seed if args.data_seed is None else args.data_seed
    micro_batches = args.gradient_accumulation_steps * collectives.world_size()
    batch = args.per_device_train_batch_size * micro_batches
    sets = sets_of(args, data)
    same, weighted = getattr(args, "same_dataset_within_batch", False), sets[0].share is not None
    one = partial(
        EpochSampler,
        global_batch=batch,
        max_per_span=getattr(args, "max_example_num_per_dataset", None),
        shuffle=args.train_sampling_strategy != "sequential",
    )
    lengths = partial(_tokens, data, args.text_lengths)
    group = partial(LengthGroupedSampler, lengths=lengths) if args.train_sampling_strategy == "group_by_length" else None
    if not (same or weighted):
        sampler: Sampler = one(seed=seed, spans=tuple(source.rows for source in data.manifest.sources))
    else:
        sizes = batches_of(args, data, sets) if same else (batch,) * len(sets)
        own = tuple(
            one(seed=int(mix64(seed, 7, i)), spans=of.spans, global_batch=size)
            for i, (of, size) in enumerate(zip(sets, sizes, strict=True))
        )
        if same:
            by_epoch = ByEpoch(seed, tuple(map(len, own)), sizes, own[0].shuffle)
            turns = ByWeight(seed, _counts(sets, sizes)) if weighted else by_epoch
            # Each set keeps a window, as sets take turns: of many sets, smaller ones.
            window = max(8, min(WINDOW, 1024 // len(sets)))
            grouped = tuple(group(of, whole_batches=not weighted, window=window) for of in own) if group else own
            return SameDatasetBatchSampler(seed, grouped, turns, batch)
        sampler = MixtureSampler(seed, own, ByWeight(seed, _counts(sets, sizes)), batch)
    if args.per_device_train_tokens is not None:
        check_token_budget(args)
        tokens = cast(PretrainShards, data).lengths  # fine-tuning has no token budget
        return TokenBatchSampler(sampler, tokens, args.text_lengths[0], args.per_device_train_tokens, micro_batches)
    return group(sampler) if group else sampler


def batches_of(args: TrainArguments, data: Shards, sets: list[Set]) -> tuple[int, ...]:
    """Texts of a step of each set, where each step is of one: of a set with lines of a symmetric `type`, half as many.

    A file's first line speaks for it, as in FlagEmbedding.
    """
    micro_batches = args.gradient_accumulation_steps * collectives.world_size()
    whole, half = args.per_device_train_batch_size, max(1, args.per_device_train_batch_size // 2)
    if not getattr(args, "heeds_types", False):
        return (whole * micro_batches,) * len(sets)
    groups = cast(FinetuneShards, data)
    symmetric = (any("symmetric" in (groups.notes(first)[0] or "") for first, _ in of.spans) for of in sets)
    return tuple((half if halved else whole) * micro_batches for halved in symmetric)


def smallest_batch(args: TrainArguments, data: Shards) -> int | None:
    """Texts of the smallest step, where some are smaller than others; None: all are alike."""
    if not getattr(args, "same_dataset_within_batch", False):
        return None
    sizes = batches_of(args, data, sets_of(args, data))
    return min(sizes) if len(set(sizes)) > 1 else None


def _counts(sets: list[Set], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Each set's turns of a cycle. sizes: texts of a turn, which weigh as much as the turns of it: a share is one of texts."""
    counts = counts_of([(of.share or 0.0) * max(sizes) / size for of, size in zip(sets, sizes, strict=True)])
    if 0 in counts:
        name = sets[counts.index(0)].name
        raise ValueError(f"--train_data: the share of {name} is below one text in a thousand million; leave it out")
    return counts


def _tokens(data: Shards, longest: tuple[int, ...], rows_K: np.ndarray) -> np.ndarray:
    """Tokens by which rows are grouped, cut as in training: of fine-tuning, the query's and first positive's."""
    if len(longest) == 2:
        return cast(FinetuneShards, data).lengths(rows_K, *longest)
    return np.minimum(cast(PretrainShards, data).lengths(rows_K), longest[0])


def table(args: TrainArguments, data: Shards, order: Sampler, steps: int) -> str:
    """What the run takes of each set in `steps` steps: rows kept, dropped and why, weight, share of the texts, epochs."""
    sets = sets_of(args, data)
    if isinstance(order, TokenBatchSampler):
        order, texts = order.line, round(order.epochs(steps) * len(order))
    else:
        texts = steps * order.global_batch
    # A plain order has the input files for its spans, and some of them may be empty.
    taken = [texts_of for texts_of in order.texts_of_sets(texts) if texts_of or not isinstance(_ungrouped(order), EpochSampler)]
    weights, texts = sum(of.share or 0 for of in sets), sum(taken)
    taught, smaller = _taught(args, data), ["" for _ in sets]
    if (batches := getattr(order, "batches", None)) is not None:
        smaller = [f", {size} a step" if size < order.global_batch else "" for size in batches.tolist()]
    lines = [f"{'kept':>14}{'weight':>9}{'share':>9}{'epochs':>9}  set"]
    for of, texts_of, size in list(zip(sets, taken, smaller, strict=True))[:_SHOWN]:
        dropped = [f"{of.rows - of.kept:,} above max_example_num_per_dataset"] if of.rows > of.kept else []
        dropped += [f"{of.skipped:,} bad lines"] if of.skipped else []
        weight = "-" if of.share is None else f"{of.share / weights:.4f}"
        share = f"{texts_of / texts:.2%}"
        note = f" (dropped: {', '.join(dropped)})" if dropped else ""
        lines.append(f"{of.kept:>14,}{weight:>9}{share:>9}{texts_of / of.kept:>9.2f}  {of.name}{size}{taught(of)}{note}")
    if len(sets) > _SHOWN:
        lines.append(f"{'':>14}and {len(sets) - _SHOWN} more sets")
    paths, files = split_weights(args.train_data)[0], _files(data, getattr(args, "max_example_num_per_dataset", None))
    for of in _sort_small(args, data, paths, files)[1]:
        lines.append(f"{'':>14}left out by --small_threshold or --drop_threshold: {of.name}, {of.kept:,} groups")
    bad = data.manifest.counts.get("skipped", 0)
    if bad and any(of.skipped is None for of in sets):
        lines.append(
            f"{'':>14}{bad:,} bad lines were dropped when the shards were made; their folder's skipped.jsonl lists them"
        )
    return "\n".join(lines)


def _taught(args: TrainArguments, data: Shards) -> Callable[[Set], str]:
    """With --knowledge_distillation, the words that say which sets have a teacher's scores."""
    if not getattr(args, "knowledge_distillation", False):
        return lambda of: ""
    found = zip(data.manifest.sources, cast(FinetuneShards, data).scored(), strict=True)
    scored = {source.rows: count for source, (count, _) in found}

    def words(of: Set) -> str:
        count = sum(scored[span] for span in of.spans)
        return (
            ", distilled" if count == of.rows else f", {count:,} groups distilled" if count else ", no scores: contrast alone"
        )

    return words


def _ungrouped(order: Sampler) -> Sampler:
    return order.line if isinstance(order, LengthGroupedSampler) else order
