"""Two hosts of one machine: network namespaces, each with an sshd, joined by a cable; and commands that run inside them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
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


def quick(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=20)


def inside(namespace: str, script: str, *arguments: object) -> list[str]:
    """The command that runs a shell script in a network namespace, with mounts and process numbers of its own.

    Killing it kills all it has started. DeepSpeed's own way of stopping, `pkill -f` on every host, would find the
    DeepSpeed runs of everybody on this machine, did the hosts here not see their own processes only.
    """
    private = ["ip", "netns", "exec", namespace, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*private, "sh", "-ec", script, "sh", *map(str, arguments)]


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder with keys and ssh configurations, names of the two namespaces), an sshd running in each; or skips."""
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    missing = [name for name in ("ip", "unshare", "ssh", "ssh-keygen", "sshd", "pdsh") if not shutil.which(name, path=SEARCH)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
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


def make_work(work: Path) -> Path:
    """The folder both hosts work in: model, data, a copy of `launch/` with its hostfile and `.deepspeed_env`."""
    try:
        importlib.metadata.version("bge_ds")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("bge_ds is not installed, so its start-up line is not either")
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
