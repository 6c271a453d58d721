"""Contrastive losses over embeddings.

Shapes: B queries of this rank, G passages of a group, P passages and C queries to compare with (of this rank, or gathered
from all ranks), D features, K positives listed by a query.

Every loss is computed from two inputs: the scores of a query with its own group (B x G, small), and for each query the
log-sum-exp of its scores with all other passages (B numbers, from `linear_logsumexp`). The B x P score matrix is never
materialised, so memory grows with B + P. With s the scores of the own group, positive first, and o the log-sum-exp:

    InfoNCE      log(e^o + sum_g e^s_g) - s_0
    kl_div       InfoNCE + cross entropy between the teacher's softmax over the group and softmax(s)
    m3_kd_loss   sum_g teacher_g (log(e^o + sum_{k >= g} e^s_k) - s_g): each passage in turn is the target, without earlier ones
    margin_mse   InfoNCE + mean squared error between the similarity margins s_0 - s_g and the teacher's margins

InfoNCE, kl_div and m3_kd_loss are those of BGE's trainers (BGE M3, arXiv:2402.03216); margin_mse is arXiv:2010.02666 added to
InfoNCE. Matryoshka training (arXiv:2205.13147) averages the loss over prefixes of the vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from bge_ds.kernels.linear_logsumexp import ExcludedPairs, linear_logsumexp

_ABSENT = -1e30  # the score of a passage that a group lacks: finite, as its weight of 0 times infinity would be NaN
DISTILLATIONS = ("kl_div", "m3_kd_loss", "margin_mse")


@dataclass(frozen=True)
class ContrastiveSettings:
    """What a query is compared with and how.

    margin, relative: `--false_negative_margin` and whether its type is "relative". dims: `--mrl_dims`. narrow: the 16-bit type
    in which a GPU multiplies queries by passages, with fp32 sums; None for fp32. It is the type of the hidden states that the
    vectors come from, so the vectors carry its rounding already.
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
    """The passages (and queries) that the B queries are compared with.

    p_PD, hashes_P: passages and their content hashes. own_BG: passage numbers of each query's group, positive first, padded
    with -1. known_BK: hashes of all positives that a query lists, padded by repeating one of them. own_only_B: queries that
    are compared with their own group only. teacher_BG: teacher scores, for distillation; taught_B: the queries that have such,
    None: all. The others have finite numbers in their place and the loss without a teacher. For the passage-to-query direction:
    q_CD all queries, mine_B the numbers of this rank's queries among them, all_known_CK their known_BK.
    """

    p_PD: torch.Tensor
    hashes_P: torch.Tensor
    own_BG: torch.Tensor
    known_BK: torch.Tensor
    own_only_B: torch.Tensor
    teacher_BG: torch.Tensor | None = None
    taught_B: torch.Tensor | None = None
    q_CD: torch.Tensor | None = None
    mine_B: torch.Tensor | None = None
    all_known_CK: torch.Tensor | None = None


@dataclass
class LossParts:
    """loss: mean over the B queries. negatives: (query, negative) pairs that count. by_content, by_margin: pairs masked.

    scale: factor of the similarities. cosine: the mean of two passages of this rank.
    """

    loss: torch.Tensor
    negatives: torch.Tensor
    by_content: torch.Tensor
    by_margin: torch.Tensor
    scale: torch.Tensor | float
    cosine: torch.Tensor | float = math.nan

    def detached(self) -> LossParts:
        scale = self.scale.detach() if isinstance(self.scale, torch.Tensor) else self.scale
        return replace(self, loss=self.loss.detach(), scale=scale)


def loss(q_BD: torch.Tensor, scale: torch.Tensor | float, candidates: Candidates, settings: ContrastiveSettings) -> LossParts:
    """The mean loss of the B queries, averaged over `settings.dims`; pairs are counted at the largest width.

    q_BD: fp32. scale: factor of the inner products, 1 / temperature.
    """
    full = q_BD.shape[1]
    dims = settings.dims or (full,)
    masked = _MaskedPairs.find(candidates, settings)
    parts = [_loss_at_width(q_BD, scale, candidates, settings, masked, None if d == full else d) for d in dims]
    mean = torch.stack([part.loss for part in parts]).mean()
    return replace(parts[dims.index(max(dims))], loss=mean)


@dataclass
class _MaskedPairs:
    """The pairs that count at no width. No size here depends on values, so nothing waits for a GPU.

    excluded: pairs left out of the log-sum-exp, own groups and false negatives. own_BG: false negatives within the own group.
    by_content: number of masked pairs. others_B: number of passages in other groups. reverse: `excluded` of the
    passage-to-query direction.
    """

    excluded: ExcludedPairs
    own_BG: torch.Tensor
    by_content: torch.Tensor
    others_B: torch.Tensor
    reverse: ExcludedPairs | None

    @classmethod
    def find(cls, candidates: Candidates, settings: ContrastiveSettings) -> _MaskedPairs:
        hashes_P, known_BK = candidates.hashes_P, candidates.known_BK
        present_BG = candidates.own_BG >= 0
        first_B, sizes_B = candidates.own_BG[:, 0], present_BG.sum(1)
        if not settings.mask_false_negatives:
            known_BK = known_BK[:, :0]
        own_hashes_BG = hashes_P[candidates.own_BG.clamp_min(0)]
        own_BG = (own_hashes_BG[:, :, None] == known_BK[:, None]).any(-1) & present_BG
        positive_known_B = own_BG[:, 0].long()
        own_BG[:, 0] = False
        masked_B = own_BG.sum(1)
        others_B = torch.zeros_like(sizes_B)
        if settings.in_batch:
            masked_everywhere_B = _count_known(known_BK, hashes_P) - positive_known_B
            masked_B = torch.where(candidates.own_only_B, masked_B, masked_everywhere_B)
            others_B = (len(candidates.p_PD) - sizes_B) * ~candidates.own_only_B
        excluded = ExcludedPairs(first_B, sizes_B, known_BK, hashes_P[:, None])
        reverse = cls._reverse(candidates, settings) if settings.bidirectional else None
        return cls(excluded, own_BG, masked_B.sum(), others_B, reverse)

    @staticmethod
    def _reverse(candidates: Candidates, settings: ContrastiveSettings) -> ExcludedPairs:
        """(own positive, query) pairs that are not negatives: the own query, and queries that list the passage."""
        known_CK, mine_B = candidates.all_known_CK, candidates.mine_B
        assert known_CK is not None and mine_B is not None
        if not settings.mask_false_negatives:
            known_CK = known_CK[:, :0]
        positive_B = candidates.hashes_P[candidates.own_BG[:, 0]]
        return ExcludedPairs(mine_B, torch.ones_like(mine_B), positive_B[:, None], known_CK)


def _count_known(known_BK: torch.Tensor, hashes_P: torch.Tensor) -> torch.Tensor:
    """int64 B: for each query, the number of passages whose hash it lists."""
    listed_BK, sorted_P = known_BK.sort(1).values.contiguous(), hashes_P.sort().values
    counts_BK = torch.searchsorted(sorted_P, listed_BK, right=True) - torch.searchsorted(sorted_P, listed_BK)
    repeated_BK = F.pad(listed_BK[:, 1:] == listed_BK[:, :-1], (listed_BK.shape[1] and 1, 0))
    return counts_BK.masked_fill(repeated_BK, 0).sum(1)


def _truncate(x: torch.Tensor, width: int | None, normalize: bool) -> torch.Tensor:
    """The first `width` features, normalised again; None leaves the vectors as they are."""
    if width is None:
        return x
    return F.normalize(x[:, :width], dim=-1) if normalize else x[:, :width]


def _loss_at_width(
    q_BD: torch.Tensor, scale: torch.Tensor | float, candidates: Candidates, settings: ContrastiveSettings,
    masked: _MaskedPairs, width: int | None,
) -> LossParts:  # fmt: skip
    q_BD = _truncate(q_BD, width, settings.normalize)
    p_PD = _truncate(candidates.p_PD, width, settings.normalize)
    x_BD = q_BD * scale
    own_only_B, present_BG = candidates.own_only_B, candidates.own_BG >= 0
    s_BG = torch.einsum("bd,bgd->bg", x_BD, p_PD[candidates.own_BG.clamp_min(0)])
    masked_BG = masked.own_BG | ~present_BG
    by_margin = torch.zeros((), dtype=torch.int64, device=q_BD.device)
    limit_B = None
    if settings.margin is not None:
        unit = s_BG[:, 0].abs() if settings.relative else scale
        limit_B = (s_BG[:, 0] + settings.margin * unit).detach()
        over_BG = (s_BG > limit_B[:, None]) & ~masked_BG
        over_BG[:, 0] = False
        masked_BG, by_margin = masked_BG | over_BG, by_margin + over_BG.sum()
    o_B = torch.full_like(s_BG[:, 0], float("-inf"))
    if settings.in_batch:
        o_B, over_B = linear_logsumexp(x_BD, p_PD, masked.excluded, limit_B, narrow=settings.narrow)
        o_B = o_B.masked_fill(own_only_B, float("-inf"))
        by_margin = by_margin + over_B.masked_fill(own_only_B, 0).sum()
    loss_B = torch.logaddexp(o_B, s_BG.masked_fill(masked_BG, float("-inf")).logsumexp(1)) - s_BG[:, 0]
    if settings.distillation == "m3_kd_loss":
        loss_B = _where_taught(candidates, _m3_kd_loss(s_BG, o_B, candidates.teacher_BG, present_BG), loss_B)
    if settings.bidirectional:
        assert candidates.q_CD is not None and masked.reverse is not None
        y_BD = p_PD[candidates.own_BG[:, 0]] * scale
        c_CD = _truncate(candidates.q_CD, width, settings.normalize)
        reverse_o_B, _ = linear_logsumexp(y_BD, c_CD, masked.reverse, limit_B, narrow=settings.narrow)
        reverse_B = torch.logaddexp(reverse_o_B, s_BG[:, 0]) - s_BG[:, 0]
        loss_B = torch.where(own_only_B, loss_B, (loss_B + reverse_B) / 2)
    if settings.distillation in ("kl_div", "margin_mse"):
        more_B = _teacher_loss(settings.distillation, s_BG, scale, candidates.teacher_BG, present_BG)
        loss_B = loss_B + _where_taught(candidates, more_B, torch.zeros_like(more_B))
    negatives = masked.others_B.sum() + present_BG[:, 1:].sum() - masked.by_content - by_margin
    return LossParts(loss_B.mean(), negatives, masked.by_content, by_margin, scale)


def _where_taught(candidates: Candidates, taught_B: torch.Tensor, others_B: torch.Tensor) -> torch.Tensor:
    return taught_B if candidates.taught_B is None else torch.where(candidates.taught_B, taught_B, others_B)


def _teacher_loss(
    kind: str, s_BG: torch.Tensor, scale: torch.Tensor | float, teacher_BG: torch.Tensor | None, present_BG: torch.Tensor
) -> torch.Tensor:
    """What kl_div and margin_mse add to InfoNCE, for each query; of passages that its group has."""
    assert teacher_BG is not None
    if kind == "kl_div":
        return -(_weights(teacher_BG, present_BG) * s_BG.masked_fill(~present_BG, _ABSENT).log_softmax(1)).sum(1)
    margins_BG = (s_BG[:, :1] - s_BG[:, 1:]) / scale - (teacher_BG[:, :1] - teacher_BG[:, 1:])
    others_BG = present_BG[:, 1:]
    return margins_BG.masked_fill(~others_BG, 0.0).square().sum(1) / others_BG.sum(1).clamp_min(1)


def _m3_kd_loss(
    s_BG: torch.Tensor, o_B: torch.Tensor, teacher_BG: torch.Tensor | None, present_BG: torch.Tensor
) -> torch.Tensor:
    """Every passage of the group is the target with the teacher's weight, without those before it."""
    assert teacher_BG is not None
    s_BG = s_BG.masked_fill(~present_BG, _ABSENT)
    from_here_BG = s_BG.flip(1).logcumsumexp(1).flip(1)
    return (_weights(teacher_BG, present_BG) * (torch.logaddexp(o_B[:, None], from_here_BG) - s_BG)).sum(1)


def _weights(teacher_BG: torch.Tensor, present_BG: torch.Tensor) -> torch.Tensor:
    """The teacher's softmax over the passages that a group has."""
    return teacher_BG.masked_fill(~present_BG, float("-inf")).softmax(1)


class Temperature(torch.nn.Module):
    """Learnable temperature: `forward()` returns 1 / temperature, 0-dim fp32, clamped to temperatures from 0.001 to 1.

    The logarithm is the parameter, as in CLIP (arXiv:2103.00020), so an update changes the temperature by a factor. It is a
    module of its own so that ZeRO-3 gathers the parameter when it is called.
    """

    no_weight_decay = True

    def __init__(self, temperature: float):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor([-math.log(temperature)]))

    def forward(self) -> torch.Tensor:
        return self.log_scale.float().clamp(0.0, math.log(1000)).exp()[0]
