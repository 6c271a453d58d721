"""GradCache (arXiv:2101.06983): the exact gradient of a loss over a whole batch, in the memory of one piece of it.

Shapes: N vectors of the batch, D features, n vectors of a piece.

1. Compute the vectors of all pieces without a graph. 2. The loss gives the gradient of every vector. 3. Compute each piece
again, with a graph, and back-propagate its vectors' gradients into the weights. The last piece keeps the graph of its first
forward, so K pieces cost 2 K - 1 forwards, and one piece (no cache at all) costs one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def backward(
    embed: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    sizes: list[int],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    run_backward: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """Accumulate the gradient of `loss(vectors_ND, scale)`; returns the loss, detached.

    embed(k): vectors of piece k (sizes[k] rows; further rows are ignored) and the 0-dim scale, the same for every piece. It
    must be repeatable: the same piece gives the same vectors, dropout included. run_backward(x): the backward pass of a
    scalar, called once for each piece, right after that piece's forward.
    """
    last = len(sizes) - 1
    with torch.no_grad():
        parts = [embed(k)[0][: sizes[k]] for k in range(last)]
    live_nD, scale = embed(last)
    live_nD = live_nD[: sizes[last]]
    leaf_ND = torch.cat([*parts, live_nD.detach()]).requires_grad_()
    scale_leaf = scale.detach().requires_grad_(scale.requires_grad)
    value = loss(leaf_ND, scale_leaf)
    value.backward()
    assert leaf_ND.grad is not None
    grads = leaf_ND.grad.split(sizes)

    def surrogate(vectors_nD: torch.Tensor, scale: torch.Tensor, k: int) -> torch.Tensor:
        """A scalar whose gradient with respect to piece k's vectors (and the scale) is that of the loss."""
        value = (vectors_nD * grads[k]).sum()
        # An equal share of the scale's gradient for each piece, so that its parameter takes part in every backward.
        return value if scale_leaf.grad is None else value + scale * scale_leaf.grad / len(sizes)

    run_backward(surrogate(live_nD, scale, last))
    for k in range(last):
        vectors_nD, scale = embed(k)
        run_backward(surrogate(vectors_nD[: sizes[k]], scale, k))
    return value.detach()
