"""The benchmark of two checkouts: each side's own code runs, sides take turns, a turn's two runs make its ratio."""

from __future__ import annotations

import csv
import json
import shutil
import sys

import pytest
from helpers import REPO


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import checkouts

    yield checkouts
    for name in ("checkouts", "comparing", "rows", "sides"):
        sys.modules.pop(name, None)


def test_sides_take_turns_and_rows_hold_the_median_ratio(driver, tmp_path, monkeypatch):
    """Were one side always first, a machine that warms up would make it look slow."""
    (tmp_path / "groups.jsonl").write_text(json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]}) + "\n")
    order, times = [], iter([10.0, 11.0, 24.0, 20.0, 10.0, 10.0] * 4)

    def measure(kind, checkout, *_):
        order.append((kind, checkout.name))
        return next(times)

    monkeypatch.setattr(driver, "step", measure)
    making = [0.0, 0.0]  # the shards that both sides train on are made once, before anything is timed
    monkeypatch.setattr(driver, "preprocess", lambda *asked: making.pop() if making else measure(*asked))
    monkeypatch.setattr(driver, "commit_of", lambda checkout: checkout.name)
    flags = ["--before", tmp_path / "old", "--after", tmp_path / "new", "--groups", tmp_path / "groups.jsonl"]
    flags += ["--model", tmp_path, "--work", tmp_path / "work", "--output", tmp_path / "out.csv", "--turns", 3]
    assert driver.main([str(word) for word in flags]) == 0
    assert [side for _, side in order[:6]] == ["old", "new", "new", "old", "old", "new"]
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    # The ratios of the three turns are 1.1, 1.2 (the second turn runs "after" first) and 1.0.
    assert [row["after_to_before"] for row in rows] == ["1.100"] * 4 and rows[0]["highest"] == "1.200"
    assert [row["what"] for row in rows] == [
        "finetune, a step", "pretrain, a step", "preprocess finetune", "preprocess pretrain",
    ]  # fmt: skip


def test_each_side_runs_its_own_code(driver, tmp_path):
    """The installed package, or the checkout of the benchmark, must not stand in for the one that is asked for."""
    package = tmp_path / "checkout" / "bge_ds"
    package.mkdir(parents=True)
    shutil.copy(REPO / "bge_ds" / "__init__.py", package)
    (package / "preprocess.py").write_text("import pathlib, sys\npathlib.Path(sys.argv[1]).write_text(__file__)\n")
    driver.run(tmp_path / "checkout", "bge_ds.preprocess", [str(tmp_path / "said")], tmp_path / "log", threads=1)
    assert (tmp_path / "said").read_text() == str(package / "preprocess.py")
