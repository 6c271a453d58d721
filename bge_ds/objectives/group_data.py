"""What contrastive fine-tuning takes of its shards beside the groups: prompts, marked sets; and which shards cannot serve."""

from __future__ import annotations

from pathlib import Path

from bge_ds.config.arguments import FinetuneArguments
from bge_ds.data.shards import shard_reader
from bge_ds.distributed import collectives
from bge_ds.training.data_order import smallest_batch


def prompts_of(args: FinetuneArguments, data: shard_reader.FinetuneShards) -> dict[str, str]:
    """The instructions of training under the names that they are saved by.

    Where the folders of shards have different ones, each is saved as `query_SET` or `passage_SET`, SET being the name of its
    first input file, and `query` or `passage` is empty.
    """
    prompts = {}
    for kind in ("query", "passage"):
        name = f"{kind}_instruction_for_retrieval"
        prompts[kind] = getattr(args, name) or ""
        if getattr(data.manifest, name) is None:
            sets = [Path(manifest.sources[0].path).name.split(".")[0] for manifest in data.manifests]
            names = [of if sets.count(of) == 1 else f"{of}_{k}" for k, of in enumerate(sets, start=1)]
            prompts |= {f"{kind}_{of}": getattr(manifest, name) for of, manifest in zip(names, data.manifests, strict=True)}
    return prompts


def check_comparable(args: FinetuneArguments, data: shard_reader.FinetuneShards) -> None:
    """Refuse runs in which a query would have nothing to be compared against (its loss would be 0)."""
    bare = data.manifest.counts["groups_without_negatives"]
    if bare and not args.use_inbatch_neg:
        raise ValueError(
            f"{' '.join(args.train_data)}: {bare} groups have no negatives, so with --use_inbatch_neg False there is nothing "
            "to compare their queries against; add negatives, drop those groups, or use in-batch negatives"
        )
    ranks = collectives.world_size()
    step = smallest_batch(args, data) or args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    others = step // args.gradient_accumulation_steps // (1 if args.negatives_cross_device else ranks)
    if args.use_inbatch_neg and others == 1 and (args.train_group_size == 1 or bare):
        raise ValueError(
            f"{' '.join(args.train_data)}: one query a batch and groups without negatives leave nothing to compare against; "
            "raise --per_device_train_batch_size, or use several ranks with --negatives_cross_device"
        )


def own_only_spans(data: shard_reader.FinetuneShards) -> tuple[tuple[int, int], ...]:
    """Rows of the input files whose name without its endings, or whose folder's, has FlagEmbedding's mark at its end."""
    marked = [s for s in data.manifest.sources if _is_marked(Path(s.path))]
    return tuple((first, last) for first, last in (source.rows for source in marked))


def _is_marked(file: Path) -> bool:
    return any(name.endswith("no_in_batch_neg") for name in (file.name.split(".")[0], file.parent.name))


def check_teacher(args: FinetuneArguments, data: shard_reader.FinetuneShards) -> None:
    """Refuse distillation where no input file has scores, or one has them for some of its groups alone.

    A file without scores trains by contrast alone.
    """
    what = f"{' '.join(args.train_data)}: --knowledge_distillation needs pos_scores and neg_scores"
    remedy = "score the data with `python -m bge_ds.score`"
    found = data.scored()
    if not any(scored for scored, _ in found):
        raise ValueError(f"{what}, and no group has them; {remedy}, or drop --knowledge_distillation")
    for source, (scored, lacking) in zip(data.manifest.sources, found, strict=True):
        if scored and lacking is not None:
            raise ValueError(
                f"{what} in every group of a file that has them in some, and group {lacking - source.rows[0]} (from 0) of "
                f"{source.path} has none; {remedy}, or leave the group out"
            )
