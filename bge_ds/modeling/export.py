"""Writing the trained model as a transformers / sentence-transformers folder, and checking it against the live model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bge_ds.modeling.cross_encoder import CrossEncoder
from bge_ds.modeling.encoder import POOLING_FLAGS, Encoder, longest_text

# Without these a folder cannot be loaded. They are written last, so a killed run never leaves a folder that looks complete.
ENTRY_FILES = ("config.json", "modules.json")
# Largest difference of a vector's entries, relative to its norm. fp32: sums in another order (padded, other kernel); 16 bits:
# rounding in every layer.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def save_model(model: nn.Module, weights: dict[str, torch.Tensor], tokenizer, folder: Path) -> None:
    """Write a transformers folder: `weights` (fp32, by the model's own names), config, tokenizer.

    `model` gives the class and config only: its own tensors may be sharded or in 16 bits.
    """
    empty = sorted(name for name, weight in weights.items() if weight.numel() == 0)
    if empty:
        raise RuntimeError(f"refusing to save empty weights: {', '.join(empty[:5])} ({len(empty)} in all)")
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        skeleton = type(model)(config)
    expected = {name: p.shape for name, p in skeleton.named_parameters()}
    wrong = [name for name, shape in expected.items() if name not in weights or weights[name].shape != shape]
    if wrong or len(expected) != len(weights):
        raise RuntimeError(f"weights do not fit {type(model).__name__}: {', '.join(wrong[:5]) or sorted(weights)[:5]}")
    skeleton.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def write_sentence_transformers(folder: Path, config, pooling: str, normalize: bool, prompts: dict[str, str]) -> None:
    """Write the files that make sentence-transformers apply the trained pooling, normalisation and prompts.

    The prompt `passage` is saved as `document` too: sentence-transformers' name for it now, and the only one that mteb heeds.
    """
    if "passage" in prompts:
        prompts = prompts | {"document": prompts["passage"]}
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    paths = ["" if kind == "Transformer" else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    flags = {flag: name == pooling for name, flag in POOLING_FLAGS.items()}
    files = {
        "1_Pooling/config.json": {"word_embedding_dimension": config.hidden_size, **flags},
        "sentence_bert_config.json": {"max_seq_length": min(longest_text(config), 1 << 20), "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine" if normalize else "dot",
        },
        "modules.json": modules,
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if normalize:
        (folder / "2_Normalize").mkdir(exist_ok=True)


def mark_as_cross_encoder(folder: Path) -> None:
    """Write into the config that sentence-transformers' `CrossEncoder` gives the logits: its default is their sigmoid."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("sbert_ce_default_activation_function", None)  # the older name, of a model that this one comes from
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_saved_scores(
    folder: Path, ids: list[np.ndarray], second: np.ndarray | None, live_N: torch.Tensor, yes: int | None, dtype: torch.dtype
) -> float:
    """As `check_saved`, of a cross-encoder's scores; the difference is relative to the largest of them, or to 1."""
    saved = CrossEncoder.load(str(folder), yes=yes, attention="sdpa")
    for parameter in saved.parameters():
        parameter.data = parameter.data.to(dtype)
    difference = ((saved.score_ids(ids, second) - live_N).abs().max() / live_N.abs().max().clamp_min(1)).item()
    if not difference <= _TOLERANCE[dtype]:
        raise RuntimeError(
            f"the model saved in {folder} does not give the trained model's scores (difference {difference:.2e}); "
            "do not use it, and please report this"
        )
    return difference


def check_saved(
    folder: Path, ids: list[np.ndarray], live_ND: torch.Tensor, pooling: str, normalize: bool, dtype: torch.dtype
) -> float:
    """Load the folder with stock transformers, run it padded, and compare its vectors with the live model's.

    Returns the largest difference relative to a vector's norm. Raises RuntimeError where it exceeds rounding.
    """
    saved = Encoder.load(str(folder), pooling=pooling, normalize=normalize, attention="sdpa")
    for parameter in saved.parameters():  # not the buffers, which no engine casts either
        parameter.data = parameter.data.to(dtype)
    vectors = saved.encode_ids(ids)
    scale = live_ND.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    difference = ((vectors - live_ND).abs() / scale).max().item()
    if not difference <= _TOLERANCE[dtype]:
        raise RuntimeError(
            f"the model saved in {folder} does not give the trained model's vectors (difference {difference:.2e}); "
            "do not use it, and please report this"
        )
    return difference
