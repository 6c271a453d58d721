"""Training on two hosts by a hostfile: two network namespaces of this machine, each with an sshd, joined by a cable."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest

# Addresses kept for documentation (RFC 5737); they exist only inside the two namespaces.
ADDRESSES = ("192.0.2.1", "192.0.2.2")
INTERFACE = "link0"
SSH_PORT = "2222"
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
SSHD_CONFIG = """\
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/client_key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
SSH_CONFIG = """\
Host *
    Port {port}
    IdentityFile {folder}/client_key
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking no
"""
# Everything that the shells of two hosts could change: quotes, a variable, a pattern of two files, pdsh's own %h.
INSTRUCTION = 'what\'s "$HOME" at 50%h: '
FLAGS = [
    "--model_name_or_path", "model", "--train_data", "groups-*.jsonl", "--cache_dir", "cache", "--use_cpu",
    "--query_instruction_for_retrieval", INSTRUCTION, "--lr_scheduler_kwargs", '{"num_cycles":0.3,"last_epoch":-1}',
    "--lr_scheduler_type", "cosine", "--per_device_train_batch_size", "2", "--train_group_size", "3", "--max_steps", "6",
    "--logging_steps", "1", "--learning_rate", "1e-3", "--temperature", "0.05", "--save_strategy", "no", "--ddp_timeout", "60",
]  # fmt: skip


def quick(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=20)


def inside(namespace: str, script: str, *arguments: object) -> list[str]:
    """The command that runs a shell script in a network namespace, with mounts and process numbers of its own.

    Killing it kills all it has started. DeepSpeed's own way of stopping, `pkill -f` on every host, would find the
    DeepSpeed runs of everybody on this machine, did the hosts here not see their own processes only.
    """
    private = ["ip", "netns", "exec", namespace, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*private, "sh", "-ec", script, "sh", *map(str, arguments)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """(folder with keys and ssh configurations, names of the two namespaces), an sshd running in each."""
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    missing = [name for name in ("ip", "unshare", "ssh", "ssh-keygen", "sshd", "pdsh") if not shutil.which(name, path=SEARCH)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("ssh")
    names = [f"bge-ds-{os.getpid()}-{k}" for k in (1, 2)]
    with contextlib.ExitStack() as undo:
        for name in names:
            made = quick("ip", "netns", "add", name)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
            undo.callback(quick, "ip", "netns", "del", name)  # its end of the cable goes with it
        lay_cable(names)
        for key in ("host_key", "client_key"):
            assert quick("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key).returncode == 0
        for name, text in (("sshd_config", SSHD_CONFIG), ("ssh_config", SSH_CONFIG)):
            (folder / name).write_text(text.format(folder=folder, port=SSH_PORT))
        for name in names:
            # sshd wants its folder /run/sshd: on a /run of its own, so that the machine's stays as it is.
            script = 'mount -t tmpfs none /run; mkdir /run/sshd; exec "$1" -D -e -f "$2"'
            command = inside(name, script, shutil.which("sshd", path=SEARCH), folder / "sshd_config")
            with open(folder / f"{name}.log", "w") as log:
                sshd = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            undo.callback(sshd.wait, 10)
            undo.callback(sshd.kill)
        wait_for_ssh(folder, names)
        yield folder, names


def lay_cable(names: list[str]) -> None:
    """Joins the namespaces by a veth pair whose ends are named alike; skips where the kernel has none."""
    first, second = names
    made = quick("ip", "link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
    if made.returncode:
        pytest.skip(f"no veth pair between network namespaces here: {made.stderr.strip()}")
    for name, address in zip(names, ADDRESSES, strict=True):
        for words in (
            ["addr", "add", f"{address}/30", "dev", INTERFACE],
            ["link", "set", INTERFACE, "up"],
            ["link", "set", "lo", "up"],
        ):
            done = quick("ip", "-n", name, *words)
            assert done.returncode == 0, done.stderr


def wait_for_ssh(folder: Path, names: list[str]) -> None:
    for name, address in zip(names, ADDRESSES, strict=True):
        for _ in range(20):
            done = quick("ip", "netns", "exec", names[0], "ssh", "-F", folder / "ssh_config", address, "hostname -I")
            if done.returncode == 0:
                break
            time.sleep(0.25)
        log = (folder / f"{name}.log").read_text()
        if "account is locked" in log:
            pytest.skip("root's account is locked, so sshd lets nobody in")
        assert done.returncode == 0, f"{done.stderr}\n{log}"
        assert done.stdout.split() == [address]  # what DeepSpeed takes the first host's address from


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder both hosts work in: model, data, a copy of `launch/` with its hostfile and `.deepspeed_env`."""
    try:
        importlib.metadata.version("bge_ds")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("bge_ds is not installed, so its start-up line is not either")
    work = tmp_path_factory.mktemp("work")
    helpers.make_model("bert", work / "model", dropout=0.1)
    helpers.make_tokenizer("wordpiece", work / "model")
    texts = [" ".join(helpers.SENTENCES[i % 6].split()[: 2 + i]) for i in range(9)]
    for i, text in enumerate(texts):
        group = {"query": helpers.SENTENCES[i % 6][: 20 + i], "pos": [text], "neg": texts[:i] + texts[i + 1 :]}
        with open(work / f"groups-{i % 2}.jsonl", "a") as file:
            file.write(json.dumps(group) + "\n")
    shutil.copytree(helpers.REPO / "launch", work / "launch")
    (work / "launch/hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    changed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE}
    lines = (helpers.REPO / "launch/deepspeed_env.sample").read_text().splitlines()
    sample = dict(line.split("=", 1) for line in lines)
    assert changed.keys() <= sample.keys()
    filled = {**sample, **changed}
    (work / "launch/.deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in filled.items()))
    return work


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
