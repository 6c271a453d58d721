"""The score command with several ranks, kills and damage."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import helpers
import pytest
from score_runs import BLOCK, flags, make_teacher, scored, start, write_groups

from bge_ds.scoring import run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "BLOCK", BLOCK)
    monkeypatch.setenv("BGE_DS_CACHE", str(tmp_path / "cache"))


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*out.jsonl.gz*")}


def test_any_number_of_ranks_writes_the_same_bytes(tmp_path, teacher):
    """Output and report of 1, 2 and 3 ranks are alike, and nothing else is left."""
    source, found = write_groups(tmp_path / "groups.jsonl"), []
    for ranks in (1, 2, 3):
        (tmp_path / f"{ranks}").mkdir()
        words = flags(teacher, source, tmp_path / f"{ranks}/out.jsonl.gz", "--max_neg_score", 0)
        printed = helpers.run_ranks("score_command", ranks, BLOCK, -1, *words)
        assert printed.count("wrote ") >= 1
        found.append(written(tmp_path / f"{ranks}"))
        assert len(list((tmp_path / f"{ranks}").iterdir())) == 2
    assert found[0] == found[1] == found[2] and set(found[0]) == {"out.jsonl.gz", "out.jsonl.gz.report.json"}


def test_killed_before_every_file(tmp_path, teacher):
    """Killed before the job, any block, the output or the report takes its place, or while parts are removed: the second start
    ends in the bytes of an undisturbed run, and does not score finished blocks again."""
    words = flags(teacher, write_groups(tmp_path / "groups.jsonl"), tmp_path / "out.jsonl.gz")
    undisturbed = start(tmp_path, -1, *words)
    assert undisturbed.returncode == 0, undisturbed.stdout
    files = int(undisturbed.stdout.split()[-1])
    assert files == 6  # the job, three blocks, output, report
    wanted = written(tmp_path)
    for moment in [*range(files), "clean"]:
        for path in tmp_path.glob("*out.jsonl.gz*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert start(tmp_path, moment, *words).returncode == -signal.SIGKILL
        again = start(tmp_path, -1, *words)
        assert again.returncode == 0, again.stdout
        assert written(tmp_path) == wanted, moment
        left = {0: 6, 1: 5, 2: 4, 3: 3, 4: 2, 5: 2, "clean": 0}[moment]
        assert int(again.stdout.split()[-1]) == left, moment
        assert ("going on: " in again.stdout) == (moment in (2, 3, 4, 5)) and ("nothing to do" in again.stdout) == (
            moment == "clean"
        )
        assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob(".*.lock"))


def test_damage_is_scored_again(tmp_path, capsys, teacher):
    """A block of a killed run or a finished output that is not as it was written is made anew."""
    source, out = write_groups(tmp_path / "groups.jsonl"), tmp_path / "out.jsonl.gz"
    words = flags(teacher, source, out)
    scored(teacher, source, out)
    wanted = written(tmp_path)
    out.write_bytes(out.read_bytes()[:-1])
    scored(teacher, source, out)
    assert written(tmp_path) == wanted
    out.unlink()
    assert start(tmp_path, 3, *words).returncode == -signal.SIGKILL  # two blocks are finished
    block = tmp_path / "out.jsonl.gz.parts/000001.jsonl"
    block.write_bytes(block.read_bytes()[:-2] + b"0\n")
    again = start(tmp_path, -1, *words)
    assert again.returncode == 0 and "going on: 1 of 3 blocks" in again.stdout
    assert written(tmp_path) == wanted


def test_a_rank_that_comes_late_finds_all_done(tmp_path, teacher):
    """A rank without a block of its own, which starts after the others have finished, ends well."""
    words = flags(teacher, write_groups(tmp_path / "groups.jsonl"), tmp_path / "out.jsonl.gz")
    for rank in ("0", "1", "2", "3"):
        done = start(tmp_path, -1, *words, RANK=rank, WORLD_SIZE="4")
        assert done.returncode == 0, done.stdout
        assert ("wrote" in done.stdout) == (rank in ("2", "3"))
