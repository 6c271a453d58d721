"""The supervisor restarts what failed, from its last checkpoint, so often and no more, and leaves nothing running."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import helpers
import pytest

SUPERVISE = helpers.REPO / "launch/supervise.sh"


def environment(**variables: str) -> dict[str, str]:
    found = helpers.environment(**{"RESTART_DELAY": "0", **variables})
    return {name: value for name, value in found.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def supervise(folder: Path, *command: object, seconds: float = 100, **variables: str) -> tuple[int, str]:
    """(exit status, what was printed) of a supervised command."""
    with open(folder / "said", "w+") as log:  # a file: what is left of a command would keep a pipe open
        done = subprocess.run(
            [SUPERVISE, *map(str, command)], cwd=folder, env=environment(**variables), timeout=seconds,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    return done.returncode, (folder / "said").read_text()


def script(folder: Path, text: str) -> Path:
    path = folder / "command.sh"
    path.write_text('#!/usr/bin/env bash\necho run >> runs\necho "$@" >> flags\n' + text)
    path.chmod(0o755)
    return path


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


@pytest.mark.parametrize("status", [0, 2, 75, 77])
def test_what_is_not_started_again(tmp_path, status):
    """Done, the user's mistake, stopped by a signal, diverged: one run, whose status is the supervisor's."""
    assert supervise(tmp_path, script(tmp_path, f"exit {status}"))[0] == status
    assert runs(tmp_path) == 1


def test_restarts_are_bounded(tmp_path):
    """A command that always fails is started MAX_RESTARTS times again, and its status is kept."""
    status, said = supervise(tmp_path, script(tmp_path, "exit 76"), MAX_RESTARTS="2")
    assert status == 76 and runs(tmp_path) == 3, said
    assert "restart 1 of 2" in said and "giving up" in said


def test_progress_starts_the_count_anew(tmp_path):
    """A run that fails time and again but gets on each time is worth starting again; half a checkpoint is no progress."""
    text = """
    n=$(wc -l < runs)
    mkdir -p out/checkpoint-$n
    if [ $n -le 4 ]; then touch out/checkpoint-$n/state.json; fi
    exit 1
    """
    status, said = supervise(tmp_path, script(tmp_path, text), "--output_dir", "out", MAX_RESTARTS="1")
    assert status == 1 and runs(tmp_path) == 5, said
    assert (tmp_path / "flags").read_text().splitlines() == ["--output_dir out --resume_from_checkpoint auto"] * 5


@pytest.mark.parametrize("flags", [["--resume_from_checkpoint", "x/checkpoint-3", "--output_dir=o"], ["settings.json"]])
def test_flags_that_stay_as_they_are(tmp_path, flags):
    """A checkpoint that the user names stays; nothing is added to the one file that holds all settings."""
    supervise(tmp_path, script(tmp_path, "exit 0"), *flags)
    assert (tmp_path / "flags").read_text() == " ".join(flags) + "\n"


def test_nothing_of_a_failed_run_is_left(tmp_path):
    """A grandchild whose parents are gone, deaf to SIGTERM, ends before the next start and before the supervisor."""
    text = """
    (trap '' TERM; sleep 300 & echo $! >> sleepers; sleep 300) &
    while [ $(wc -l < sleepers) -lt $(wc -l < runs) ]; do sleep 0.1; done
    grep -s State: /proc/$(head -n 1 sleepers)/status >> states
    kill -9 $$
    """
    (tmp_path / "sleepers").touch()
    status, said = supervise(tmp_path, script(tmp_path, text), MAX_RESTARTS="1", seconds=200)
    assert status == 137 and runs(tmp_path) == 2, said
    states = (tmp_path / "states").read_text().splitlines()
    assert "sleeping" in states[0] and "sleeping" not in "".join(states[1:])  # a zombie, where nobody reaps orphans
    for pid in (tmp_path / "sleepers").read_text().split():
        file = Path("/proc", pid, "status")
        assert not file.exists() or "zombie" in file.read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signals_go_to_the_ranks_alone(tmp_path, name):
    """Not to their launcher, which would die of it, nor to their children; the command's own end decides the status."""
    rank = "trap 'echo got >> got; stop=1' TERM USR1; touch up-$RANK; while [ -z \"$stop\" ]; do sleep 0.1; done; exit 75"
    (tmp_path / "rank.sh").write_text("bash -c \"trap 'echo child >> got' TERM USR1; sleep 20 & wait\" & child=$!\n" + rank)
    text = "RANK=0 bash rank.sh & RANK=1 bash rank.sh & wait -n; status=$?; wait; exit $status"
    process = subprocess.Popen(
        [SUPERVISE, script(tmp_path, text)], cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL
    )  # fmt: skip
    try:
        while not all((tmp_path / f"up-{rank}").exists() for rank in (0, 1)):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(getattr(signal, name))
        assert process.wait(60) == 75
    finally:
        process.kill()
    assert runs(tmp_path) == 1
    assert (tmp_path / "got").read_text().splitlines()[:2] == ["got"] * 2
