"""Matrix products for losses over blocks of logits: 16-bit inputs with fp32 sums, and aligned buffers for logits."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from bge_ds.kernels.triton_support import is_gpu


class Narrow(NamedTuple):
    """A scaled tensor: values * factor (fp32, 0-dim)."""

    values: torch.Tensor
    factor: torch.Tensor


def to_narrow(x: torch.Tensor, dtype: torch.dtype | None) -> Narrow:
    """x in a 16-bit type, scaled by a power of two so that its largest magnitude is 1/2 to 1; None leaves it unchanged."""
    if dtype is None or dtype == x.dtype:
        return Narrow(x.contiguous(), torch.ones((), dtype=torch.float32, device=x.device))
    largest = x.detach().abs().amax().float() if x.numel() else torch.ones((), device=x.device)
    factor = largest.clamp_min(1e-30).log2().ceil().exp2()
    return Narrow((x / factor).to(dtype), factor)


_ALIGNED = 64  # elements: a multiple of 16 bytes in every type, and of 128 in 16 bits


def empty_aligned(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised rows x columns of the type of `like`, for logits or their gradient, with rows padded to _ALIGNED columns.

    Every row then begins at a multiple of 16 bytes, which a GPU thread loads at once and the compiler pipelines. Rows of BERT's
    30,522 columns in 16 bits would be loaded one element after the other.
    """
    return like.new_empty(rows, -(-columns // _ALIGNED) * _ALIGNED)[:, :columns]


@cache
def _sums_in_fp32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this torch has mm and addmm of 16-bit matrices with fp32 output."""
    try:
        total, one = torch.zeros(16, 16, device=device_type), torch.zeros(16, 16, device=device_type, dtype=dtype)
        torch.ops.aten.mm.dtype_out(one, one, torch.float32, out=total)
        torch.ops.aten.addmm.dtype_out(total, one, one, torch.float32, out=total)
    except (NotImplementedError, RuntimeError, AttributeError, TypeError):  # the last: torch 2.11 on meta
        return False
    return True


def multiply(left_MK: torch.Tensor, right_KN: torch.Tensor, *, out: torch.Tensor) -> None:
    """out = left right, in the type of `out`."""
    if out.dtype == left_MK.dtype:
        torch.mm(left_MK, right_KN, out=out)
    elif is_gpu(out.device.type) and _sums_in_fp32(out.device.type, left_MK.dtype):
        torch.ops.aten.mm.dtype_out(left_MK, right_KN, out.dtype, out=out)
    else:
        torch.mm(left_MK.to(out.dtype), right_KN.to(out.dtype), out=out)


def add_product(total_VD: torch.Tensor, left_MV: torch.Tensor, right_MD: torch.Tensor) -> None:
    """total += left^T right, in the total's type."""
    if total_VD.dtype == right_MD.dtype:
        total_VD.addmm_(left_MV.T, right_MD)
    elif is_gpu(total_VD.device.type) and _sums_in_fp32(total_VD.device.type, right_MD.dtype):
        torch.ops.aten.addmm.dtype_out(total_VD, left_MV.T, right_MD, torch.float32, out=total_VD)
    else:
        total_VD += left_MV.T @ right_MD
