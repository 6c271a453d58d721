"""Whatever ends one rank ends all of them in time, with the reason; a signal stops all ranks at one step."""

from __future__ import annotations

import ast
import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import helpers
import pytest
import ranks as runs

from bge_ds.health import exit_codes, rendezvous, watcher

# Ranks that step without talking to each other, so that nothing but the watch holds them together.
SCRIPT = """
import json, os, socket, sys, time
from bge_ds.health import failure_detector as watch, rendezvous
rank, mode, seconds = int(os.environ["RANK"]), sys.argv[1], float(sys.argv[2])
print("imported", flush=True)
if mode == "late" and rank == 1:
    time.sleep(600)
watch.join(float(sys.argv[3]))
print("joined", flush=True)
if mode == "startup":
    time.sleep(600)
if mode == "again":
    time.sleep(0 if rank else 2)
    watch.leave()
    watch.join(float(sys.argv[3]))
    print("joined again", flush=True)
    watch.leave()
    sys.exit()
if mode == "reused":
    kept, silent = watch.store(), socket.create_server(("", 0))
    if rank == 0:
        where = json.loads(kept.get(rendezvous.KEY))
        kept.set(rendezvous.KEY, json.dumps({**where, "port": silent.getsockname()[1]}))
    time.sleep(0 if rank == 0 else 1)
    watch.leave()
    time.sleep(4 if rank == 0 else 0)
    watch.join(float(sys.argv[3]))
    print("joined again", flush=True)
    watch.leave()
    sys.exit()
for step in range(1, 1000):
    if mode in ("mistake", "one-mistake") and (mode == "mistake" or rank == 1) and step == 3:
        watch.fail(2, "the data is wrong")
    time.sleep(seconds * (1 + rank))
    last = watch.last_step(step)
    print("step", step, flush=True)
    if last == step:
        print("stopped by", watch.stopper(), flush=True)
        time.sleep(1)  # as if it saved
        watch.leave(keep_ignoring=True)
        sys.exit(75)
watch.leave()
"""


def start(tmp_path, ranks: int, mode: str, step_s: float = 0.05, join_s: float = 30, **more):
    return runs.started(SCRIPT, ranks, tmp_path, mode, step_s, join_s, **more)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_at_once(tmp_path, victim):
    """Within seconds of a kill all others have ended as LOST, and one of them has named rank, host and pid."""
    with start(tmp_path, 3, "steps") as run:
        for rank in range(3):
            run.wait_for("step 2", rank)
        killed = time.monotonic()
        run.processes[victim].kill()
        found = run.statuses(20)
        assert time.monotonic() - killed < 20
        assert found == [-signal.SIGKILL if rank == victim else exit_codes.LOST for rank in range(3)], run.everything()
        named = f"error: rank {victim} (host {socket.gethostname()}, pid {run.processes[victim].pid}) ended without a word"
        logs = [run.log(rank) for rank in range(3) if rank != victim]
        assert [log.count(named) for log in logs].count(1) == 1 and "".join(logs).count("error:") == 1, run.everything()
        assert "--resume_from_checkpoint auto" in "".join(logs)


def test_a_silent_rank_ends_the_run(tmp_path):
    """A process that stands still, whose connection stays open, is lost after 30 s and named; the run ends within 60 s.

    Rank 0 is silent in one run and rank 1 in another, at the same time: each waits 30 s and does nothing else."""
    with contextlib.ExitStack() as running:
        runs = [running.enter_context(start(tmp_path / str(victim), 2, "steps", step_s=0.5)) for victim in (0, 1)]
        stopped = []
        for victim, run in enumerate(runs):
            run.wait_for("step 2", 1)
            os.kill(run.processes[victim].pid, signal.SIGSTOP)
            stopped.append(time.monotonic())
        for victim, run in enumerate(runs):
            assert run.processes[1 - victim].wait(60) == exit_codes.LOST
            assert time.monotonic() - stopped[victim] > watcher.SILENCE_S - watcher.BEAT_S - 1
            assert f"rank {victim} " in run.log(1 - victim) and "silent for 30 s" in run.log(1 - victim)
            # It finds itself alone as soon as it runs again.
            os.kill(run.processes[victim].pid, signal.SIGCONT)
            assert run.processes[victim].wait(20) == exit_codes.LOST, run.everything()


def test_ranks_that_never_come_are_named(tmp_path):
    """After --join_timeout rank 0 names those that have not joined, and all that wait end as LOST."""
    with start(tmp_path, 3, "steps", join_s=6, leave_out=(2,)) as run:
        assert run.statuses(60) == [exit_codes.LOST] * 2
        assert "rank 2 did not come after 6 s (--join_timeout)" in run.log(0), run.everything()


def test_a_rank_zero_that_never_comes_is_named_with_its_address(tmp_path):
    """Ranks that find nobody at MASTER_ADDR:MASTER_PORT say so and end as LOST; the first of a host prints."""
    with start(tmp_path, 2, "steps", join_s=6, leave_out=(0,), LOCAL_RANK="0") as run:
        assert run.statuses(60) == [exit_codes.LOST]
        assert f"rank 0 does not answer at 127.0.0.1:{run.port} after 6 s" in run.log(1), run.everything()


def test_a_rank_that_dies_before_it_joins(tmp_path):
    """The others wait for it no longer than --join_timeout, and say which rank is missing."""
    with start(tmp_path, 2, "late", join_s=6) as run:
        run.wait_for("imported", 1)
        run.processes[1].kill()
        assert run.statuses(60) == [exit_codes.LOST, -signal.SIGKILL]
        assert "rank 1 did not come" in run.log(0)


def test_a_rank_of_the_next_run_does_not_join_this_one(tmp_path):
    """Rank 0 is still in a run that rank 1 has left for the next one, at the same port, as after a restart: rank 1 waits for
    the next run's rank 0. Taken in by the old one, it would miss the new."""
    with start(tmp_path, 2, "again", join_s=20) as run:
        assert run.statuses(60) == [0, 0], run.everything()
        assert all("joined again" in run.log(rank) for rank in (0, 1))


def test_a_port_that_another_program_has_by_now(tmp_path):
    """Rank 1 is early for the next run and finds the place of the old one's rank 0, where a program listens that says nothing:
    it turns to the new rank 0 as soon as that is there, and does not wait for an answer until it is too late."""
    with start(tmp_path, 2, "reused", join_s=20) as run:
        assert run.statuses(60) == [0, 0], run.everything()
        assert all("joined again" in run.log(rank) for rank in (0, 1))


def test_the_mistake_of_one_rank_ends_all_with_its_status(tmp_path):
    """The ranks that did not find it name the rank and its mistake, once a host, and end with 2 as it does."""
    with start(tmp_path, 3, "one-mistake") as run:
        assert run.statuses(30) == [exit_codes.MISTAKE] * 3, run.everything()
        said = f"error: rank 1 (host {socket.gethostname()}, pid {run.processes[1].pid}) failed: the data is wrong"
        assert "".join(run.log(rank) for rank in range(3)).count(said) == 1, run.everything()


def test_a_mistake_that_all_ranks_find_is_no_loss(tmp_path):
    """Each ends with 2 by itself, and the watch adds nothing to what they have said."""
    with start(tmp_path, 2, "mistake", step_s=0.2) as run:
        assert run.statuses(30) == [exit_codes.MISTAKE] * 2
        assert "error" not in run.log(0) + run.log(1), run.everything()


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1), (signal.SIGTERM, 2)])
def test_a_signal_stops_all_ranks_at_one_step(tmp_path, number, to):
    """Ranks of different speeds end after the same step, whichever of them got the signal; further signals change nothing."""
    with start(tmp_path, 3, "steps", step_s=0.01) as run:
        for rank in range(3):
            run.wait_for("step 20", rank)
        os.kill(run.processes[to].pid, number)
        for rank, later in ((0, signal.SIGTERM), (1, signal.SIGUSR1), (2, signal.SIGTERM)):
            run.wait_for("stopped", rank)
            os.kill(run.processes[rank].pid, later)
        assert run.statuses(30) == [exit_codes.PREEMPTED] * 3, run.everything()
        last = [re.findall(r"step (\d+)", run.log(rank))[-1] for rank in range(3)]
        assert len(set(last)) == 1, last
        assert all(f"stopped by {signal.Signals(number).name} to rank {to} " in run.log(rank) for rank in range(3))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_before_the_first_step_ends_at_once(tmp_path, ranks):
    """Nothing has been done that could be saved: all ranks end as PREEMPTED and say so."""
    with start(tmp_path, ranks, "startup") as run:
        run.wait_for("joined", ranks - 1)
        os.kill(run.processes[ranks - 1].pid, signal.SIGUSR1)
        assert run.statuses(15) == [exit_codes.PREEMPTED] * ranks
        assert "before the first step; nothing was to be saved" in run.log(0), run.everything()


def test_sigterm_of_a_launcher_whose_other_rank_died_is_no_preemption(tmp_path):
    """A launcher that lost a rank before it joined ends the others by SIGTERM: a failure, to be started again."""
    with start(tmp_path, 2, "late") as run:
        run.wait_for("imported", 1)
        run.wait_for("imported", 0)
        time.sleep(2)  # rank 0 waits for the other
        run.processes[1].kill()
        run.processes[0].terminate()
        assert run.statuses(15)[0] == exit_codes.LOST
        assert "one may have died" in run.log(0)


def test_one_rank_stops_at_its_current_step(tmp_path):
    """With nobody to agree with, the step under way is the last."""
    with start(tmp_path, 1, "steps", step_s=0.5) as run:
        run.wait_for("step 2")
        run.processes[0].terminate()
        assert run.statuses(15) == [exit_codes.PREEMPTED]
        assert int(re.findall(r"step (\d+)", run.log(0))[-1]) in (3, 4)


def test_a_stranger_is_no_rank():
    """Who connects without the run's secret is dropped, and no loss; the handlers of the signals are put back afterwards."""
    before = [signal.getsignal(number) for number in watcher.SIGNALS]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(helpers.free_port()))
    for text in (
        b'{"kind": "hello", "secret": "x", "rank": 1, "name": "n", "pid": 1, "local": 0}\n',
        b"GET / HTTP/1.0\r\n\r\n",
    ):
        guard = watcher.Watcher(0, 1, 5)
        guard.start()
        listener = rendezvous.listen(1)
        guard._call(lambda guard=guard, listener=listener: guard._open(listener))
        with socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=10) as sock:
            sock.sendall(text)
            while data := sock.recv(100):
                assert b"beat" in data
        guard.leave(keep_ignoring=False)  # waits for the thread
        assert guard.connections == []
    assert [signal.getsignal(number) for number in watcher.SIGNALS] == before


def test_an_environment_without_an_address_is_a_mistake(monkeypatch):
    """RANK without MASTER_ADDR: an error that says what to set."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="no MASTER_ADDR: give the address of rank 0's host"):
        rendezvous.master_address()


def test_the_hosts_of_ranks_that_never_came(tmp_path):
    """DeepSpeed's launcher, the parent process, has them in its command line; another parent's says nothing."""
    slots = base64.urlsafe_b64encode(json.dumps({"worker-1": [0, 1], "worker-2": [0]}).encode()).decode()
    ask = "from bge_ds.health import rendezvous; print(rendezvous.hosts_of_ranks())"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    for more, expected in (([f"--world_info={slots}"], {0: "worker-1", 1: "worker-1", 2: "worker-2"}), ([], {})):
        done = subprocess.run(
            [sys.executable, "-c", parent, ask, *more], capture_output=True, text=True, check=True, cwd=helpers.REPO,
            env=helpers.environment(PYTHONPATH=str(helpers.REPO)),
        )  # fmt: skip
        assert ast.literal_eval(done.stdout.splitlines()[-1]) == expected
