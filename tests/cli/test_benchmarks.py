"""The benchmark driver: what makes its comparisons fair, and its rows. No peer is run here."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import pytest
from helpers import REPO, SENTENCES


@pytest.fixture
def driver(monkeypatch):
    """The modules as the script sees them, with its own folder first on the path."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import contrastive
    import rows
    import sides

    yield contrastive, rows, sides
    for name in ("contrastive", "rows", "sides"):
        sys.modules.pop(name, None)


def write_source(path, negatives: list[int]) -> None:
    """Groups of which no two have the same number of tokens, so that another order would show in the tokens of a step."""
    words = SENTENCES[0].split()
    groups = [{"query": " ".join(words[: i + 1]), "pos": ["first", "second"], "neg": [f"n{i}{j}" for j in range(n)]}
              for i, n in enumerate(negatives)]  # fmt: skip
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))


def test_data_leaves_nothing_to_draw(driver, tmp_path):
    """Every side must compute the same texts: one positive, exactly the negatives a group takes; too few groups is an error."""
    _, _, sides = driver
    write_source(tmp_path / "in.jsonl", [3, 1, 2, 5])
    sides.write_groups(tmp_path / "in.jsonl", tmp_path / "out.jsonl", groups=3, negatives=2)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [group["pos"] for group in found] == [["first"]] * 3
    assert [group["neg"] for group in found] == [["n00", "n01"], ["n20", "n21"], ["n30", "n31"]]
    with pytest.raises(ValueError, match=r"3 groups have 2 negatives or more, 4 are needed"):
        sides.write_groups(tmp_path / "in.jsonl", tmp_path / "out.jsonl", groups=4, negatives=2)


def test_sides_with_other_tokens_are_refused(driver):
    """A speed ratio between sides that computed different texts would be meaningless; a failed side is marked, not compared."""
    contrastive, _, sides = driver
    setting = sides.Setting("x", batch=2, group=2, steps=2, warmup=1)

    def side(tokens):
        record = {"seconds": [9.0, 2.0], "tokens": [7, tokens], "padded": [7, 200], "peak_bytes": 1, "versions": {}}
        return lambda setting, run: record

    def broken(setting, run):
        raise sides.SideFailed("no such environment")

    results = contrastive.compare(setting, None, {"bge_ds": side(100), "a": side(100), "b": broken}, repeats=2)
    assert [result.seconds for result in results] == [[2.0, 2.0], [2.0, 2.0], []]
    assert [result.note for result in results] == ["", "", "failed"]
    with pytest.raises(ValueError, match="not the same texts"):
        contrastive.compare(setting, None, {"bge_ds": side(100), "a": side(101)}, repeats=1)


def test_rows_say_how_ours_compares(driver, tmp_path):
    """A peer's row holds ours by theirs: speed as a multiple, memory as a share; a second run appends to the same file."""
    _, rows, sides = driver
    setting = sides.Setting("x", batch=2, group=2, steps=2, warmup=1)
    ours = sides.Result("bge_ds", [1.0, 2.0, 1.0], [100] * 3, [100] * 3, 2**30, {"torch": "1"})
    peer = sides.Result("peer", [4.0, 4.0, 5.0], [100] * 3, [200] * 3, 4 * 2**30)
    made = rows.rows_of(setting, [ours, peer, sides.Result("part", figure=0.12345)], "here")
    for _ in range(2):
        rows.append_rows(tmp_path / "rows.csv", made)
    with (tmp_path / "rows.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 6 and tuple(found[0]) == rows.COLUMNS
    assert (found[0]["tokens_per_second"], found[0]["lowest"], found[0]["ours_times_as_fast"]) == ("100", "50", "")
    assert (found[1]["ours_times_as_fast"], found[1]["ours_share_of_memory"]) == ("4.00", "0.25")
    assert (found[1]["peak_MiB"], found[1]["padding"]) == ("4096", "0.50")
    assert (found[2]["figure"], found[2]["tokens_per_second"]) == ("0.123", "")


def test_own_side_reads_the_commands_figures(driver, tmp_path, tiny_bert_path):
    """Our side is the real command, and the parts measured apart are of exactly its batches: the same tokens step by step."""
    contrastive, _, sides = driver
    write_source(tmp_path / "in.jsonl", [2] * 9)
    sides.write_groups(tmp_path / "in.jsonl", tmp_path / "groups.jsonl", groups=9, negatives=2)
    run = sides.Run(envs=tmp_path, work=tmp_path / "work", threads=1)
    setting = sides.Setting(
        "x", batch=3, group=3, steps=3, warmup=1, model=str(tiny_bert_path), data=str(tmp_path / "groups.jsonl"),
        query_max_len=16, passage_max_len=16,
    )  # fmt: skip
    ours, share, products, used = contrastive.step_parts(setting, run, repeats=1)
    assert len(ours.seconds) == 2 and min(ours.seconds) > 0 and ours.peak_bytes > 2**20
    assert share.figure > 0 and products.figure > 1 and 0 < used.figure < 1
    with pytest.raises(sides.SideFailed, match="make_environments"):
        sides.flagembedding(replace(setting, what="y"), run)
