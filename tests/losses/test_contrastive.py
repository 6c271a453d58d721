"""Every objective against its formula, written out query by query in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contrastive_reference import reference_loss

from bge_ds.kernels import linear_logsumexp as logsumexp_module
from bge_ds.losses import contrastive
from bge_ds.losses.contrastive import Candidates, ContrastiveSettings, Temperature

pytestmark = pytest.mark.core

OBJECTIVES = {
    "plain": ContrastiveSettings(),
    "unmasked": ContrastiveSettings(mask_false_negatives=False),
    "own group": ContrastiveSettings(in_batch=False),
    "bidirectional": ContrastiveSettings(bidirectional=True),
    "margin": ContrastiveSettings(margin=-0.05),
    "relative margin": ContrastiveSettings(margin=-0.2, relative=True),
    "margin, own group": ContrastiveSettings(margin=-0.05, in_batch=False),
    "kl_div": ContrastiveSettings(distillation="kl_div"),
    "m3": ContrastiveSettings(distillation="m3_kd_loss"),
    "m3, own group": ContrastiveSettings(distillation="m3_kd_loss", in_batch=False),
    "margin_mse": ContrastiveSettings(distillation="margin_mse"),
    "mrl": ContrastiveSettings(dims=(3, 6, 8)),
    "mrl, not normalised": ContrastiveSettings(dims=(3, 8), normalize=False),
    "all together": ContrastiveSettings(bidirectional=True, margin=0.02, distillation="kl_div", dims=(4, 8)),
    "m3, all together": ContrastiveSettings(bidirectional=True, margin=0.02, distillation="m3_kd_loss", dims=(4, 8)),
}


def problem(queries=5, group=3, width=8, short=False, seed=0):
    """Vectors and Candidates; passage 4 repeats query 0's positive, passage 2 is listed by query 2, group 3 may be short."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [group] * queries
    if short:
        sizes[-1] = 1
    total = sum(sizes)
    q, p = (F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=-1) for n in (queries, total))
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1].tolist()
    own_BG = torch.tensor([[s + g if g < n else -1 for g in range(group)] for s, n in zip(starts, sizes, strict=True)])
    hashes = torch.arange(100, 100 + total)
    known = [(int(hashes[s]), b) for b, s in enumerate(starts)]
    if queries > 2:
        hashes[4] = hashes[0]  # query 1's own negative is query 0's positive
        known.append((int(hashes[2]), 2))  # and query 0's second negative is a positive of query 2
        known.append((int(hashes[starts[2] + 1]), 2))  # query 2's own first negative is one of its positives
        known.append((int(hashes[starts[2]]), 4))  # queries 2 and 4 share a positive
    found = Candidates(
        p_PD=p.requires_grad_(),
        hashes_P=hashes,
        own_BG=own_BG,
        known_BK=listed(known, queries),
        own_only_B=torch.zeros(queries, dtype=torch.bool),
        teacher_BG=torch.randn(queries, group, generator=generator, dtype=torch.float64),
    )
    q.requires_grad_()
    found.q_CD, found.mine_B = q, torch.arange(queries)
    found.all_known_CK = found.known_BK
    return q, found


def listed(known, queries):
    """B x K: each query's hashes, the first repeated where it has fewer."""
    rows = [[h for h, b in known if b == query] for query in range(queries)]
    longest = max(map(len, rows))
    return torch.tensor([row + row[:1] * (longest - len(row)) for row in rows])


def taught(found):
    return [None if found.taught_B is not None and not found.taught_B[b] else row for b, row in enumerate(found.teacher_BG)]


def both(q, found, scale, objective):
    own = [[c for c in row if c >= 0] for row in found.own_BG.tolist()]
    known = [set(row) for row in found.known_BK.tolist()]
    expected = reference_loss(
        q, found.p_PD, own, found.hashes_P.tolist(), known, scale, objective,
        teacher=taught(found), own_only=set(found.own_only_B.nonzero().squeeze(-1).tolist()),
    )  # fmt: skip
    return contrastive.loss(q, scale, found, objective), expected


@pytest.mark.parametrize("block", [1, 20, 1 << 24])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_its_formula(monkeypatch, name, block):
    """Loss, gradients of queries, passages and temperature, and the counts; with queries that see their own group only."""
    monkeypatch.setattr(logsumexp_module, "_BLOCK_ELEMENTS", block)
    q, found = problem()
    found.own_only_B[1] = True
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    ours, (expected, *counts) = both(q, found, scale, OBJECTIVES[name])
    assert ours.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert [int(ours.negatives), int(ours.by_content), int(ours.by_margin)] == counts
    leaves = (q, found.p_PD, scale)
    mine = torch.autograd.grad(ours.loss, leaves)
    for a, b in zip(mine, torch.autograd.grad(expected, leaves), strict=True):
        assert (a - b).abs().max() < 1e-12
    if "margin" in name and "mse" not in name:
        assert counts[2] > 0, "no pair is beyond the margin: the case proves nothing"
    if OBJECTIVES[name].mask_false_negatives:
        assert counts[1] > 0, "no false negative: the case proves nothing"


@pytest.mark.parametrize(
    ("queries", "group", "short"), [(1, 4, False), (2, 1, False), (7, 2, False), (2, 3, True), (7, 2, True)]
)
def test_odd_shapes(queries, group, short):
    """One query, groups of one, and a group without negatives beside whole ones."""
    q, found = problem(queries, group, short=short)
    for objective in (ContrastiveSettings(), ContrastiveSettings(bidirectional=True), ContrastiveSettings(margin=0.0)):
        ours, (expected, *counts) = both(q, found, 4.0, objective)
        assert ours.loss.item() == pytest.approx(expected.item(), rel=1e-12)
        assert [int(ours.negatives), int(ours.by_content), int(ours.by_margin)] == counts
        for a, b in zip(*(torch.autograd.grad(x, (q, found.p_PD)) for x in (ours.loss, expected)), strict=True):
            assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("kind", contrastive.DISTILLATIONS)
@pytest.mark.parametrize("short", [False, True])
def test_queries_without_a_teacher_have_the_plain_loss(kind, short):
    """Beside others, in any order: distilled ones by what is in their group, the others by contrast, gradients without NaN."""
    q, found = problem(5, 3, short=short)
    found.taught_B = torch.tensor([True, False, True, False, True])
    found.own_only_B[0] = found.own_only_B[1] = True
    found.teacher_BG = found.teacher_BG * found.taught_B[:, None]
    for objective in (ContrastiveSettings(distillation=kind), ContrastiveSettings(distillation=kind, bidirectional=True)):
        ours, (expected, *_) = both(q, found, 5.0, objective)
        assert ours.loss.item() == pytest.approx(expected.item(), rel=1e-12)
        for a, b in zip(*(torch.autograd.grad(x, (q, found.p_PD)) for x in (ours.loss, expected)), strict=True):
            assert (a - b).abs().max() < 1e-12
    alone, found.taught_B = found.taught_B, torch.zeros(5, dtype=torch.bool)
    plain = contrastive.loss(q, 5.0, found, ContrastiveSettings()).loss
    assert contrastive.loss(q, 5.0, found, ContrastiveSettings(distillation=kind)).loss == plain
    found.taught_B = alone
    assert contrastive.loss(q, 5.0, found, ContrastiveSettings(distillation=kind)).loss != plain


def test_duplicate_passages():
    """All passages alike in content: every query is left with its positive alone, the loss is 0 and nothing is NaN."""
    q, found = problem(4, 2)
    found.hashes_P = torch.full((8,), 7)
    found.known_BK = found.all_known_CK = torch.full((4, 1), 7)
    for objective in (ContrastiveSettings(), ContrastiveSettings(bidirectional=True)):
        parts = contrastive.loss(q, 5.0, found, objective)
        gradients = torch.autograd.grad(parts.loss, (q, found.p_PD))
        assert parts.loss.item() == pytest.approx(0.0, abs=1e-12)
        assert int(parts.negatives) == 0 and int(parts.by_content) == 4 * 7
        assert all(g.isfinite().all() and not g.any() for g in gradients)


def test_extra_columns_are_negatives():
    """Passages beyond the groups (a memory of negatives, say) take part like any other."""
    q, found = problem()
    extra = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64), dim=-1)
    found.p_PD = torch.cat([found.p_PD, extra])
    found.hashes_P = torch.cat([found.hashes_P, torch.arange(500, 506)])
    ours, (expected, *_) = both(q, found, 5.0, ContrastiveSettings())
    assert ours.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_temperature_is_trained_on_its_logarithm():
    """forward() is 1 / temperature; a step changes the temperature by a share of itself."""
    temperature = Temperature(0.02)
    assert temperature().item() == pytest.approx(50.0)
    temperature().backward()
    assert temperature.log_scale.grad.item() == pytest.approx(50.0)
