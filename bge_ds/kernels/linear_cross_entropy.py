"""Cross entropy of X W^T without ever holding the whole matrix of logits.

Shapes: M rows (positions, queries), V columns (vocabulary, passages), D features, J excluded pairs.

Rows are taken in blocks of logits; memory is that of X, W, their gradients, and one block. The operation comes in two
forms, because two objectives want different things of it:

`linear_cross_entropy`: one known target a row, the sum over rows. Each block's softmax becomes the gradients of X and W
on the spot, in the forward pass; the backward only scales what is there. Three matrix products in all.

On a GPU the blocks are larger (their gradient of W goes through memory once a block), softmax and its gradient are Triton
kernels that work in place (`cross_entropy_triton`), and the products stay cuBLAS's. Liger's fused loss works the same way.
Apple's Cut-Cross-Entropy (arXiv 2411.09009) never writes logits, but computes them again in the backward pass: four to
five products in place of three, in Triton, at two thirds of cuBLAS's rate. Passing over logits of 16 bits costs less: for
768 features and 30,522 words some 0.06 us a row of a GPU with 3 TB/s, where the three products need 0.18 us.

`linear_logsumexp`: the normaliser of each row by itself, over all columns but the excluded ones, for losses that put it
together with scores of their own (several targets, a teacher's weights). What flows back into a row is known only
afterwards, so the backward computes the blocks again: four matrix products, and M numbers kept.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch

from bge_ds.kernels.triton_support import at_least_fp32, is_gpu, takes

# Logits held at a time: 16 M floats are 64 MiB, 550 rows of BERT's vocabulary; with half of it a step on a CPU took 8 % longer.
_BLOCK_ELEMENTS = 1 << 24
# Rows of a block at least, whatever the vocabulary: every block goes over the whole gradient of W once.
_BLOCK_ROWS = 256
# On a GPU, which has no such caches and needs large products to be busy: bytes of logits held at a time, and fewest and most
# rows of the vocabulary's blocks. A block reads and writes the fp32 gradient of W once, 8 bytes an element, and computes 6
# operations a row and element: with 2,048 rows that is 15 % of the products' time at 3 TB/s and 800 TFLOP/s, with 4,096 half.
_GPU_BYTES, _GPU_ROWS = 512 << 20, (2048, 4096)


def _blocks(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _gpu_step(columns: int, itemsize: int) -> int:
    """Rows of a block of the vocabulary's logits on a GPU."""
    return min(max(_GPU_BYTES // (columns * itemsize), _GPU_ROWS[0]), _GPU_ROWS[1])


@cache
def _adds_in_fp32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit matrices to an fp32 one on its way out of the multiplication."""
    try:
        total, one = torch.zeros(16, 16, device=device_type), torch.zeros(16, 16, device=device_type, dtype=dtype)
        torch.ops.aten.addmm.dtype_out(total, one, one, torch.float32, out=total)
    except (NotImplementedError, RuntimeError, AttributeError):
        return False
    return True


def _add_product(total_VD: torch.Tensor, left_MV: torch.Tensor, right_MD: torch.Tensor) -> None:
    """total += left^T right, in the total's type."""
    if total_VD.dtype == right_MD.dtype:
        total_VD.addmm_(left_MV.T, right_MD)
    elif is_gpu(total_VD.device.type) and _adds_in_fp32(total_VD.device.type, right_MD.dtype):
        torch.ops.aten.addmm.dtype_out(total_VD, left_MV.T, right_MD, torch.float32, out=total_VD)
    else:
        total_VD += left_MV.T @ right_MD


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, w_VD, bias_V, target_M, fused: bool):
        of_way = _LinearCrossEntropy._fused if fused else _LinearCrossEntropy._plain
        loss, correct, *gradients = of_way(x_MD, w_VD, bias_V, target_M, ctx.needs_input_grad)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = w_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def _fused(x_MD, w_VD, bias_V, target_M, wants):
        from bge_ds.kernels.cross_entropy_triton import statistics, to_gradient

        x_MD = x_MD.contiguous()
        dx = torch.empty_like(x_MD) if wants[0] else None
        dw = torch.zeros_like(w_VD, dtype=torch.float32) if wants[1] else None
        db = torch.zeros_like(bias_V, dtype=torch.float32) if wants[2] else None
        blocks = _blocks(x_MD.shape[0], _gpu_step(w_VD.shape[0], x_MD.dtype.itemsize))
        products = x_MD.new_empty(max((b.stop - b.start for b in blocks), default=0), w_VD.shape[0])
        losses, right = [], []
        for block in blocks:
            x, target = x_MD[block], target_M[block]
            logits = torch.mm(x, w_VD.T, out=products[: len(x)])
            lse_M, loss_M, right_M = statistics(logits, bias_V, target)
            losses.append(loss_M.sum())
            right.append(right_M.sum())
            if not any(wants[:3]):
                continue
            added = to_gradient(logits, bias_V, target, lse_M, sums=db is not None)
            if db is not None:
                db += added
            if dx is not None:
                torch.mm(logits, w_VD, out=dx[block])
            if dw is not None:
                _add_product(dw, logits, x)
        nothing = torch.zeros((), dtype=torch.float32, device=x_MD.device)
        loss = torch.stack(losses).sum() if losses else nothing
        return loss, torch.stack(right).sum() if right else nothing.long(), dx, dw, db

    @staticmethod
    def _plain(x_MD, w_VD, bias_V, target_M, wants):
        loss = torch.zeros((), dtype=torch.float32, device=x_MD.device)
        correct = torch.zeros((), dtype=torch.int64, device=x_MD.device)
        dx = torch.empty_like(x_MD) if wants[0] else None
        dw = torch.zeros(w_VD.shape, dtype=torch.float32, device=w_VD.device) if wants[1] else None
        db = torch.zeros(bias_V.shape, dtype=torch.float32, device=w_VD.device) if wants[2] else None
        blocks = _blocks(x_MD.shape[0], max(_BLOCK_ROWS, _BLOCK_ELEMENTS // w_VD.shape[0]))
        # Fresh memory for every block costs a CPU a tenth of the whole: all products go to one place.
        products = x_MD.new_empty(max((b.stop - b.start for b in blocks), default=0), w_VD.shape[0])
        for block in blocks:
            x, target = x_MD[block], target_M[block, None]
            logits = torch.mm(x, w_VD.T, out=products[: len(x)]).float()
            if bias_V is not None:
                logits += bias_V  # after the cast: 16-bit sums would round twice
            found = logits.gather(-1, target)
            correct += (found >= logits.amax(-1, keepdim=True)).sum()
            # Row by row in the processor's caches, and in place: on a CPU, passes over memory cost as much as the products.
            logits = torch.log_softmax(logits, -1, out=logits)
            loss -= logits.gather(-1, target).sum()
            if not any(wants[:3]):
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
        return loss, correct, dx, dw, db

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, _):
        dx, dw, db = ctx.saved_tensors
        w_dtype, bias_dtype = ctx.dtypes
        return (
            None if dx is None else dx * scale,  # a 0-dim fp32 factor: computed in fp32, kept in dx's type
            # In place: a second backward is caught by autograd's version check instead of being scaled twice.
            None if dw is None else dw.mul_(scale).to(w_dtype),
            None if db is None else db.mul_(scale).to(bias_dtype),
            None,
            None,
        )


def linear_cross_entropy(
    x_MD: torch.Tensor,
    w_VD: torch.Tensor,
    target_M: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    fused: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over rows of the cross entropy of `x W^T + bias` against `target`, rows where no logit is above the target's).

    The loss is fp32 whatever the inputs; it is a sum, so that a mean over ranks and accumulation steps stays exact.
    Gradients flow to x, w and bias, once (no double backward). fused: by the GPU's kernels or not, for tests.
    """
    return _LinearCrossEntropy.apply(x_MD, w_VD, bias_V, target_M, takes(x_MD) if fused is None else fused)


class _LinearLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, w_VD, row_J, col_J, limit_M):
        most = _GPU_BYTES // 4 if is_gpu(x_MD.device.type) else _BLOCK_ELEMENTS
        blocks = _blocks(x_MD.shape[0], max(1, most // max(1, w_VD.shape[0])))
        # Where each block's pairs lie: read back once, since a slice needs numbers on the host.
        edges = torch.tensor([*(block.start for block in blocks), x_MD.shape[0]], device=row_J.device)
        bounds = torch.searchsorted(row_J, edges).tolist()
        ctx.blocks = [(block, slice(*pairs)) for block, pairs in zip(blocks, pairwise(bounds), strict=True)]
        lse_M = torch.empty(x_MD.shape[0], dtype=at_least_fp32(x_MD[:0]).dtype, device=x_MD.device)
        over_M = torch.zeros(x_MD.shape[0], dtype=torch.int64, device=x_MD.device)
        inputs = x_MD, w_VD, row_J, col_J, limit_M
        for block, pairs in ctx.blocks:
            logits, over = _LinearLogSumExp._logits(inputs, block, pairs)
            lse_M[block] = logits.logsumexp(-1)
            if over is not None:
                over_M[block] = over.sum(-1)
        ctx.save_for_backward(*inputs, lse_M)
        ctx.mark_non_differentiable(over_M)
        return lse_M, over_M

    @staticmethod
    def _logits(inputs, block: slice, pairs: slice):
        x_MD, w_VD, row_J, col_J, limit_M = inputs
        logits = at_least_fp32(x_MD[block] @ w_VD.T)
        logits[row_J[pairs] - block.start, col_J[pairs]] = float("-inf")
        if limit_M is None:
            return logits, None
        over = logits > limit_M[block, None]
        return logits.masked_fill_(over, float("-inf")), over

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_M, _):
        *inputs, lse_M = ctx.saved_tensors
        x_MD, w_VD = inputs[:2]
        dx = torch.empty_like(x_MD) if ctx.needs_input_grad[0] else None
        dw = torch.zeros(w_VD.shape, dtype=lse_M.dtype, device=w_VD.device) if ctx.needs_input_grad[1] else None
        # A row with no column left has the value -inf and no gradient: exp(-inf - 0) is the 0 it needs.
        norm_M = lse_M.masked_fill(lse_M == float("-inf"), 0.0)
        for block, pairs in ctx.blocks:
            logits, _ = _LinearLogSumExp._logits(inputs, block, pairs)
            weights = logits.sub_(norm_M[block, None]).exp_().mul_(grad_M[block, None]).to(x_MD.dtype)
            if dx is not None:
                dx[block] = weights @ w_VD
            if dw is not None:
                dw += weights.T @ x_MD[block]
        return dx, None if dw is None else dw.to(w_VD.dtype), None, None, None


def linear_logsumexp(
    x_MD: torch.Tensor,
    w_VD: torch.Tensor,
    excluded: tuple[torch.Tensor, torch.Tensor] | None = None,
    limit_M: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exp of each row of `x W^T`, how many columns of each row were above its limit).

    excluded: (row_J, col_J) int64, rows in rising order: these pairs do not count. limit_M: nor do logits above a row's
    limit (no gradient flows to it). A row with nothing left is -inf. fp32 whatever the inputs (fp64 stays fp64);
    gradients flow to x and w, once.
    """
    if excluded is None:
        nothing = torch.empty(0, dtype=torch.int64, device=x_MD.device)
        excluded = nothing, nothing
    return _LinearLogSumExp.apply(x_MD, w_VD, *excluded, limit_M)
