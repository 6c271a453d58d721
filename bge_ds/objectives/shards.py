"""The shards of a run: the folders that are given, or made from its input files."""

from __future__ import annotations

from bge_ds.config.arguments import TrainArguments
from bge_ds.data.preprocess import prepare
from bge_ds.data.shards import shard_reader
from bge_ds.training.command import is_first_on_host, silent
from bge_ds.training.data_order import split_weights


def open_shards(
    kind: str, args: TrainArguments, tokenizer, explicit: frozenset[str] | None = None, cache_dir: str | None = None, **settings
):
    """A reader of --train_data, preprocessed into the cache where it is not shards. settings: lengths, instructions, words.

    explicit: the settings that folders of shards must have; None: those that the user gave. cache_dir: None: --cache_dir.
    On every rank: one process of a host preprocesses, the others wait. Raises ValueError for data that cannot serve.
    """
    paths, weights = split_weights(args.train_data)
    folders = prepare.prepare_all(
        kind, paths, tokenizer, bool(weights or args.mixing_temperature), cache_dir=cache_dir or args.cache_dir,
        explicit=args.explicit if explicit is None else explicit, on_error=args.on_error, verify_data=args.verify_data,
        say=print if is_first_on_host() else silent, **settings,
    )  # fmt: skip
    return shard_reader.open_folders(folders)
