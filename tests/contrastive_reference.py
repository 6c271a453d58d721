"""The contrastive objectives written out query by query and column by column, slowly: what the tests compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference_loss(q_BD, p_PD, own, hashes, known, scale, objective, *, teacher=None, own_only=(), sees=None):
    """(mean loss over the queries, negatives, pairs hidden by content, by margin).

    own: columns of each query's group, positive first. hashes: of each passage. known: set of hashes of each query's
    positives. teacher: scores of each query's group, or None for a query without. own_only: queries that see their own group
    only. sees: columns each query may see (default: all).
    """
    losses, counts = [], [0, 0, 0]
    dims = objective.dims or (q_BD.shape[1],)
    for b in range(len(q_BD)):
        per_width = [_one(b, d, q_BD, p_PD, own, hashes, known, scale, objective, teacher, own_only, sees) for d in dims]
        losses.append(torch.stack([value for value, _ in per_width]).mean())
        counts = [a + n for a, n in zip(counts, per_width[dims.index(max(dims))][1], strict=True)]
    return torch.stack(losses).mean(), *counts


def _narrow(x, width, objective):
    if width == x.shape[-1]:
        return x
    return F.normalize(x[..., :width], dim=-1) if objective.normalize else x[..., :width]


def _one(b, width, q_BD, p_PD, own, hashes, known, scale, objective, teacher, own_only, sees):
    q_BD, p_PD = _narrow(q_BD, width, objective), _narrow(p_PD, width, objective)
    alone = b in own_only
    similarity = p_PD @ q_BD[b]
    positive, group = own[b][0], own[b]
    given = None if teacher is None or teacher[b] is None else teacher[b][: len(group)]
    distillation = None if given is None else objective.distillation
    columns = set(group)
    if objective.in_batch and not alone:
        columns |= set(range(len(p_PD))) if sees is None else sees[b]
    limit = float("inf")
    if objective.margin is not None:
        reach = similarity[positive].abs() if objective.relative else 1.0
        limit = float((similarity[positive] + objective.margin * reach).detach())
    by_content = {c for c in columns - {positive} if objective.mask_false_negatives and hashes[c] in known[b]}
    by_margin = {c for c in columns - by_content - {positive} if float(similarity[c].detach()) > limit}
    kept = columns - by_content - by_margin - {positive}
    s = similarity * scale
    if distillation == "m3_kd_loss":
        weights = torch.softmax(given, 0)
        outside = sorted(kept - set(group))
        value = 0
        for i, c in enumerate(group):
            terms = s[[*group[i:], *outside]]
            value = value + weights[i] * (torch.logsumexp(terms, 0) - s[c])
    else:
        value = torch.logsumexp(s[[positive, *sorted(kept)]], 0) - s[positive]
    if objective.bidirectional and not alone:
        others = [
            c for c in range(len(q_BD))
            if c != b and not (objective.mask_false_negatives and hashes[positive] in known[c])
            and (sees is None or positive in sees[c])
        ]  # fmt: skip
        back = q_BD @ p_PD[positive]
        others = [c for c in others if float(back[c].detach()) <= limit]
        value = (value + torch.logsumexp(back[[b, *others]] * scale, 0) - back[b] * scale) / 2
    if distillation == "kl_div":
        value = value - (torch.softmax(given, 0) * torch.log_softmax(s[group], 0)).sum()
    if distillation == "margin_mse":
        student = similarity[positive] - similarity[group[1:]]
        value = value + ((student - (given[0] - given[1:])).square().mean() if len(group) > 1 else 0)
    return value, (len(kept), len(by_content), len(by_margin))
