"""The files of models that are to be averaged, and what sets them apart.

Of the weights only the headers are read here: names, shapes and types. Names are brought into the form that `AutoModel` has. A
checkpoint with a head (`BertForMaskedLM`) can so be averaged with one without, and the head is left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel, PretrainedConfig

from bge_ds.data.preprocess import validate
from bge_ds.data.preprocess.tokenize import TokenizerCore
from bge_ds.evaluation.embedder import PROMPTS, read_prompts, settings_folder
from bge_ds.modeling.encoder import load_config, read_pooling

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # of a hub model
# Entries of a config that do not change a vector. All whose name holds "dropout" belong to them.
_BOOKKEEPING = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "gradient_checkpointing", "id2label", "initializer_range",
    "label2id", "problem_type", "transformers_version", "use_cache", "return_dict",
)  # fmt: skip
_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}  # of norms, in the first checkpoints of BERT
_PARTS = {"model": "vocabulary", "normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer",
          "post_processor": "special tokens around a text", "added_tokens": "added tokens"}  # fmt: skip
_SHOWN = 20  # differences named in one message


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. name: in the file."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        with safe_open(str(self.file), "pt") as file:
            return file.get_tensor(self.name)


@dataclass(frozen=True)
class ModelFiles:
    """One model. tensors: by AutoModel's names. left_out: names of those that AutoModel has no place for."""

    name: str
    folder: Path
    config: PretrainedConfig
    tokenizer: TokenizerCore
    tensors: dict[str, StoredTensor]
    left_out: list[str]

    @property
    def weight_files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})


def open_model(name: str, cache_dir: str | None = None) -> ModelFiles:
    """From a folder or hub name. Raises ValueError for what is missing or cannot be read, with the file."""
    folder = settings_folder(name, cache_dir, _WANTED, "--models")
    if not (folder / "config.json").is_file():
        raise ValueError(f"--models {name}: {folder} has no config.json; give the folder of a model")
    try:
        config = load_config(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: {str(error).splitlines()[0]}") from None
    own = skeleton(config)
    tensors, left_out = _by_own_names(_stored(folder), own)
    return ModelFiles(name, folder, config, validate.core(validate.load_tokenizer(folder)), tensors, left_out)


def skeleton(config: PretrainedConfig) -> nn.Module:
    """AutoModel of a config, without memory for its tensors."""
    with torch.device("meta"):
        return AutoModel.from_config(config)


def _stored(folder: Path) -> list[StoredTensor]:
    """All tensors of a folder's safetensors, whole or in shards, in the order of their names."""
    index = folder / INDEX
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: not an index of safetensors ({error})") from None
    else:
        files = [WEIGHTS]
    found = []
    for file in (folder / name for name in files):
        if not file.is_file():
            raise ValueError(
                f"{file} is missing; models are read from safetensors: load another format with transformers and save it by "
                "save_pretrained"
            )
        try:
            with safe_open(str(file), "pt") as stored:
                names = list(stored.keys())
                found += [StoredTensor(file, name, tuple(stored.get_slice(name).get_shape())) for name in names]
        except SafetensorError as error:
            raise ValueError(f"{file}: cannot be read as safetensors ({error})") from None
    return sorted(found, key=lambda tensor: tensor.name)


def _by_own_names(stored: list[StoredTensor], own: nn.Module) -> tuple[dict[str, StoredTensor], list[str]]:
    """(the tensors by `own`'s names, the names in the files of all others that are not computed anew on loading)."""
    wanted, computed = own.state_dict().keys(), dict(own.named_buffers()).keys()
    tensors, left_out = {}, []
    for tensor in stored:
        name = tensor.name.removeprefix(f"{own.base_model_prefix}.")
        for old, new in _OLD_ENDINGS.items():
            if name.endswith(old) and name not in wanted:
                name = name.removesuffix(old) + new
        if name in wanted:
            tensors[name] = tensor
        elif name not in computed:
            left_out.append(tensor.name)
    return tensors, left_out


# ------------------------------------------------------------------------------------------------------ differences


def check_alike(models: list[ModelFiles]) -> list[str]:
    """Raises ValueError where models differ from the first in more than the values of their weights, naming each difference.

    Returns notes on what differs and does no harm. A pooler that some lack is no difference: no embedding uses it.
    """
    first = models[0]
    own = skeleton(first.config)
    differences = [f"{first.name} has no tensor {name}" for name in _needed(own) if name not in first.tensors]
    notes = []
    for model in models[1:]:
        differences += [*_of_configs(first, model), *_of_tensors(first, model, own), *_of_tokenizers(first, model)]
        differences += _of_poolings(first, model)
        notes += _notes(first, model)
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ValueError(f"these models cannot be averaged: {'; '.join(differences[:_SHOWN])}{more}")
    return notes


def _needed(own: nn.Module) -> list[str]:
    return [name for name in own.state_dict() if not name.startswith("pooler.")]


def _of_configs(first: ModelFiles, model: ModelFiles) -> list[str]:
    left, right = first.config.to_dict(), model.config.to_dict()
    keys = [key for key in sorted(left.keys() | right.keys()) if key not in _BOOKKEEPING and "dropout" not in key]
    return [
        f"config.json: {key} is {left.get(key)!r} in {first.name} and {right.get(key)!r} in {model.name}"
        for key in keys
        if left.get(key) != right.get(key)
    ]


def _of_tensors(first: ModelFiles, model: ModelFiles, own: nn.Module) -> list[str]:
    needed, found = _needed(own), []
    for name in own.state_dict():
        left, right = first.tensors.get(name), model.tensors.get(name)
        if right is None and name in needed:
            found.append(f"{model.name} has no tensor {name}")
        elif left is not None and right is not None and left.shape != right.shape:
            found.append(f"{name} is {_shape(left)} in {left.file} and {_shape(right)} in {right.file}")
    return found


def _shape(tensor: StoredTensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a single number"


def _of_tokenizers(first: ModelFiles, model: ModelFiles) -> list[str]:
    if first.tokenizer.fingerprint == model.tokenizer.fingerprint:
        return []
    left, right = orjson.loads(first.tokenizer.json), orjson.loads(model.tokenizer.json)
    parts = [words for part, words in _PARTS.items() if left.get(part) != right.get(part)]
    return [f"the tokenizers of {first.name} and {model.name} differ ({', '.join(parts)})"]


def _of_poolings(first: ModelFiles, model: ModelFiles) -> list[str]:
    left, right = read_pooling(first.folder), read_pooling(model.folder)
    if right is None or left == right:
        return []
    if left is None:
        return [
            f"{first.name} has no modules.json, whose pooling the result would take, and {model.name} has one: name "
            f"{model.name} first"
        ]
    return [f"modules.json: {_pooling(left)} in {first.name}, {_pooling(right)} in {model.name}"]


def _pooling(found: tuple[str, bool]) -> str:
    return f"pooling {found[0]} {'with' if found[1] else 'without'} normalisation"


def _notes(first: ModelFiles, model: ModelFiles) -> list[str]:
    left, right = read_prompts(first.folder / PROMPTS), read_prompts(model.folder / PROMPTS)
    if {k: v for k, v in left.items() if v} == {k: v for k, v in right.items() if v}:
        return []
    return [f"the prompts are those of {first.name}; {model.name} has {right or 'none'}"]
