"""Each loss over a group's scores is what its formula says, and what the group alone decides."""

from __future__ import annotations

import math

import pytest
import torch

from bge_ds.losses.reranking import DISTILLATIONS, RerankingSettings, loss

SCORES = torch.tensor([[1.5, -0.5, 0.25], [0.0, 2.0, -1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 0.5, 1.0], [1.0, 1.0, -3.0]], dtype=torch.float64)


def per_group(settings: RerankingSettings) -> list[float]:
    return [loss(SCORES[b : b + 1], settings, TEACHER[b : b + 1]).item() for b in range(2)]


def test_losses_by_hand():
    """Numbers worked out with plain arithmetic."""
    total = [math.log(sum(math.exp(x) for x in row)) for row in SCORES.tolist()]
    first, others = SCORES[:, 0].tolist(), SCORES.mean(1).tolist()
    assert per_group(RerankingSettings()) == pytest.approx([t - s for t, s in zip(total, first, strict=True)])
    smooth = [t - 0.8 * s - 0.2 * m for t, s, m in zip(total, first, others, strict=True)]
    assert per_group(RerankingSettings(label_smoothing=0.2)) == pytest.approx(smooth)
    apart = [(math.log1p(math.exp(-row[0])) + sum(math.log1p(math.exp(x)) for x in row[1:])) / 3 for row in SCORES.tolist()]
    assert per_group(RerankingSettings("binary_cross_entropy")) == pytest.approx(apart)
    margins = [((2.0 - 1.5) ** 2 + (1.25 - 1.0) ** 2) / 2, ((-2.0 - 0.0) ** 2 + (1.0 - 4.0) ** 2) / 2]
    assert per_group(RerankingSettings("none", "margin_mse")) == pytest.approx(margins)
    pairs = [[(0, 1), (0, 2), (2, 1)], [(0, 2), (1, 2)]]  # a tie is no order
    ordered = [
        sum(math.log1p(math.exp(row[j] - row[i])) for i, j in of) / len(of)
        for row, of in zip(SCORES.tolist(), pairs, strict=True)
    ]
    assert per_group(RerankingSettings("none", "ranknet")) == pytest.approx(ordered)


@pytest.mark.parametrize("kind", DISTILLATIONS)
def test_a_perfect_student_learns_nothing_more_and_groups_stay_apart(kind):
    """With the teacher's scores the gradient of kl_div and margin_mse is zero; the mean over groups is that of each alone."""
    scores = TEACHER.clone().requires_grad_()
    loss(scores, RerankingSettings("none", kind), TEACHER).backward()
    assert (scores.grad.abs().max() < 1e-12) == (kind != "ranknet")
    for settings in (RerankingSettings("none", kind), RerankingSettings("cross_entropy", kind)):
        assert loss(SCORES, settings, TEACHER).item() == pytest.approx(sum(per_group(settings)) / 2)
    tied = torch.zeros(1, 3, dtype=torch.float64)
    assert loss(SCORES[:1], RerankingSettings("none", "ranknet"), tied).item() == 0
