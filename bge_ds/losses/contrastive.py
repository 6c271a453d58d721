"""The contrastive losses over embeddings.

Shapes: B queries of this rank, G places of a group, P passages and C queries to compare with (of this rank, or of all
ranks once gathered), D features, K positives that a query lists.

Every objective is put together from two things: the scores of a query with its own group, B x G and small, and for each
query the log-sum-exp of its scores with all other passages, B numbers from `linear_logsumexp`. The B x P matrix of scores
never exists, and memory grows with queries plus passages. With s the scores of the own group, positive first, and o
the others' log-sum-exp:

    InfoNCE      log(e^o + sum_g e^s_g) - s_0
    kl_div       InfoNCE + cross entropy of softmax(s) against the teacher's softmax over the group
    m3_kd_loss   sum_g teacher_g (log(e^o + sum_{k >= g} e^s_k) - s_g): each passage in turn is the target, earlier ones out
    margin_mse   InfoNCE + mean squared difference of the similarity margins s_0 - s_g from the teacher's

The first and the two middle ones are those of BGE's trainers (kl_div, m3_kd_loss: BGE M3, arXiv 2402.03216), the last that
of arXiv 2010.02666 beside InfoNCE. Matryoshka (arXiv 2205.13147) takes the mean over prefixes of the vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bge_ds.kernels.linear_logsumexp import Excluded, linear_logsumexp

DISTILLATIONS = ("kl_div", "m3_kd_loss", "margin_mse")


@dataclass(frozen=True)
class Objective:
    """What a query is compared with and how; margin and relative as `--false_negative_margin`, dims as `--mrl_dims`.

    narrow: the 16-bit type in which a GPU multiplies queries by passages, with fp32 sums: the type of the hidden states that
    the vectors come from, whose rounding they carry already. None for fp32.
    """

    in_batch: bool = True
    bidirectional: bool = False
    mask_false_negatives: bool = True
    margin: float | None = None
    relative: bool = False
    distillation: str | None = None
    dims: tuple[int, ...] = ()
    normalize: bool = True
    narrow: torch.dtype | None = None


@dataclass
class Candidates:
    """What the B queries are compared with, and what is known about it.

    p_PD, hashes_P: passages and their content hashes. own_BG: columns of each query's group, one after the other, its positive
    first, -1 at the end of shorter groups. known_BK: hashes of every positive that a query lists, any of them repeated where
    it lists fewer. own_only_B: queries that no other group's passage is compared with. teacher_BG: the teacher's scores, or
    None. For the passage-to-query direction: q_CD all queries, mine_B the columns of this rank's own, all_known_CK.
    """

    p_PD: torch.Tensor
    hashes_P: torch.Tensor
    own_BG: torch.Tensor
    known_BK: torch.Tensor
    own_only_B: torch.Tensor
    teacher_BG: torch.Tensor | None = None
    q_CD: torch.Tensor | None = None
    mine_B: torch.Tensor | None = None
    all_known_CK: torch.Tensor | None = None


@dataclass
class Parts:
    """loss: mean over the B queries. negatives: pairs of a query and a negative. by_content, by_margin: pairs hidden.

    scale: what the similarities were multiplied with.
    """

    loss: torch.Tensor
    negatives: torch.Tensor
    by_content: torch.Tensor
    by_margin: torch.Tensor
    scale: torch.Tensor | float

    def detached(self) -> Parts:
        values = (self.loss, self.negatives, self.by_content, self.by_margin, self.scale)
        return Parts(*(value.detach() if isinstance(value, torch.Tensor) else value for value in values))


def loss(q_BD: torch.Tensor, scale: torch.Tensor | float, found: Candidates, objective: Objective) -> Parts:
    """The objective's mean over the B queries, with what was hidden (counted at the full width).

    q_BD: fp32. scale: what inner products are multiplied with (1 / temperature).
    """
    width = q_BD.shape[1]
    dims = objective.dims or (width,)
    hidden = _Hidden.find(found, objective)
    parts = [_one_width(q_BD, scale, found, objective, hidden, None if d == width else d) for d in dims]
    counted = parts[dims.index(max(dims))]
    counted.loss = torch.stack([part.loss for part in parts]).mean()
    return counted


@dataclass
class _Hidden:
    """What of the score matrices is left out, the same at every width, and how much that is.

    excluded: what the others' log-sum-exp passes over, own groups and false negatives. own_hidden_BG: false negatives within
    the own group. by_content: how many pairs are hidden. others_B: how many passages other groups have. reverse: `excluded`
    of passages against queries. No size here depends on values, so that nothing waits for a GPU.
    """

    excluded: Excluded
    own_hidden_BG: torch.Tensor
    by_content: torch.Tensor
    others_B: torch.Tensor
    reverse: Excluded | None

    @classmethod
    def find(cls, found: Candidates, objective: Objective) -> _Hidden:
        present_BG = found.own_BG >= 0
        first_B, sizes_B = found.own_BG[:, 0], present_BG.sum(1)
        known_BK = found.known_BK if objective.mask_false_negatives else found.known_BK[:, :0]
        own_BG = found.hashes_P[found.own_BG.clamp_min(0)]
        own_hidden_BG = (own_BG[:, :, None] == known_BK[:, None]).any(-1) & present_BG
        positive_known_B = own_hidden_BG[:, 0].long()
        own_hidden_BG[:, 0] = False
        hidden_B = own_hidden_BG.sum(1)
        others_B = torch.zeros_like(sizes_B)
        if objective.in_batch:
            everywhere_B = _occurrences(known_BK, found.hashes_P) - positive_known_B
            hidden_B = torch.where(found.own_only_B, hidden_B, everywhere_B)
            others_B = (len(found.p_PD) - sizes_B) * ~found.own_only_B
        return cls(
            excluded=Excluded(first_B, sizes_B, known_BK, found.hashes_P[:, None]),
            own_hidden_BG=own_hidden_BG,
            by_content=hidden_B.sum(),
            others_B=others_B,
            reverse=cls._reversed(found, objective) if objective.bidirectional else None,
        )

    @staticmethod
    def _reversed(found: Candidates, objective: Objective) -> Excluded:
        """Pairs of (own positive, query) that are no negatives: the own query, and queries that list the passage."""
        known_CK = found.all_known_CK if objective.mask_false_negatives else found.all_known_CK[:, :0]
        positive_B = found.hashes_P[found.own_BG[:, 0]]
        return Excluded(found.mine_B, torch.ones_like(found.mine_B), positive_B[:, None], known_CK)


def _occurrences(known_BK: torch.Tensor, hashes_P: torch.Tensor) -> torch.Tensor:
    """int64 of B: passages whose hash a query lists."""
    listed_BK, sorted_P = known_BK.sort(1).values.contiguous(), hashes_P.sort().values
    counts_BK = torch.searchsorted(sorted_P, listed_BK, right=True) - torch.searchsorted(sorted_P, listed_BK)
    repeated_BK = F.pad(listed_BK[:, 1:] == listed_BK[:, :-1], (listed_BK.shape[1] and 1, 0))
    return counts_BK.masked_fill(repeated_BK, 0).sum(1)


def _prefix(x: torch.Tensor, width: int | None, normalize: bool) -> torch.Tensor:
    if width is None:
        return x
    return F.normalize(x[:, :width], dim=-1) if normalize else x[:, :width]


def _one_width(q_BD, scale, found: Candidates, objective: Objective, hidden: _Hidden, width: int | None) -> Parts:
    q_BD = _prefix(q_BD, width, objective.normalize)
    p_PD = _prefix(found.p_PD, width, objective.normalize)
    x_BD = q_BD * scale
    present_BG = found.own_BG >= 0
    s_BG = torch.einsum("bd,bgd->bg", x_BD, p_PD[found.own_BG.clamp_min(0)])
    limit_B = None
    if objective.margin is not None:
        reach = s_BG[:, 0].abs() if objective.relative else scale
        limit_B = (s_BG[:, 0] + objective.margin * reach).detach()
    hidden_BG = hidden.own_hidden_BG | ~present_BG
    by_margin = torch.zeros((), dtype=torch.int64, device=q_BD.device)
    if limit_B is not None:
        over_BG = (s_BG > limit_B[:, None]) & ~hidden_BG
        over_BG[:, 0] = False
        hidden_BG, by_margin = hidden_BG | over_BG, by_margin + over_BG.sum()
    o_B = torch.full_like(s_BG[:, 0], float("-inf"))
    if objective.in_batch:
        o_B, over_B = linear_logsumexp(x_BD, p_PD, hidden.excluded, limit_B, narrow=objective.narrow)
        o_B = o_B.masked_fill(found.own_only_B, float("-inf"))
        by_margin = by_margin + over_B.masked_fill(found.own_only_B, 0).sum()
    if objective.distillation == "m3_kd_loss":
        loss_B = _each_in_turn(s_BG, o_B, found.teacher_BG)
    else:
        loss_B = torch.logaddexp(o_B, s_BG.masked_fill(hidden_BG, float("-inf")).logsumexp(1)) - s_BG[:, 0]
    if objective.bidirectional:
        y_BD = p_PD[found.own_BG[:, 0]] * scale
        c_CD = _prefix(found.q_CD, width, objective.normalize)
        back_B, _ = linear_logsumexp(y_BD, c_CD, hidden.reverse, limit_B, narrow=objective.narrow)
        reverse_B = torch.logaddexp(back_B, s_BG[:, 0]) - s_BG[:, 0]
        loss_B = torch.where(found.own_only_B, loss_B, (loss_B + reverse_B) / 2)
    if objective.distillation == "kl_div":
        loss_B = loss_B - (found.teacher_BG.softmax(1) * s_BG.log_softmax(1)).sum(1)
    if objective.distillation == "margin_mse":
        margins = (s_BG[:, :1] - s_BG[:, 1:]) / scale - (found.teacher_BG[:, :1] - found.teacher_BG[:, 1:])
        loss_B = loss_B + margins.square().mean(1)
    negatives = hidden.others_B.sum() + present_BG[:, 1:].sum() - hidden.by_content - by_margin
    return Parts(loss_B.mean(), negatives, hidden.by_content, by_margin, scale)


def _each_in_turn(s_BG, o_B, teacher_BG) -> torch.Tensor:
    """m3_kd_loss: every passage of the group is the target with the teacher's weight, those before it left out."""
    from_here_BG = s_BG.flip(1).logcumsumexp(1).flip(1)
    return (teacher_BG.softmax(1) * (torch.logaddexp(o_B[:, None], from_here_BG) - s_BG)).sum(1)


class Temperature(torch.nn.Module):
    """The learnable temperature: `forward()` is 1 / temperature, 0-dim fp32, kept to temperatures from 0.001 to 1.

    Its logarithm is trained, as in CLIP (arXiv 2103.00020), so that a step changes it by a share of itself. A module of its
    own, so that ZeRO-3 gathers its parameter when it is called.
    """

    no_weight_decay = True

    def __init__(self, temperature: float):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor([-math.log(temperature)]))

    def forward(self) -> torch.Tensor:
        return self.log_scale.float().clamp(0.0, math.log(1000)).exp()[0]
