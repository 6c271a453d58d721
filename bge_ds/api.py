"""bge_ds from Python: train on Python objects, encode, mine, score, evaluate, merge. The commands do it with files.

In a notebook one process trains, on one GPU or the CPU. A script that calls these functions runs on several ranks when it is
started by `deepspeed --num_gpus N script.py`; every rank calls them alike.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bge_ds.config.arguments import FinetuneArguments, PretrainArguments, RerankArguments, TrainArguments

if TYPE_CHECKING:
    from bge_ds.encoding.vectors import Vectors
    from bge_ds.evaluation.embedder import Embedder

Rows = Iterable[Mapping[str, Any]]
TrainData = str | Path | list[str] | Rows


def finetune(train_data: TrainData, *, model_name_or_path: str, output_dir: str | Path, **flags: Any) -> Path:
    """Contrastive fine-tuning; the folder of the trained model.

    train_data: rows with `query`, `pos` and `neg` (a `datasets.Dataset`, a list of dictionaries or any iterable of them), or
    what `--train_data` takes: paths of JSON lines, Parquet or shards. flags: those of `bge_ds.finetune`, by name.
    Raises ValueError for settings or rows that cannot serve, with what is wrong and where.
    """
    from bge_ds import finetune as command

    return _train(command.train, FinetuneArguments, train_data, output_dir, model_name_or_path=model_name_or_path, **flags)


def train_reranker(train_data: TrainData, *, model_name_or_path: str, output_dir: str | Path, **flags: Any) -> Path:
    """A cross-encoder trained on groups; its folder. Arguments as for `finetune`, flags those of `bge_ds.rerank`."""
    from bge_ds import rerank as command

    return _train(command.train, RerankArguments, train_data, output_dir, model_name_or_path=model_name_or_path, **flags)


def pretrain(train_data: TrainData, *, output_dir: str | Path, **flags: Any) -> Path:
    """RetroMAE pre-training; the folder of the encoder. train_data: rows with `text`, or paths; otherwise as `finetune`."""
    from bge_ds import pretrain as command

    return _train(command.train, PretrainArguments, train_data, output_dir, **flags) / "encoder_model"


def load(model_name_or_path: str | Path, **how: Any) -> Embedder:
    """A trained model that turns texts into vectors (`evaluation.embedder.Embedder`, whose `load` explains `how`).

    `load(folder)(["what is a shard"], "query")` gives fp32 vectors, texts by features; the other side is "passage".
    """
    from bge_ds.evaluation.embedder import Embedder

    return Embedder.load(model_name_or_path, **how)


def encode(texts: TrainData, *, model_name_or_path: str | Path, output: str | Path, **flags: Any) -> Vectors:
    """Encodes texts into a folder, and opens it: any number of vectors, mapped from the disk.

    texts: rows with `text`, and `title` and `_id` where there are such, or what `--input` takes. flags: those of
    `bge_ds.encode`, with the prompts as `query_prompt` and `passage_prompt`. In a script with several ranks, the last one to
    finish can open the folder: open it after all have ended. Raises ValueError for what cannot serve, with what is wrong.
    """
    from bge_ds.encoding import run
    from bge_ds.encoding.vectors import open_vectors

    inputs = _as_paths(texts, flags.get("cache_dir"), "texts")
    run.encode(run.Options(str(model_name_or_path), inputs, Path(output), **flags))
    return open_vectors(output)


def mine(groups: TrainData, *, model_name_or_path: str | Path, output: str | Path, **flags: Any) -> Path:
    """Hard negatives for groups; the file `output` with their lines and `neg` replaced, or of shards, the folder.

    groups: rows with `query` and `pos`, or what `--input` takes. flags: those of `bge_ds.mine`, with the prompts as
    `query_prompt` and `passage_prompt`, and `range_for_sampling=(10, 210)`. Raises ValueError for what cannot serve.
    """
    from bge_ds.mining import run
    from bge_ds.mining.selection import Rules

    inputs = _as_paths(groups, flags.get("cache_dir"), "groups")
    rules = Rules(**{field.name: flags.pop(field.name) for field in fields(Rules) if field.name in flags})
    run.mine(run.Options(str(model_name_or_path), inputs, Path(output), rules=rules, **flags))
    return Path(output)


def score(groups: TrainData, *, model_name_or_path: str | Path, output: str | Path, **flags: Any) -> dict[str, int] | None:
    """Scores groups by a teacher into a file of JSON lines; counts of what was scored and dropped.

    groups: rows with `query`, `pos` and `neg`, or what `--input` takes. flags: options of `scoring.run.Options`, which are the
    flags of `bge_ds.score`. In a script with several ranks, None for a rank that is not the last to finish. Raises ValueError
    for what cannot serve, with what is wrong.
    """
    from bge_ds.scoring import run

    inputs = _as_paths(groups, flags.get("cache_dir"), "groups")
    made = run.score(run.Options(str(model_name_or_path), inputs, Path(output), **flags))
    return None if made is None else dict(made.counts)


def evaluate(model: Embedder | str | Path, data: str | Path | list[str | Path]) -> dict[str, dict[str, float]]:
    """The measures (nDCG@10, MRR@10, Recall@100 ...) of a model on folders in BEIR's form, by the path that was given.

    model: of `load`, or a name or folder. Raises ValueError for folders that cannot serve, with file and line.
    """
    from bge_ds.data.beir import read_folder
    from bge_ds.evaluation.retrieval import evaluate_set

    folders = [data] if isinstance(data, str | Path) else data
    sets = {str(folder): read_folder(Path(folder)) for folder in folders}
    embedder: Callable[..., Any] = load(model) if isinstance(model, str | Path) else model
    return {name: evaluate_set(found, embedder) for name, found in sets.items()}


def merge(models: Iterable[str | Path], *, output: str | Path, **flags: Any) -> Path:
    """Averages models into a folder, and gives its path. models: folders or hub names, two or more. flags: those of
    `bge_ds.merge`: `weights=[0.6, 0.4]`, or `examples` with rows of groups or their file, or neither.

    Raises ValueError for models or flags that cannot serve, with what is wrong.
    """
    from bge_ds import merge as command

    if (examples := flags.pop("examples", None)) is not None:
        (flags["examples"],) = map(Path, _as_paths(examples, flags.get("cache_dir"), "examples"))
    command.run(command.Options([str(model) for model in models], Path(output), **flags))
    return Path(output)


def _train(
    train: Callable[[Any], None], kind: type[TrainArguments], train_data: TrainData,
    output_dir: str | Path, **flags: Any,
) -> Path:  # fmt: skip
    from bge_ds.distributed import collectives

    train(kind.build(train_data=_as_paths(train_data, flags.get("cache_dir")), output_dir=str(output_dir), **flags))
    # Not now: DeepSpeed keeps groups for the next run in this process.
    atexit.unregister(collectives.leave)
    atexit.register(collectives.leave)
    return Path(output_dir)


def _as_paths(train_data: TrainData, cache_dir: str | None, name: str = "train_data") -> list[str]:
    """Paths as they are; rows are written as JSON lines into the cache, under a name that their content decides."""
    if isinstance(train_data, str | Path):
        return [str(train_data)]
    if isinstance(train_data, list) and train_data and all(isinstance(entry, str | Path) for entry in train_data):
        return [str(entry) for entry in train_data]
    from bge_ds.data.preprocess.prepare import cache_folder, keep_rows

    return [str(keep_rows(cast(Rows, train_data), cache_folder(cache_dir), name))]
