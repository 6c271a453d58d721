"""The estimate of the time left and the lines that are printed."""

from __future__ import annotations

import io

import pytest

from bge_ds.encoding import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_counts_tokens(clock):
    """A block's longest texts come first: 10 of 100 texts that are half of its tokens mean that as much time is left."""
    told = progress.Progress(100, stream=io.StringIO())
    told.tokenized(100, 2000)
    clock[0] += 20
    told.encoded(10, 1000)
    assert told.rates() == "0.5 texts/s, 50 tokens/s, 20 s left"
    resumed = progress.Progress(300, done=100, stream=io.StringIO())
    resumed.tokenized(100, 1000)
    clock[0] += 1000
    resumed.encoded(100, 1000)
    assert resumed.rates() == "0.1 texts/s, 1 tokens/s, 17 min left"  # the other 100 texts are taken to be as long
    clock[0] += 1000
    resumed.encoded(100, 1000)
    assert "left" not in resumed.rates()


def test_a_line_now_and_then(clock):
    """Where there is no terminal, a line every half minute and one at the end; nothing of ranks that are not to speak."""
    out, silent = io.StringIO(), io.StringIO()
    told, other = progress.Progress(10, 2, "rank 0 of 2: ", stream=out), progress.Progress(10, shows=False, stream=silent)
    for _ in range(8):
        clock[0] += 10
        told.encoded(1, 5)
        other.encoded(1, 5)
    told.close()
    other.close()
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"rank 0 of 2: {n} of 10 texts" for n in (5, 8, 10)]
    assert silent.getvalue() == ""


def test_a_bar_on_a_terminal(clock):
    """A terminal gets a bar with the rates."""
    out = io.StringIO()
    out.isatty = lambda: True
    told = progress.Progress(10, stream=out)
    told.tokenized(10, 50)
    clock[0] += 1
    told.encoded(10, 50)
    told.close()
    assert "100%" in out.getvalue() and "10/10 texts, 10 texts/s, 50 tokens/s" in out.getvalue()
