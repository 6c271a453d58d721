"""GradCache (arXiv 2101.06983): the exact gradient of a loss over a whole batch of vectors, in the memory of one piece.

Shapes: N vectors of the batch, D features, n vectors of a piece.

The vectors of all pieces but the last are computed without a graph; the loss gives every vector its gradient; then each
piece is computed again, with a graph, and its vectors' gradients flow on into the weights. The last piece keeps the graph
of its first pass, so that one piece (no cache at all) costs one pass, and K pieces 2 K - 1. Whoever passes `embed` makes it
repeatable: the same piece must give the same vectors, dropout included.
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
    """Accumulate the gradient of `loss(vectors_ND, scale)`; the loss itself, detached.

    embed(k): vectors of piece k (sizes[k] rows, further ones are ignored) and the 0-dim scale, the same for every piece.
    run_backward(x): the backward pass of a scalar, called once a piece and right after that piece's forward pass.
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
    grads = leaf_ND.grad.split(sizes)

    def carry(vectors_nD, scale, k):
        carried = (vectors_nD * grads[k]).sum()
        # The scale's gradient in equal shares, so that its parameter takes part in every piece's backward.
        return carried if scale_leaf.grad is None else carried + scale * scale_leaf.grad / len(sizes)

    run_backward(carry(live_nD, scale, last))
    for k in range(last):
        vectors_nD, scale = embed(k)
        run_backward(carry(vectors_nD[: sizes[k]], scale, k))
    return value.detach()
