"""Training on two hosts by a hostfile: two network namespaces of this machine, each with an sshd, joined by a cable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from hosts import ADDRESSES, SEARCH, SSH_PORT, inside

# Everything that the shells of two hosts could change: quotes, a variable, a pattern of two files, pdsh's own %h.
INSTRUCTION = 'what\'s "$HOME" at 50%h: '
FLAGS = [
    "--model_name_or_path", "model", "--train_data", "groups-*.jsonl", "--cache_dir", "cache", "--use_cpu",
    "--query_instruction_for_retrieval", INSTRUCTION, "--lr_scheduler_kwargs", '{"num_cycles":0.3,"last_epoch":-1}',
    "--lr_scheduler_type", "cosine", "--per_device_train_batch_size", "2", "--train_group_size", "3", "--max_steps", "6",
    "--logging_steps", "1", "--learning_rate", "1e-3", "--temperature", "0.05", "--save_strategy", "no", "--ddp_timeout", "60",
]  # fmt: skip


def train(work: Path, hosts, script: str, output: str, **variables: str) -> str:
    """Runs a script of `launch/` from the first host; what it printed."""
    folder, names = hosts
    path = os.pathsep.join([str(Path(sys.executable).parent), SEARCH])
    environment = helpers.environment(PATH=path, CUDA_VISIBLE_DEVICES="", **variables)
    for name in ("MASTER_ADDR", "MASTER_PORT", "PDSH_SSH_ARGS_APPEND", "HOSTFILE", "DEEPSPEED_ARGS", "DS_ENV_FILE"):
        if name not in variables:
            environment.pop(name, None)
    # In place of the user's ~/.ssh/config, which is root's own here and stays untouched.
    prepare = (
        f"touch /etc/ssh/ssh_config; mount --bind '{folder}/ssh_config' /etc/ssh/ssh_config; " if "config" in output else ""
    )
    command = inside(names[0], prepare + 'exec "$@"', work / "launch" / script, "--output_dir", output, *FLAGS)
    with open(work / f"{output}.log", "w+") as log:
        # A file, not a pipe: should the time run out, nothing is left to wait for.
        launched = subprocess.Popen(command, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            status = launched.wait(timeout=100)
        except subprocess.TimeoutExpired:
            status = "none, it took too long"
        finally:
            launched.kill()
            launched.wait(10)
    printed = (work / f"{output}.log").read_text()
    assert status == 0, f"exit status {status}\n{printed[-6000:]}"
    return printed


@pytest.fixture(scope="module")
def one_host(work, hosts) -> Path:
    """The output of the same training by two ranks on one host."""
    train(work, hosts, "finetune.sh", "one_host", NUM_GPUS="2")
    return work / "one_host"


def measured(output: Path) -> list[tuple]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["grad_norm"], record["learning_rate"]) for record in records]


@pytest.mark.parametrize("ssh", ["config", "options"])
def test_two_hosts_train_as_one_host_does(work, hosts, one_host, ssh):
    """One rank on each of two hosts: the losses, norms and weights of two ranks on one host, to the last bit.

    Once with port and key in ssh's configuration and all else left to DeepSpeed, once with options for pdsh.
    """
    options = f"-F none -p {SSH_PORT} -i {hosts[0]}/client_key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    variables = {"PDSH_SSH_ARGS_APPEND": options, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511"}
    printed = train(work, hosts, "finetune_multinode.sh", f"by_{ssh}", **(variables if ssh == "options" else {}))
    output = work / f"by_{ssh}"
    assert all(f"\n{address}: " in printed for address in ADDRESSES)  # pdsh's mark on the lines of each host
    found, expected = measured(output), measured(one_host)
    assert [step for step, *_ in expected] == [1, 2, 3, 4, 5, 6]
    assert len({loss for _, loss, *_ in expected}) == 6
    assert found == expected
    assert (output / "model.safetensors").read_bytes() == (one_host / "model.safetensors").read_bytes()
    prompts = json.loads((output / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == INSTRUCTION


def test_ssh_options_need_the_first_hosts_address():
    """DeepSpeed asks the first host for its address by ssh without those options: refused at once, with the remedy."""
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
    script = helpers.REPO / "launch/finetune_multinode.sh"
    done = subprocess.run([script], capture_output=True, text=True, env={**environment, "PDSH_SSH_ARGS_APPEND": "-p 2222"})
    assert done.returncode == 2 and "needs MASTER_ADDR" in done.stderr


@pytest.mark.parametrize("script", ["finetune_multinode.sh", "finetune_no_ssh.sh"])
def test_a_typo_in_the_hostfile_is_named(tmp_path, script):
    """Before anything starts, by line, where DeepSpeed would end with a traceback; what DeepSpeed reads is let through."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two hosts\n\nworker-1 slots=8 # the first\nworker-2 slot=8\n")
    done = subprocess.run(
        [helpers.REPO / "launch" / script], capture_output=True, text=True, env={**os.environ, "HOSTFILE": str(hostfile)}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("4:worker-2 slot=8\n") and "valid is NAME slots=N" in done.stderr
