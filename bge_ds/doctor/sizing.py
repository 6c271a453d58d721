"""How much memory and disk a run needs, found without its weights: the model is built of tensors that hold nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModel

from bge_ds.deepspeed_engine import ds_config as configs
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.doctor.judging import Needs
from bge_ds.kernels import packed
from bge_ds.modeling.encoder import Encoder, build_backbone, load_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Size:
    """elements: of all weights; trained: of those that train. activations: bytes kept for the backward pass, None: unknown."""

    elements: int
    trained: int
    activations: int | None


def gpus(use_cpu: bool) -> int:
    return 0 if use_cpu else torch.cuda.device_count()


def read_config(name: str, ranks: int, bf16: bool, fp16: bool) -> dict:
    """The DeepSpeed config, its precision filled from the flags. Raises ValueError as for --deepspeed."""
    auto = "zero0" if ranks == 1 else "zero1"
    config, _ = configs.read_config(auto if name == "auto" else name)
    for key, asked in (("bf16", bf16), ("fp16", fp16)):
        if config.get(key, {}).get("enabled") == "auto" or asked:
            config[key] = {"enabled": asked}
    return config


def measure(name: str, cache_dir: str, tokens: int, length: int, half: bool) -> Size:
    """The encoder's. tokens: computed at a time, in texts of `length`. half: in 16 bits.

    Raises OSError or ValueError where the model's config cannot be read.
    """
    config = load_config(name, cache_dir=cache_dir or None)
    with torch.device("meta"):
        encoder = Encoder(build_backbone(AutoModel, config), "mean")
    size = Size(engines.count_elements(encoder), engines.count_elements(encoder, trainable=True), None)
    if not tokens:
        return size
    length -= length % 2 == 0  # odd, as no head's number of features is: `_kept` tells scores by their shape
    texts, _ = packed.pack([np.ones(length, dtype=np.int64)] * -(-tokens // length))
    try:
        kept = _kept(encoder.to(torch.bfloat16) if half else encoder, texts.to("meta"))
    except (RuntimeError, NotImplementedError) as error:  # the model asks for a value, and there is none
        logger.info("%s: activations cannot be counted (%s)", name, error)
        return size
    return Size(size.elements, size.trained, kept)


def _kept(encoder: Encoder, texts: packed.PackedTexts) -> int:
    """Bytes that one forward pass keeps, without gradient checkpointing.

    Scores of tokens by tokens are left out: torch's plain attention, which is what runs on tensors that hold nothing, keeps
    them, and the kernels that training runs by do not. Held against real passes of BERT on a CPU, 13 % too much.
    """
    weights = {p.untyped_storage()._cdata for p in encoder.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage, scores = tensor.untyped_storage(), tensor.dim() > 2 and tensor.shape[-2:] == (texts.max_length,) * 2
        if storage._cdata not in weights and not scores:
            kept[storage._cdata] = storage  # held, so that no other gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(texts)
    return sum(storage.nbytes() for storage in kept.values())


def needs(size: Size, config: dict, ranks: int) -> Needs:
    zero = config.get("zero_optimization", {})
    parts = configs.memory_estimate(size.elements, size.trained, config, ranks)
    if size.activations is not None:
        parts["activations"] = size.activations
    places = {"optimizer": zero.get("offload_optimizer", {}), "weights": zero.get("offload_param", {})}
    places = {kind: place.get("device", "none") for kind, place in places.items()}
    return Needs(
        parts={kind: count for kind, count in parts.items() if places.get(kind) != "nvme"},
        offloaded=tuple(kind for kind, place in places.items() if place == "cpu"),
        # fp32 weights and Adam's two moments, of all ranks together, and the saved model.
        checkpoint=12 * size.trained + 4 * size.elements,
    )
