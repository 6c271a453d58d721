"""A process that was killed while it compiled keeps nobody waiting; one that still compiles is waited for."""

from __future__ import annotations

import itertools
import subprocess
import time

import helpers
import pytest
from torch.utils.file_baton import FileBaton

from bge_ds.deepspeed_engine import op_builds


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file by which torch marks the extension that is being compiled."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam" / "lock"


def test_the_mark_of_a_killed_process_goes_that_of_a_living_one_stays(mark, caplog):
    with subprocess.Popen(helpers.program("locks", "mark", mark), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with op_builds.turn("cpu_adam"):
            assert mark.exists()
        assert not caplog.text
        process.kill()
    assert mark.exists()
    with op_builds.turn("cpu_adam"):
        assert FileBaton(str(mark)).try_acquire()  # torch compiles, and waits for nobody
    assert f"{mark} was left by a process that died" in caplog.text


def test_ranks_take_turns(mark):
    """Each of three processes is alone in there: none can take another's mark for one left behind."""
    processes = [subprocess.Popen(helpers.program("locks", "turn"), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    began = time.monotonic()
    spans = sorted(tuple(float(word) for word in p.communicate(timeout=120)[0].split()[1::2]) for p in processes)
    assert all(began < enter < leave for enter, leave in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), spans


def test_nothing_is_written_where_nothing_can_be_compiled(mark, monkeypatch):
    monkeypatch.setattr(op_builds.os, "access", lambda path, mode: False)
    with op_builds.turn("cpu_adam"):
        assert not any(mark.parent.iterdir())
