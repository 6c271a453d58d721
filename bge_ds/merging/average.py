"""The weighted average of models (LM-Cocktail, arXiv:2311.13534), tensor by tensor.

Sums are in fp32. One tensor is read at a time, and files of at most SHARD_BYTES are written one after the other: memory holds
one such file and one tensor, however many models and however large they are.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from bge_ds.evaluation import retrieval
from bge_ds.merging.model_files import INDEX, WEIGHTS, ModelFiles, skeleton
from bge_ds.modeling.encoder import Encoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 2 << 30
# What is taken over from the first model, beside config.json and the folders that modules.json names.
_TAKEN = (
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
)  # fmt: skip


def average(models: list[ModelFiles], weights: list[float], name: str) -> torch.Tensor:
    """One tensor of the result: fp32, or as it is where it is of whole numbers, which all models must then share.

    Raises ValueError where the models' numbers are not finite, or whole numbers differ.
    """
    total: torch.Tensor | None = None
    for model, weight in zip(models, weights, strict=True):
        tensor = model.tensors[name].read()
        if not tensor.is_floating_point():
            if total is not None and not torch.equal(total, tensor):
                raise ValueError(f"{name}: whole numbers that differ in {models[0].name} and {model.name} have no average")
            total = tensor
            continue
        if not tensor.isfinite().all():
            raise ValueError(f"{model.tensors[name].file}: {name} holds NaN or infinite numbers; leave this model out")
        total = torch.zeros_like(tensor, dtype=torch.float32) if total is None else total
        total.add_(tensor.float(), alpha=weight)
    assert total is not None
    return total


def write_model(models: list[ModelFiles], weights: list[float], folder: Path, dtype: str) -> None:
    """The average into an existing empty folder, with config, tokenizer and sentence-transformers' files of the first model.

    dtype: of the file, one of DTYPES. Raises ValueError as `average` does, and for numbers that do not fit into fp16.
    """
    planned = list(_shards(models, DTYPES[dtype].itemsize))
    for part, (_, names) in enumerate(planned):
        tensors = {name: _converted(average(models, weights, name), name, dtype) for name in names}
        save_file(tensors, folder / _file_name(part, len(planned)), metadata={"format": "pt"})
    if len(planned) > 1:
        where = {name: _file_name(part, len(planned)) for part, (_, names) in enumerate(planned) for name in names}
        index = {"metadata": {"total_size": sum(size for size, _ in planned)}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _take_over(models[0], folder, dtype)


def _shards(models: list[ModelFiles], bytes_each: int) -> Iterator[tuple[int, list[str]]]:
    """(bytes, names of tensors) of each file to write."""
    names = [name for name in skeleton(models[0].config).state_dict() if all(name in model.tensors for model in models)]
    size, held = 0, []
    for name in names:
        more = bytes_each * math.prod(models[0].tensors[name].shape)
        if held and size + more > SHARD_BYTES:
            yield size, held
            size, held = 0, []
        size, held = size + more, [*held, name]
    yield size, held


def _file_name(part: int, parts: int) -> str:
    return WEIGHTS if parts == 1 else f"model-{part + 1:05d}-of-{parts:05d}.safetensors"


def _converted(tensor: torch.Tensor, name: str, dtype: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(DTYPES[dtype])
    if not converted.isfinite().all():
        raise ValueError(f"--dtype {dtype}: {name} holds numbers beyond {torch.finfo(DTYPES[dtype]).max:g}; take bf16 or fp32")
    return converted


def _take_over(first: ModelFiles, folder: Path, dtype: str) -> None:
    """The first model's files around the weights, its config with the type and class of what was written."""
    for pattern in _TAKEN:
        for path in sorted(first.folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    modules = first.folder / "modules.json"
    for entry in json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []:
        if entry["path"]:
            (folder / entry["path"]).mkdir(parents=True, exist_ok=True)
            for path in sorted((first.folder / entry["path"]).glob("*.json")):
                shutil.copyfile(path, folder / entry["path"] / path.name)
    config = json.loads((first.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the name that transformers 4 has for it
    config |= {"architectures": [type(skeleton(first.config)).__name__], "dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_loads(folder: Path, tokenizer) -> None:
    """Raises RuntimeError where transformers cannot load what was written, or its vectors are not finite."""
    vectors_ND = Encoder.load(str(folder), "mean").encode_ids(retrieval.tokenize(tokenizer, ["what is mixed here"], 16))
    if not vectors_ND.isfinite().all():
        raise RuntimeError(f"the model written to {folder} gives vectors that are not finite; please report this")
