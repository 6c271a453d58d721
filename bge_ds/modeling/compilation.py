"""torch.compile for a backbone's layers, over packed rows padded to a few sizes.

Shapes: T tokens of N texts in one row.

A compiled graph is specialised to one T, and T differs at every step. In training the row is therefore padded to a multiple of
`token_bucket` tokens, by filler texts that nobody reads, and each multiple that occurs is compiled once. Sizes are static, not
symbolic: the graph of a step then depends on that step alone, so a resumed run computes what the undisturbed one would.

Layer classes are compiled, not layers: weights are inputs of the graphs, so all layers share them. Attention stays outside the
graphs (`encoder._attention`), because text boundaries differ at each step whatever T is. Gradient checkpointing stays around
the compiled layer, so that the recomputation draws the same dropout.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bge_ds.kernels.packed import LengthRun, PackedTexts

# Limit of graphs for one piece of code; torch's own is 8. There is one for each multiple of the bucket that occurs, with and
# without gradients (GradCache has both), and for each layer class. Beyond it, torch warns and runs further sizes eagerly.
_GRAPHS = 128


def pad_to_bucket(texts: PackedTexts, ids_T: torch.Tensor, bucket: int) -> tuple[PackedTexts, torch.Tensor]:
    """The texts and their ids, followed by filler texts up to a multiple of `bucket` tokens.

    Filler texts consist of token 0 and are no longer than the longest text of the row: no position is new, and no kernel's work
    is quadratic in the filler. `place_N` does not name them. All sizes are known on the host: nothing waits for the device.
    """
    tokens, longest, device = texts.tokens, texts.max_length, ids_T.device
    missing = -tokens % bucket
    if not missing:
        return texts, ids_T
    whole, rest = divmod(missing, longest)
    ends = torch.arange(tokens + longest, tokens + missing + longest, longest, dtype=torch.int32, device=device)
    ids_T = F.pad(ids_T, (0, missing))
    filled = PackedTexts(
        ids_T=ids_T,
        positions_T=torch.cat([texts.positions_T, torch.arange(missing, device=device) % longest]),
        cu_seqlens=torch.cat([texts.cu_seqlens, ends.clamp_max(tokens + missing)]),
        place_N=texts.place_N,
        runs=[*texts.runs, *(run for run in (LengthRun(whole, longest), LengthRun(1, rest)) if run.texts and run.length)],
    )
    return filled, ids_T


def compile_layers(backbone: nn.Module, *, token_bucket: int, backend: str = "inductor") -> None:
    """Compile the layers of a padding-free backbone, in place, for training; in evaluation they run eagerly.

    Names of modules and weights stay. `run_backbone` pads each training row to a multiple of token_bucket.
    """
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(backbone).__name__} has no layers that can be compiled one by one; leave --torch_compile out")
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, _GRAPHS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * _GRAPHS)
    for layer in layers:
        layer.__class__ = _compiled(type(layer), backend)
    backbone.token_bucket = token_bucket


@cache
def _compiled(kind: type[nn.Module], backend: str) -> type[nn.Module]:
    """The layer class with a compiled forward. A subclass, since transformers checkpoints the outermost call of a layer."""
    stock = kind.forward
    compiled = torch.compile(stock, backend=backend, dynamic=False)

    class Compiled(kind):
        def forward(self, *args, **kwargs):
            return (compiled if self.training else stock)(self, *args, **kwargs)

    Compiled.__name__, Compiled.__qualname__ = kind.__name__, kind.__qualname__
    return Compiled


def obstacle(device_type: str, backend: str = "inductor") -> str | None:
    """Why a backend cannot compile for devices of this type, in words; None where it can."""
    if backend != "inductor":
        return None
    if device_type != "cpu":
        return None if find_spec("triton") else "the triton package is not installed; install it"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler!r}; install one, or set CXX"
