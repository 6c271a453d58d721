"""Whether Triton kernels can run on a device, and how they are launched.

On CUDA they run compiled. With TRITON_INTERPRET=1 they run on the CPU, in Python; the tests compare them with plain torch that
way. On the `meta` device, whose tensors have shapes but no values, a launch does nothing; the tests run whole steps along the
GPU's code path that way.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec

import torch


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_allowed = True


def allow(kernels: str) -> None:
    """Apply `--kernels` to this process: with "torch", nothing runs in Triton from now on."""
    global _allowed
    _allowed = kernels != "torch"


def triton_obstacle(device_type: str) -> str | None:
    """Why Triton kernels cannot run on devices of this type; None where they can."""
    if not _allowed:
        return "--kernels torch leaves them out"
    if find_spec("triton") is None:
        return "the triton package is not installed"
    if interpreted() or device_type == "meta":
        return None
    if device_type != "cuda":
        return f"the device is {device_type!r}"
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


def is_gpu(device_type: str) -> bool:
    """Whether to take the GPU's code path: on CUDA, and on `meta`, which stands in for it in tests."""
    return device_type in ("cuda", "meta")


def use_triton(x: torch.Tensor) -> bool:
    """Whether an operation on this tensor takes its Triton kernel: on a GPU, in fp32 or 16 bits."""
    return is_gpu(x.device.type) and triton_obstacle(x.device.type) is None and x.dtype != torch.float64


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """x in fp32; fp64 stays fp64."""
    return x if x.dtype == torch.float64 else x.float()


def launch(kernel, grid: tuple[int, ...], *args, on: torch.Tensor, **constants) -> None:
    """`kernel[grid](*args, **constants)` on the device of `on`; nothing for an empty grid or on meta."""
    if 0 in grid or on.device.type == "meta":
        return
    with torch.cuda.device_of(on) if on.is_cuda else nullcontext():
        kernel[grid](*args, **constants)
