"""Gathers what other ranks bring, and compares this rank's queries with it.

Shapes: B queries and P passages of this rank, then of all ranks; C queries of all ranks; D features; K positives of a query.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from bge_ds.distributed import collectives
from bge_ds.losses import contrastive

if TYPE_CHECKING:
    from bge_ds.data.collate import ContrastiveBatch, Share


def contrastive_loss(
    vectors_ND: torch.Tensor,
    scale: torch.Tensor | float,
    batch: ContrastiveBatch,
    objective: contrastive.ContrastiveSettings,
    cross_device: bool,
    shares: list[Share] | None = None,
) -> contrastive.LossParts:
    """The loss of this rank's queries, gathering first what other ranks bring.

    vectors_ND: queries, then passages, in the batch's order. shares: of every rank, where other ranks' passages count.
    """
    q_BD, p_PD = vectors_ND[: batch.queries], vectors_ND[batch.queries :]
    hashes_P, own_BG, device = batch.hashes_P, batch.own_BG, p_PD.device
    q_CD, mine_B, known_CK = q_BD, torch.arange(len(q_BD), device=device), batch.known_BK
    if cross_device and collectives.world_size() > 1:
        assert shares is not None
        rank = collectives.rank()
        counts = [share.passages for share in shares]
        before = sum(counts[:rank])
        p_PD, hashes_P = collectives.all_gather_rows(p_PD, counts), collectives.all_gather_rows(hashes_P, counts)
        own_BG = torch.where(own_BG < 0, own_BG, own_BG + before)
        if objective.bidirectional:
            missing = max(share.known for share in shares) - known_CK.shape[1]
            known_CK = torch.cat([known_CK, known_CK[:, -1:].expand(-1, missing)], 1)
            mine_B = mine_B + rank * len(q_BD)
            q_CD, known_CK = collectives.all_gather_rows(q_BD), collectives.all_gather_rows(known_CK)
    found = contrastive.Candidates(
        p_PD=p_PD, hashes_P=hashes_P, own_BG=own_BG, known_BK=batch.known_BK, own_only_B=batch.own_only_B,
        teacher_BG=batch.teacher_BG, taught_B=batch.taught_B, q_CD=q_CD, mine_B=mine_B, all_known_CK=known_CK,
    )  # fmt: skip
    parts = contrastive.loss(q_BD, scale, found, objective)
    return replace(parts, cosine=mean_cosine(vectors_ND[batch.queries :].detach()))


def mean_cosine(x_PD: torch.Tensor) -> torch.Tensor:
    """The mean cosine of two different rows: with unit vectors, P |mean|^2 = 1 + (P - 1) times it. 0 for a single row."""
    rows = len(x_PD)
    mean_D = F.normalize(x_PD.float(), dim=1).mean(0)
    return (rows * mean_D.square().sum() - 1) / max(1, rows - 1)
