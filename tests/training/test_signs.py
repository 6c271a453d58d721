"""What a run's log shows when it does not learn is said once, after the warm-up, with its remedy; else nothing is."""

from __future__ import annotations

import math
import re

import helpers
import pytest
import torch
import torch.nn.functional as F

from bge_ds.data.diagnosis import PAGE
from bge_ds.losses.gather import mean_cosine
from bge_ds.training.diagnosis import CLIPPED, IN_A_ROW, Signs

CHANCE = math.log(32)
HEALTHY = {"loss": 1.0, "passage_cosine": 0.4, "grad_norm": 0.8}


def said(records: list[dict], warmup: int = 0, max_norm: float = 1.0) -> list[str]:
    signs = Signs(warmup, max_norm)
    return [line for step, record in enumerate(records, 1) for line in signs.read({"step": step, **record}, CHANCE)]


@pytest.mark.parametrize(("sign", "value", "records"), [
    ("loss", 0.98 * CHANCE, IN_A_ROW), ("passage_cosine", 0.99, IN_A_ROW), ("grad_norm", 9.0, CLIPPED),
])  # fmt: skip
def test_each_sign_is_said_once_after_the_warm_up(sign, value, records):
    """Said too early it is noise, as every run begins so; said again and again it hides the log."""
    bad = HEALTHY | {sign: value}
    assert said([bad] * (records - 1)) == [] and len(said([bad] * 4 * records)) == 1
    assert said([bad] * 4 * records, warmup=4 * records) == []
    assert len(said([bad] * 4 * records, warmup=2 * records)) == 1
    interrupted = ([bad] * (records - 1) + [HEALTHY]) * 4
    assert said(interrupted) == []


def test_a_healthy_run_hears_nothing():
    """Nor one without a limit of norms, one that is clipped a little at every step, or one whose norm is unknown."""
    assert said([HEALTHY] * 100) == [] and said([HEALTHY | {"grad_norm": 9.0}] * 100, max_norm=0.0) == []
    assert said([HEALTHY | {"grad_norm": 2.0}] * 100) == [] and said([HEALTHY | {"grad_norm": None}] * 100) == []


def test_the_mean_cosine_is_that_of_all_pairs():
    x_PD = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    cosines_PP = F.cosine_similarity(x_PD[:, None], x_PD[None], dim=-1)
    wanted = cosines_PP[~torch.eye(7, dtype=torch.bool)].mean()
    assert mean_cosine(x_PD).item() == pytest.approx(wanted.item(), abs=1e-6)
    assert mean_cosine(x_PD[:1]).item() == pytest.approx(0, abs=1e-6)


def test_every_warning_leads_to_its_place_in_the_docs():
    """A link to nothing is worse than none."""
    page = (helpers.REPO / PAGE).read_text(encoding="utf-8")
    places = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.+)$", page, re.M)}
    sources = [
        helpers.REPO / "bge_ds" / name for name in ("data/diagnosis.py", "objectives/diagnosis.py", "training/diagnosis.py")
    ]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    linked = set(re.findall(r"PAGE\}#([\w-]+)", text)) | set(re.findall(r'_say\([^()]*(?:\([^()]*\)[^()]*)*"([\w-]+)"\)', text))
    assert len(linked) >= 14 and linked <= places, linked - places
