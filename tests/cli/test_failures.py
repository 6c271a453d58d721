"""The training commands when something dies: every rank ends in time and says why; what a signal stopped goes on exactly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
import ranks as runs
import torch
from hosts import ADDRESSES, INTERFACE, SEARCH, SSH_PORT, inside, quick
from safetensors.torch import load_file

from bge_ds.health import exit_codes


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny BERT with dropout and both kinds of data, already in the cache of shards."""
    return helpers.make_training_folder(tmp_path_factory.mktemp("setting"))


def flags_of(setting, command: str, output, **more) -> dict:
    own = {
        "finetune": {"train_data": str(setting / "groups.jsonl"), "train_group_size": 3, "negatives_cross_device": True,
                     "temperature": 0.05},
        "pretrain": {"train_data": str(setting / "texts.jsonl"), "max_seq_length": 40},
    }  # fmt: skip
    return {
        "model_name_or_path": str(setting / "model"), "cache_dir": str(setting / "cache"), "output_dir": str(output),
        "deepspeed": "zero1", "max_steps": 9, "save_strategy": "no", "logging_steps": 1,
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, **own[command], **more,
    }  # fmt: skip


def start(setting, folder, command="finetune", moment="", victim=-1, act="SIGKILL", **flags):
    flags = flags_of(setting, command, folder / "out", **flags)
    return runs.started("dying_rank", 2, folder / moment, json.dumps(flags), moment, victim, act, command)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["join", "data", "rendezvous", "step", "save"])
def test_a_killed_rank_ends_the_run(tmp_path, setting, moment, victim):
    """Killed before it joins, while data is opened, as the group forms, in a step, in a save: the other ends as LOST.

    Within 60 s, and in seconds once the two have met; it names the rank, its host and its pid, and does so once.
    """
    more = {"save_strategy": "steps", "save_steps": 2} if moment == "save" else {}
    if moment == "join":
        more["join_timeout"] = 20
    with start(setting, tmp_path, moment=moment, victim=victim, **more) as run:
        run.processes[victim].wait(150)
        died = time.monotonic()
        found = run.statuses(60)
        assert found[victim] == -signal.SIGKILL and found[1 - victim] == exit_codes.LOST, run.everything()
        said = run.log(1 - victim)
        if moment == "join":
            assert ("rank 1 did not come" if victim else "rank 0 does not answer") in said or victim == 0
        else:
            assert time.monotonic() - died < 20
            assert said.count(f"error: rank {victim} (host ") == 1 and f"pid {run.processes[victim].pid})" in said
            assert "Traceback" not in said
    assert not list(tmp_path.glob("out/checkpoint-2"))


def test_an_error_of_one_rank_ends_the_others_with_its_words(tmp_path, setting):
    """The rank that fails prints its traceback and ends with 1; the other, whose collective breaks, names it and its error."""
    with start(setting, tmp_path, moment="step", victim=1, act="raise") as run:
        assert run.statuses(150) == [exit_codes.FAILED] * 2, run.everything()
        assert "RuntimeError: out of luck" in run.log(1) and "Traceback" in run.log(1)
        assert "error: rank 1 (host " in run.log(0) and "failed: RuntimeError: out of luck" in run.log(0)
        assert "Traceback" not in run.log(0)


def test_a_mistake_that_all_find_is_said_once(tmp_path, setting):
    """Data that is not there: status 2 on all ranks, one line a host, no word of lost ranks."""
    with start(setting, tmp_path, train_data=str(tmp_path / "absent.jsonl")) as run:
        assert run.statuses(150) == [exit_codes.MISTAKE] * 2, run.everything()
        assert run.log(0).count("error: ") == 1 and "absent.jsonl" in run.log(0) and "error" not in run.log(1)


@pytest.fixture(scope="module")
def undisturbed(setting, tmp_path_factory):
    """command -> the output folder of its run that nothing has disturbed."""
    folders = {}
    for command in ("finetune", "pretrain"):
        folder = tmp_path_factory.mktemp(command)
        with start(setting, folder, command) as run:
            assert run.statuses(200) == [0, 0], run.everything()
        folders[command] = folder / "out"
    return folders


def measured(output) -> dict[int, tuple]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: (r["loss"], r["learning_rate"], r["grad_norm"]) for r in records}


def assert_same_run(found, expected) -> None:
    """The losses of all steps and the final weights, to the last bit."""
    assert measured(found) == measured(expected)
    names = [path.name for path in expected.glob("*.safetensors")] + [
        str(path.relative_to(expected)) for path in expected.glob("encoder_model/*.safetensors")
    ]
    assert names
    for name in names:
        a, b = load_file(found / name), load_file(expected / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.parametrize(
    ("command", "act", "to", "workers"),
    [("finetune", "SIGTERM", 0, 2), ("finetune", "SIGUSR1", 1, 0), ("pretrain", "SIGTERM", 1, 0)],
)
def test_what_a_signal_stopped_goes_on_exactly(tmp_path, setting, undisturbed, command, act, to, workers):
    """A signal to either rank: both save at one step and end with 75, and the resumed run is the undisturbed one."""
    with start(setting, tmp_path, command, "step", to, act, dataloader_num_workers=workers) as run:
        assert run.statuses(150) == [exit_codes.PREEMPTED] * 2, run.everything()
        (said,) = re.findall(rf"stopped by {act} to rank {to} \(host .*, pid \d+\) after step (\d+); saved", run.log(0))
        assert "stopped" not in run.log(1)
        assert 2 < int(said) < 9 and sorted(measured(tmp_path / "out")) == list(range(1, int(said) + 1))
    with start(setting, tmp_path, command, resume_from_checkpoint="auto") as run:
        assert run.statuses(150) == [0, 0], run.everything()
        assert f"at step {said}" in run.log(0)
    assert_same_run(tmp_path / "out", undisturbed[command])


def test_checkpoints_of_the_model_alone_cannot_be_gone_on_from(tmp_path, setting):
    """With --save_only_model a signal ends the run as well, and it says that nothing was saved to resume from."""
    more = {"save_strategy": "steps", "save_steps": 500, "save_only_model": True}
    with start(setting, tmp_path, moment="step", victim=1, act="SIGTERM", **more) as run:
        assert run.statuses(150) == [exit_codes.PREEMPTED] * 2, run.everything()
        assert "nothing to resume from was saved (--save_only_model)" in run.log(0)
    assert not list(tmp_path.glob("out/checkpoint-*"))


def multinode(work, hosts, output: str, **variables: str):
    """A process of `launch/finetune_multinode.sh` on the first host, which logs into OUTPUT.log."""
    environment = helpers.environment(
        PATH=os.pathsep.join([str(Path(sys.executable).parent), SEARCH]), CUDA_VISIBLE_DEVICES="", MASTER_ADDR=ADDRESSES[0],
        MASTER_PORT=str(helpers.free_port()),
        PDSH_SSH_ARGS_APPEND=f"-F none -p {SSH_PORT} -i {hosts[0]}/client_key -o StrictHostKeyChecking=no "
        "-o UserKnownHostsFile=/dev/null",
        **variables,
    )  # fmt: skip
    values = {
        "output_dir": output, "model_name_or_path": "model", "train_data": "groups-*.jsonl", "cache_dir": "cache",
        "max_steps": 60, "save_steps": 10, "logging_steps": 1, "per_device_train_batch_size": 2, "train_group_size": 3,
        "learning_rate": "1e-3", "temperature": 0.05, "resume_from_checkpoint": "auto",
    }  # fmt: skip
    flags = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    name = "finetune.sh" if "NUM_GPUS" in variables else "finetune_multinode.sh"
    command = inside(hosts[1][0], 'exec "$@"', work / "launch" / name, *flags, "--use_cpu")
    with open(work / f"{output}.log", "a") as log:
        return subprocess.Popen(command, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def trainers(namespace: str) -> list[str]:
    """Command lines of the ranks that live in a network namespace."""
    found = []
    for pid in quick("ip", "netns", "pids", namespace).stdout.split():
        try:
            words = Path("/proc", pid, "cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        found += [" ".join(words)] * ("bge_ds.finetune" in words and any(w.startswith("--local_rank") for w in words))
    return found


def until(reached, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def test_a_cut_cable_ends_both_hosts_and_the_run_goes_on_when_it_is_back(work, hosts):
    """Within 60 s neither host has a rank left, and the silence is named; the resumed run is that of two ranks of one host."""
    whole, cut = multinode(work, hosts, "whole", NUM_GPUS="2"), None
    try:
        assert whole.wait(150) == 0, (work / "whole.log").read_text()[-4000:]
        cut = multinode(work, hosts, "cut")
        log, metrics = work / "cut.log", work / "cut/metrics.jsonl"
        until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 14, 150, "step 15")
        assert trainers(hosts[1][0]) and trainers(hosts[1][1])
        assert quick("ip", "-n", hosts[1][0], "link", "set", INTERFACE, "down").returncode == 0
        parted = time.monotonic()
        assert cut.wait(60) not in (0, 2, 75), log.read_text()[-4000:]
        until(lambda: not trainers(hosts[1][0]) + trainers(hosts[1][1]), 60 - (time.monotonic() - parted), "no rank left")
        assert re.search(r"rank 1 \(host .*, 192\.0\.2\.2, pid \d+\) has been silent for 30 s", log.read_text())
        assert quick("ip", "-n", hosts[1][0], "link", "set", INTERFACE, "up").returncode == 0
        cut = multinode(work, hosts, "cut")
        assert cut.wait(150) == 0, log.read_text()[-4000:]
        assert "resumed from cut/checkpoint-" in log.read_text()
    finally:
        for process in (whole, cut):
            if process is not None:
                process.kill()
                process.wait(10)
    assert_same_run(work / "cut", work / "whole")
