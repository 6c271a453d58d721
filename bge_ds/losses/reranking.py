"""Losses over a group's scores.

Shapes: B groups of this rank, G pairs of a group, the positive first.

    cross_entropy          log(sum_g e^s_g) - s_0, with label smoothing the mean over the group mixed in
    binary_cross_entropy   each pair by itself, the positive 1, the others 0
    kl_div                 cross entropy between the teacher's softmax over the group and the model's (listwise; BGE)
    margin_mse             mean squared error between the margins s_0 - s_g and the teacher's (arXiv:2010.02666)
    ranknet                log(1 + e^(s_j - s_i)), the mean over the pairs that the teacher orders i before j (Burges, 2005)

A group's loss depends on the group alone, and all groups are of one size: the mean over groups is the same on any number of
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LOSSES = ("cross_entropy", "binary_cross_entropy", "none")
DISTILLATIONS = ("kl_div", "margin_mse", "ranknet")


@dataclass(frozen=True)
class RerankingSettings:
    """loss: one of LOSSES. distillation: one of DISTILLATIONS, added to it, or None."""

    loss: str = "cross_entropy"
    distillation: str | None = None
    label_smoothing: float = 0.0


def loss(scores_BG: torch.Tensor, settings: RerankingSettings, teacher_BG: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over the groups, 0-dim. scores_BG, teacher_BG: fp32; the latter is needed for a distillation."""
    total = scores_BG.new_zeros(())
    if settings.loss == "cross_entropy":
        first_B = torch.zeros(len(scores_BG), dtype=torch.int64, device=scores_BG.device)
        total = F.cross_entropy(scores_BG, first_B, label_smoothing=settings.label_smoothing)
    elif settings.loss == "binary_cross_entropy":
        labels_BG = torch.zeros_like(scores_BG)
        labels_BG[:, 0] = 1
        total = F.binary_cross_entropy_with_logits(scores_BG, labels_BG)
    if settings.distillation is not None:
        assert teacher_BG is not None
        total = total + _distillation(settings.distillation, scores_BG, teacher_BG)
    return total


def _distillation(kind: str, scores_BG: torch.Tensor, teacher_BG: torch.Tensor) -> torch.Tensor:
    if kind == "kl_div":
        return -(teacher_BG.softmax(1) * scores_BG.log_softmax(1)).sum(1).mean()
    if kind == "margin_mse":
        return ((scores_BG[:, :1] - scores_BG[:, 1:]) - (teacher_BG[:, :1] - teacher_BG[:, 1:])).square().mean()
    ordered_BGG = (teacher_BG[:, :, None] > teacher_BG[:, None]).to(scores_BG.dtype)
    pair_BGG = F.softplus(scores_BG[:, None] - scores_BG[:, :, None])
    # A teacher that gives a whole group one score says nothing about it.
    return ((pair_BGG * ordered_BGG).sum((1, 2)) / ordered_BGG.sum((1, 2)).clamp_min(1)).mean()
