"""The shards of a run: the folders that are given, or made from its input files."""

from __future__ import annotations

from bge_ds.config.arguments import TrainArguments
from bge_ds.data.preprocess import prepare
from bge_ds.data.shards import shard_reader
from bge_ds.training.command import is_first_on_host, silent
from bge_ds.training.data_order import split_weights


def open_shards(kind: str, args: TrainArguments, tokenizer, **settings):
    """A reader of --train_data, preprocessed into the cache where it is not shards. settings: lengths, instructions, words.

    On every rank: one process of a host preprocesses, the others wait. Raises ValueError for data that cannot serve.
    """
    paths, weights = split_weights(args.train_data)
    folders = prepare.prepare_all(
        kind, paths, tokenizer, bool(weights or args.mixing_temperature), explicit=args.explicit, cache_dir=args.cache_dir,
        on_error=args.on_error, verify_data=args.verify_data, say=print if is_first_on_host() else silent, **settings,
    )  # fmt: skip
    return shard_reader.open_folders(folders)
