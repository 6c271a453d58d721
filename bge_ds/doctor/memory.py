"""The memory and disk that a run needs, computed without its weights: the model is built on the meta device."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import AutoModel

from bge_ds.deepspeed_engine import ds_config as configs
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.doctor.checks import Requirements
from bge_ds.kernels import packed
from bge_ds.modeling.encoder import Encoder, build_backbone, load_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSize:
    """elements: of all weights; trained: of the trainable ones. activations: bytes kept for backward, None: unknown."""

    elements: int
    trained: int
    activations: int | None


def read_config(name: str, ranks: int, bf16: bool, fp16: bool) -> dict:
    """The DeepSpeed config, its precision set by the flags. Raises ValueError as for --deepspeed."""
    auto = "zero0" if ranks == 1 else "zero1"
    config, _ = configs.read_config(auto if name == "auto" else name)
    for key, asked in (("bf16", bf16), ("fp16", fp16)):
        if config.get(key, {}).get("enabled") == "auto" or asked:
            config[key] = {"enabled": asked}
    return config


def measure(name: str, cache_dir: str, tokens: int, length: int, half: bool) -> ModelSize:
    """The size of an encoder. tokens: computed at a time, in texts of `length`; 0: unknown. half: in 16 bits.

    Raises OSError or ValueError where the model's config cannot be read.
    """
    config = load_config(name, cache_dir=cache_dir or None)
    with torch.device("meta"):
        encoder = Encoder(build_backbone(AutoModel, config), "mean")
    size = ModelSize(engines.count_elements(encoder), engines.count_elements(encoder, trainable=True), None)
    if not tokens:
        return size
    length -= length % 2 == 0  # odd, unlike a head's number of features: `_activation_bytes` knows scores by their shape
    texts, _ = packed.pack([np.ones(length, dtype=np.int64)] * -(-tokens // length))
    try:
        kept = _activation_bytes(encoder.to(torch.bfloat16) if half else encoder, texts.to("meta"))
    except (RuntimeError, NotImplementedError) as error:  # the model reads a value, which meta tensors do not have
        logger.info("%s: activations cannot be counted (%s)", name, error)
        return size
    return replace(size, activations=kept)


def _activation_bytes(encoder: Encoder, texts: packed.PackedTexts) -> int:
    """Bytes that one forward pass keeps for the backward pass, without gradient checkpointing.

    Attention scores (tokens by tokens) are left out: torch's plain attention, which runs on the meta device, keeps them, and
    the kernels of training do not. Compared with real passes of BERT on a CPU, the result is 13 % too high.
    """
    weights = {p.untyped_storage()._cdata for p in encoder.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage, scores = tensor.untyped_storage(), tensor.dim() > 2 and tensor.shape[-2:] == (texts.max_length,) * 2
        if storage._cdata not in weights and not scores:
            kept[storage._cdata] = storage  # a reference, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(texts)
    return sum(storage.nbytes() for storage in kept.values())


def requirements(size: ModelSize, config: dict, ranks: int) -> Requirements:
    """Bytes a rank needs under this DeepSpeed config; what is offloaded to NVMe is left out."""
    zero = config.get("zero_optimization", {})
    parts = configs.memory_estimate(size.elements, size.trained, config, ranks)
    if size.activations is not None:
        parts["activations"] = size.activations
    sections = {"optimizer": "offload_optimizer", "weights": "offload_param"}
    places = {kind: zero.get(section, {}).get("device", "none") for kind, section in sections.items()}
    return Requirements(
        parts={kind: count for kind, count in parts.items() if places.get(kind) != "nvme"},
        offloaded=tuple(kind for kind, place in places.items() if place == "cpu"),
        # fp32 weights and Adam's two moments of all ranks, and the saved model.
        checkpoint=12 * size.trained + 4 * size.elements,
    )
