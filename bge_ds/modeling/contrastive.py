"""The contrastive loss over embeddings (InfoNCE).

Shapes: B queries of this rank, P passages (of this rank, or of all ranks once gathered), D features, K listed positives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def false_negatives(hashes_P, known_K, known_query_K, target_B) -> torch.Tensor:
    """bool B x P: passages that are a listed positive of the query, by content hash, and not the one it is scored with.

    hashes_P: int64 content hashes; known_K with known_query_K: every positive listed for each query.
    """
    hidden = torch.zeros(target_B.numel(), hashes_P.numel(), dtype=torch.bool, device=hashes_P.device)
    # Few passages match any listed positive: compare only those, not K x P.
    candidates = torch.isin(hashes_P, known_K).nonzero().squeeze(-1)
    k, c = (known_K[:, None] == hashes_P[candidates][None]).nonzero(as_tuple=True)
    hidden[known_query_K[k], candidates[c]] = True
    return hidden.scatter_(1, target_B[:, None], False)


def info_nce(q_BD, p_PD, target_B, temperature: float, hidden_BP=None) -> torch.Tensor:
    """Mean over the queries of the cross entropy of `Q P^T / temperature`, query b's positive at column target_B[b].

    Both embeddings fp32; `hidden_BP` (bool) marks columns that must not serve as negatives.
    """
    scores_BP = q_BD @ p_PD.T / temperature
    if hidden_BP is not None:
        scores_BP = scores_BP.masked_fill(hidden_BP, float("-inf"))
    return F.cross_entropy(scores_BP, target_B)


def info_nce_own_group(q_BD, p_PD, temperature: float, hidden_BG=None) -> torch.Tensor:
    """The same against each query's own group only: P = B x G passages group by group, the positive first."""
    p_BGD = p_PD.unflatten(0, (q_BD.shape[0], -1))
    scores_BG = torch.einsum("bd,bgd->bg", q_BD, p_BGD) / temperature
    if hidden_BG is not None:
        scores_BG = scores_BG.masked_fill(hidden_BG, float("-inf"))
    return F.cross_entropy(scores_BG, torch.zeros(q_BD.shape[0], dtype=torch.int64, device=q_BD.device))
