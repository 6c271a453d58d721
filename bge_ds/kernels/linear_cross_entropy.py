"""Cross entropy of X W^T against one known target a row, without the whole matrix of logits.

Shapes: M rows (positions), V columns (vocabulary), D features.

Logits are computed for one block of rows at a time. In the forward, each block's softmax is turned into gradients of X and W at
once; the backward only scales them. Three matrix products in all; memory is that of X, W, their gradients and one block. (For a
loss whose gradient is known only afterwards, see `linear_logsumexp`.)

On a GPU blocks are larger (each reads and writes the gradient of W once), softmax and its gradient are in-place Triton kernels
(`cross_entropy_triton`), and the products stay cuBLAS's, as in Liger Kernel. Cut Cross-Entropy (arXiv:2411.09009) never writes
logits but recomputes them in the backward: four to five products instead of three, in Triton, at two thirds of cuBLAS's rate.
Passing over 16-bit logits costs less: for 768 features and 30,522 words about 0.06 us a row on a GPU with 3 TB/s, where the
three products need 0.18 us.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bge_ds.kernels.matmul import add_product, empty_aligned
from bge_ds.kernels.triton_support import use_triton

# Logits held at a time: 64 MiB of fp32, 550 rows of BERT's vocabulary. With half of it, a step on a CPU took 8 % longer.
_BLOCK_ELEMENTS = 1 << 24
# Fewest rows of a block, whatever the vocabulary: each block passes over the whole gradient of W.
_BLOCK_ROWS = 256
# On a GPU, which needs large products: bytes of logits held at a time, and fewest and most rows of a block. A block reads and
# writes the fp32 gradient of W once (8 bytes an element) and computes 6 operations a row and element: with 2,048 rows the
# traffic takes 15 % of the products' time at 3 TB/s and 800 TFLOP/s, with 4,096 half of that.
_GPU_BYTES, _GPU_ROWS = 512 << 20, (2048, 4096)


def _blocks(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _gpu_step(columns: int, itemsize: int) -> int:
    """Rows of a block on a GPU."""
    return min(max(_GPU_BYTES // (columns * itemsize), _GPU_ROWS[0]), _GPU_ROWS[1])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, w_VD, bias_V, target_M, fused: bool):
        compute = _LinearCrossEntropy._fused if fused else _LinearCrossEntropy._plain
        x_MD, wants = x_MD.contiguous() if fused else x_MD, ctx.needs_input_grad
        dx = torch.empty_like(x_MD) if wants[0] else None
        dw = torch.zeros(w_VD.shape, dtype=torch.float32, device=w_VD.device) if wants[1] else None
        db = torch.zeros(bias_V.shape, dtype=torch.float32, device=w_VD.device) if wants[2] else None
        loss, correct = compute(x_MD, w_VD, bias_V, target_M, dx, dw, db)
        ctx.save_for_backward(dx, dw, db)
        ctx.dtypes = w_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def _fused(x_MD, w_VD, bias_V, target_M, dx, dw, db):
        from bge_ds.kernels.cross_entropy_triton import statistics, to_gradient

        blocks = _blocks(x_MD.shape[0], _gpu_step(w_VD.shape[0], x_MD.dtype.itemsize))
        held = empty_aligned(max((b.stop - b.start for b in blocks), default=0), w_VD.shape[0], x_MD)
        bias = None if bias_V is None else F.pad(bias_V, (0, held.stride(0) - len(bias_V)))
        losses, right = [], []
        for block in blocks:
            x, target = x_MD[block], target_M[block]
            logits = torch.mm(x, w_VD.T, out=held[: len(x)])
            lse_M, loss_M, right_M = statistics(logits, bias, target)
            losses.append(loss_M.sum())
            right.append(right_M.sum())
            if dx is None and dw is None and db is None:
                continue
            added = to_gradient(logits, bias, target, lse_M, sums=db is not None)
            if db is not None:
                db += added
            if dx is not None:
                torch.mm(logits, w_VD, out=dx[block])
            if dw is not None:
                add_product(dw, logits, x)
        nothing = torch.zeros((), dtype=torch.float32, device=x_MD.device)
        loss = torch.stack(losses).sum() if losses else nothing
        return loss, torch.stack(right).sum() if right else nothing.long()

    @staticmethod
    def _plain(x_MD, w_VD, bias_V, target_M, dx, dw, db):
        loss = torch.zeros((), dtype=torch.float32, device=x_MD.device)
        correct = torch.zeros((), dtype=torch.int64, device=x_MD.device)
        blocks = _blocks(x_MD.shape[0], max(_BLOCK_ROWS, _BLOCK_ELEMENTS // w_VD.shape[0]))
        # One buffer for all blocks: fresh memory for each costs a CPU a tenth of the whole time.
        products = x_MD.new_empty(max((b.stop - b.start for b in blocks), default=0), w_VD.shape[0])
        for block in blocks:
            x, target = x_MD[block], target_M[block, None]
            logits = torch.mm(x, w_VD.T, out=products[: len(x)]).float()
            if bias_V is not None:
                logits += bias_V  # after the cast: 16-bit sums would round twice
            target_logit = logits.gather(-1, target)
            correct += (target_logit >= logits.amax(-1, keepdim=True)).sum()
            # Row by row in the caches, and in place: on a CPU, passes over memory cost as much as the products.
            logits = torch.log_softmax(logits, -1, out=logits)
            loss -= logits.gather(-1, target).sum()
            if dx is None and dw is None and db is None:
                continue
            error = logits.exp_()
            error.scatter_add_(-1, target, error.new_full((len(target), 1), -1.0))
            if db is not None:
                db += error.sum(0)
            error = error.to(x.dtype)
            if dx is not None:
                torch.mm(error, w_VD, out=dx[block])
            if dw is not None and dw.dtype == x.dtype:
                dw.addmm_(error.T, x)
            elif dw is not None:
                dw += error.T @ x
        return loss, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, _):
        dx, dw, db = ctx.saved_tensors
        w_dtype, bias_dtype = ctx.dtypes
        dx = None if dx is None else dx * scale  # scale is 0-dim fp32: multiplied in fp32, result in dx's type
        # In place: a second backward is caught by autograd's version check instead of being scaled twice.
        dw = None if dw is None else dw.mul_(scale).to(w_dtype)
        db = None if db is None else db.mul_(scale).to(bias_dtype)
        return dx, dw, db, None, None


def linear_cross_entropy(
    x_MD: torch.Tensor, w_VD: torch.Tensor, target_M: torch.Tensor, bias_V: torch.Tensor | None = None, *,
    fused: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(sum over rows of the cross entropy of `x W^T + bias` with `target`, number of rows where no logit exceeds the target's).

    The loss is fp32 whatever the inputs; it is a sum, so that a mean over ranks and accumulation steps stays exact.
    Gradients flow to x, w and bias; no double backward. fused: overrides the choice of the Triton kernels, for tests.
    """
    return _LinearCrossEntropy.apply(x_MD, w_VD, bias_V, target_M, use_triton(x_MD) if fused is None else fused)
