"""The supervisor restarts what failed, from its last checkpoint, so often and no more, and leaves nothing running."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
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


def test_a_path_is_left_behind(tmp_path):
    """Restarts go on from the run's own checkpoints, once there are any, not from the one that it began with."""
    text = """
    n=$(wc -l < runs)
    if [ $n -eq 2 ]; then mkdir -p out/checkpoint-9 && touch out/checkpoint-9/state.json; fi
    [ $n -eq 3 ]
    """
    given = "--output_dir out --resume_from_checkpoint x/checkpoint-3"
    status, said = supervise(tmp_path, script(tmp_path, text), *given.split())
    assert status == 0, said
    assert (tmp_path / "flags").read_text().splitlines() == [given, given, given + " --resume_from_checkpoint auto"]


@pytest.mark.parametrize("status", [138, 143])
def test_a_run_stopped_before_it_listened_is_stopped(tmp_path, status):
    """SIGUSR1 or SIGTERM to a rank that has not yet got its handlers kills it: 75, which a scheduler starts again."""
    assert supervise(tmp_path, script(tmp_path, f"exit {status}"))[0] == 75
    assert runs(tmp_path) == 1


@pytest.mark.parametrize("status", [1, 76, 75, 2, 0])
def test_a_failure_after_a_signal_is_a_stop(tmp_path, status):
    """What the signal reached but did not end cleanly is not started again here, and 75 says that it may be elsewhere; a
    finished run and a user's mistake stay what they are."""
    text = f"trap 'exit {status}' TERM; kill -s TERM $PPID_OF_TEST; while :; do sleep 0.1; done"
    text = text.replace("$PPID_OF_TEST", "$(cat supervisor)")
    (tmp_path / "command.sh").touch()
    command = script(tmp_path, "while [ ! -s supervisor ]; do sleep 0.1; done\n" + text)
    with open(tmp_path / "said", "w+") as log:
        process = subprocess.Popen(
            [SUPERVISE, command], cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        (tmp_path / "supervisor").write_text(str(process.pid))
        try:
            assert process.wait(60) == (status if status in (0, 2) else 75), (tmp_path / "said").read_text()
        finally:
            process.kill()
    assert runs(tmp_path) == 1


def test_a_launcher_that_died_is_no_end(tmp_path):
    """Status 0 while ranks of the run are still at work is a failure: they are ended, and the run is started again."""
    text = """
    if [ $(wc -l < runs) -eq 1 ]; then
        RANK=0 nohup bash -c 'sleep 300; true' rank --output_dir out >/dev/null 2>&1 &
        echo $! > rank
        sleep 0.5
        exit 0
    fi
    """
    status, said = supervise(tmp_path, script(tmp_path, text), "--output_dir", "out")
    assert status == 0 and runs(tmp_path) == 2 and "its launcher has died" in said, said
    file = Path("/proc", (tmp_path / "rank").read_text().strip(), "status")
    assert not file.exists() or "zombie" in file.read_text()


def test_the_end_of_the_terminal_stops_the_run(tmp_path):
    """SIGHUP, which closing the terminal sends to the supervisor, reaches the ranks as SIGTERM: they save, nobody trains on."""
    text = "export RANK=0; exec bash -c \"trap 'echo got > got; exit 75' TERM; touch up; while :; do sleep 0.1; done\""
    process = subprocess.Popen(
        [SUPERVISE, script(tmp_path, text)], cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # tests that nohup started would pass on its SIG_IGN
    )  # fmt: skip
    try:
        while not (tmp_path / "up").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 75 and (tmp_path / "got").exists()
    finally:
        process.kill()


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


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder with a tiny model, data, and the result of a run when nothing happens."""
    base = helpers.make_training_folder(tmp_path_factory.mktemp("setting"))
    status, said = supervise(base, *by_deepspeed(), *flags(base, base / "whole"), seconds=250, PYTHONPATH=helpers.PYTHONPATH)
    assert status == 0, said
    return base


def by_deepspeed() -> list[object]:
    deepspeed = Path(sys.executable).parent / "deepspeed"
    return [deepspeed, "--num_gpus", "2", "--master_port", helpers.free_port(), "--module", "programs.unlucky"]


def flags(setting: Path, output: Path, save_steps: int = 3) -> list[object]:
    values = {
        "output_dir": output, "model_name_or_path": setting / "model", "train_data": setting / "groups.jsonl",
        "cache_dir": setting / "cache", "max_steps": 9, "save_steps": save_steps, "logging_steps": 1, "temperature": 0.05,
        "per_device_train_batch_size": 2, "train_group_size": 3, "learning_rate": "1e-3", "deepspeed": "zero1",
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)] + ["--negatives_cross_device", "--use_cpu"]


def assert_same_result(found: Path, expected: Path) -> None:
    """The last record of each step, and the final weights, to the last bit."""

    def measured(folder: Path) -> dict[int, tuple]:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {record["step"]: (record["loss"], record["grad_norm"]) for record in records}

    assert measured(found) == measured(expected) and len(measured(expected)) == 9
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def ranks_of(output: Path) -> list[str]:
    """Command lines of living processes that train into this folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        found += [" ".join(words)] * (str(output) in words)
    return found


def test_a_run_that_dies_twice_ends_as_if_it_had_not(tmp_path, setting):
    """Rank 1 is killed after steps 4 and 7: two restarts, from steps 3 and 6, and the undisturbed run's losses and weights."""
    command = [*by_deepspeed(), *flags(setting, tmp_path / "out")]
    plan = {"TEST_PLAN": "4:SIGKILL 7:SIGKILL", "PYTHONPATH": helpers.PYTHONPATH}
    status, said = supervise(tmp_path, *command, seconds=280, **plan)
    assert status == 0, said[-6000:]
    assert "restart 1 of 3 from step 3 " in said and "restart 1 of 3 from step 6 " in said
    assert said.count("ended without a word") == 2
    assert_same_result(tmp_path / "out", setting / "whole")
    # The launcher's SIGTERM for the rank that was left started no save.
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (3, 6, 9)]
    assert not ranks_of(tmp_path / "out")


SRUN = """#!/usr/bin/env bash
while [ "$1" != bash ]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & tasks[i]=$!; done
worst=0
for task in "${tasks[@]}"; do wait $task; status=$?; [ $status -gt $worst ] && worst=$status; done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; else echo "$@" >> asked; fi
"""


def test_slurm_starts_a_task_a_rank_and_queues_a_stopped_job_again(tmp_path, setting):
    """With stand-ins for srun and scontrol: SIGUSR1 to a task queues the job again, whose next start ends as undisturbed."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    shutil.copytree(helpers.REPO / "launch", tmp_path / "launch")
    variables = environment(
        PATH=os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        COMMAND="programs.unlucky", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="worker-[1-2]", SLURM_SUBMIT_DIR=str(tmp_path),
        TEST_PLAN="5:SIGUSR1", MASTER_PORT=str(helpers.free_port()), PYTHONPATH=helpers.PYTHONPATH,
    )  # fmt: skip
    command = [tmp_path / "launch/slurm.sbatch", *map(str, flags(setting, tmp_path / "out", save_steps=100))]
    first, second = (
        subprocess.run(command, env=variables, capture_output=True, text=True, timeout=140, stdin=subprocess.DEVNULL)
        for _ in "12"
    )
    assert first.returncode == 75, first.stdout[-3000:] + first.stderr[-3000:]
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert_same_result(tmp_path / "out", setting / "whole")


def test_hosts_without_ssh(tmp_path, setting):
    """Two launchers that know each other by a hostfile and an address alone train together, as two ranks of one host do."""
    (tmp_path / "hosts").write_text("worker-1 slots=1\nworker-2 slots=1\n")
    port = str(helpers.free_port())
    processes = []
    try:
        for rank in (0, 1):
            variables = environment(
                PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), NODE_RANK=str(rank),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, HOSTFILE=str(tmp_path / "hosts"), CUDA_VISIBLE_DEVICES="",
            )  # fmt: skip
            command = [
                helpers.REPO / "launch/finetune_no_ssh.sh",
                *map(str, flags(setting, tmp_path / "out")),
                "--bf16",
                "False",
            ]
            with open(tmp_path / f"log-{rank}", "w") as log:
                processes.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        found = [process.wait(250) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert found == [0, 0], "".join((tmp_path / f"log-{rank}").read_text()[-3000:] for rank in (0, 1))
    assert_same_result(tmp_path / "out", setting / "whole")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("NODE_RANK", "2", "NODE_RANK 2, and .* has 2 hosts, numbered from 0"),
        ("HOSTFILE", "my hosts", "'my hosts' has a space"),
    ],
)
def test_what_a_launch_without_ssh_refuses(tmp_path, variable, value, said):
    """A number beyond the hostfile, and a path that DeepSpeed's options would be split at: named, with status 2."""
    for name in ("hosts", "my hosts"):
        (tmp_path / name).write_text("# two\nworker-1 slots=1\n\nworker-2 slots=1\n")
    given = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "HOSTFILE": "hosts", variable: value}
    command = [helpers.REPO / "launch/finetune_no_ssh.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(**given), capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and re.search(said, done.stderr), done.stderr


def test_without_deepspeed_nothing_is_tried_again(tmp_path):
    """127, as of any command that is not there, which the supervisor does not restart."""
    shutil.copytree(helpers.REPO / "launch", tmp_path / "launch")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "grep", "mktemp", "rm", "setsid", "env", "sleep", "cat", "cut"):
        (programs / name).symlink_to(shutil.which(name))
    for script_name in ("finetune.sh", "pretrain.sh"):
        status, said = supervise(tmp_path, tmp_path / "launch" / script_name, "--output_dir", "out", PATH=str(programs))
        assert status == 127 and said.count("no deepspeed command") == 1, said


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "NODE_RANK", "HOSTFILE"])
def test_what_a_launch_without_ssh_needs(tmp_path, missing):
    """Without a hostfile, an address or this host's number: an error that says which, before anything starts."""
    (tmp_path / "hosts").write_text("worker-1 slots=1\n")
    given = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "HOSTFILE": str(tmp_path / "hosts")}
    given[missing] = str(tmp_path / "absent") if missing == "HOSTFILE" else ""
    done = subprocess.run(
        [helpers.REPO / "launch/finetune_no_ssh.sh"], env=environment(**given), capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2 and ("no hostfile" if missing == "HOSTFILE" else missing) in done.stderr
