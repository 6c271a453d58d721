"""Cross entropy of X W^T without ever holding the whole matrix of logits.

Shapes: M rows (positions, queries), V columns (vocabulary, passages), D features.

Rows are taken in blocks. With gradients wanted, each block's softmax is turned into the gradients of X and W on the
spot, in the forward pass: nothing of size M x V is kept for the backward, which only scales what is there.
Memory is that of X, W, their gradients, and one block of logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Logits held at a time: 16 M floats are 64 MiB, large enough for the matrix products to run at full rate.
_BLOCK_ELEMENTS = 1 << 24


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, w_VD, bias_V, target_M):
        wants = ctx.needs_input_grad
        loss = torch.zeros((), dtype=torch.float32, device=x_MD.device)
        correct = torch.zeros((), dtype=torch.int64, device=x_MD.device)
        dx = torch.empty_like(x_MD) if wants[0] else None
        dw = torch.zeros(w_VD.shape, dtype=torch.float32, device=w_VD.device) if wants[1] else None
        db = torch.zeros(bias_V.shape, dtype=torch.float32, device=w_VD.device) if wants[2] else None
        rows = max(1, _BLOCK_ELEMENTS // w_VD.shape[0])
        for start in range(0, x_MD.shape[0], rows):
            x, target = x_MD[start : start + rows], target_M[start : start + rows]
            logits = F.linear(x, w_VD, bias_V).float()
            correct += (logits.argmax(-1) == target).sum()
            log_norm = logits.logsumexp(-1, keepdim=True)
            loss += (log_norm.squeeze(-1) - logits.gather(-1, target[:, None]).squeeze(-1)).sum()
            if not any(wants[:3]):
                continue
            error = logits.sub_(log_norm).exp_()
            error.scatter_add_(-1, target[:, None], error.new_full((len(target), 1), -1.0))
            if db is not None:
                db += error.sum(0)
            error = error.to(x.dtype)
            if dx is not None:
                dx[start : start + rows] = error @ w_VD
            if dw is not None:
                dw += error.T @ x
        ctx.save_for_backward(dx, dw, db)
        ctx.dtypes = w_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

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
        )


def linear_cross_entropy(
    x_MD: torch.Tensor, w_VD: torch.Tensor, target_M: torch.Tensor, bias_V: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over rows of the cross entropy of `x W^T + bias` against `target`, number of rows whose best is the target).

    The loss is fp32 whatever the inputs; it is a sum, so that a mean over ranks and accumulation steps stays exact.
    Gradients flow to x, w and bias, once (no double backward).
    """
    return _LinearCrossEntropy.apply(x_MD, w_VD, bias_V, target_M)
