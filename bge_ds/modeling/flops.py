"""Floating-point operations of training, counted from shapes: the numerator of model FLOPs utilisation (MFU).

A product of a x b with b x c counts 2abc. The forward is one product; the backward two, or one where the weight is frozen.
Linear layers and attention count, once each: recomputed activations and padding are not useful work.
"""

from __future__ import annotations

from torch import nn

from bge_ds.kernels.packed import LengthRun


def linear_flops(module: nn.Module, rows: float) -> float:
    """Forward and backward of all linear layers inside `module` except poolers, each applied to `rows` vectors."""
    total = 0.0
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and "pooler" not in name.split("."):
            products = 3 if layer.weight.requires_grad else 2
            total += products * 2.0 * rows * layer.in_features * layer.out_features
    return total


def attention_flops(width: int, pairs: float) -> float:
    """Scores and weighted values (two products forward, four backward) of `pairs` (query, key) pairs; width: of all heads."""
    return 6 * 2.0 * width * pairs


def backbone_flops(backbone: nn.Module, runs: list[LengthRun]) -> float:
    """Forward and backward of a backbone over packed texts."""
    config = backbone.config
    total = linear_flops(backbone, sum(n * length for n, length in runs))
    for kind in getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers:
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        # A token sees `window` tokens to each side at most; texts no longer than that are seen whole.
        pairs = sum(n * length * min(length, 2 * window if window else length) for n, length in runs)
        total += attention_flops(config.hidden_size, pairs)
    return total
