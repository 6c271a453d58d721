"""The doctor as it is run: on this machine, on two hosts (network namespaces), and with what it must find."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from hosts import ADDRESSES, SEARCH, inside, quick

from bge_ds.doctor import __main__ as doctor
from bge_ds.doctor import network_checks
from bge_ds.doctor.checks import FAILED, OK, Finding, Plan
from bge_ds.doctor.table import Table

COMMAND = [sys.executable, "-m", "bge_ds.doctor"]
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "PDSH_SSH_ARGS_APPEND", "DS_ENV_FILE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def environment(**variables: object) -> dict[str, str]:
    clean = {name: value for name, value in helpers.environment().items() if name not in VARIABLES}
    path = os.pathsep.join([str(Path(sys.executable).parent), SEARCH])
    return clean | {"PATH": path, "PYTHONPATH": str(helpers.REPO), **{name: str(value) for name, value in variables.items()}}


def run(command: list, folder: Path, timeout: int = 250, **variables: object) -> tuple[int, str]:
    """(exit status, what was printed); a file, not a pipe, so that nothing is left to wait for."""
    with open(folder / "doctor.log", "w+") as log:
        done = subprocess.run(
            [str(word) for word in command], cwd=folder, env=environment(**variables), timeout=timeout,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        log.seek(0)
        return done.returncode, log.read()


def marks(printed: str) -> dict[str, set[str]]:
    """Check -> the marks of its lines."""
    found: dict[str, set[str]] = {}
    for line in printed.splitlines():
        words = line.split()
        if line[:1] in "owfs" and words[0] in ("ok", "warning", "failed", "skipped"):
            found.setdefault(words[1], set()).add(words[0])
    return found


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]}) + "\n")
    return path


def test_this_machine_is_ready(tmp_path, tiny_bert_path):
    """Two CPU ranks, all there: every check is ok, the status 0; a table without colours in 120 columns; nothing stays."""
    command = [*COMMAND, "--num_gpus", 2, "--use_cpu", "--output_dir", tmp_path / "out/run", "--save_total_limit", 2]
    command += ["--model_name_or_path", tiny_bert_path, "--train_data", rows(tmp_path), "--cache_dir", tmp_path / "cache"]
    command += ["--sub_batch_tokens", 4096, "--deepspeed", "zero3"]
    command += ["--learning_rate", "1e-5", "--eval_data", "a", "b"]  # of the run, and nothing to the doctor
    status, printed = run(command, tmp_path, MASTER_PORT=helpers.free_port())
    assert status == 0, printed
    wanted = ("versions", "model", "data", "devices", "memory", "output", "port", "gradients", "bandwidth")
    assert marks(printed) == {check: {"ok"} for check in wanted}
    assert "2 ranks against one process, ZeRO 3" in printed and "activations" in printed
    assert printed.endswith("9 ok: ready\n") and "\033" not in printed
    assert max(map(len, printed.splitlines())) < 120
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "doctor.log", "rows.jsonl"]


def test_this_machine_is_not_ready(tmp_path, tiny_bert_path):
    """What is missing, and a port that is in use: each is a line with a remedy, the status 1, and no rank starts."""
    (tmp_path / "file").write_text("")
    command = [*COMMAND, "--num_gpus", 2, "--use_cpu", "--output_dir", tmp_path / "file/run", "--train_data", "absent.jsonl"]
    command += ["--model_name_or_path", tiny_bert_path.parent]
    with contextlib.closing(socket.create_server(("", 0))) as taken:
        port = taken.getsockname()[1]
        status, printed = run(command, tmp_path, MASTER_PORT=port)
    assert status == 1, printed
    found = marks(printed)
    for check in ("data", "model", "memory", "output", "port"):
        assert found[check] == {"failed"}, check
    assert found["gradients"] == {"skipped"} and found["versions"] == {"ok"}
    text = " ".join(printed.split())
    for part in ("no file absent.jsonl", "without config.json", "file is a file", f"{port} cannot be had", "ss -ltnp"):
        assert part in text
    assert printed.count("-> ") == 5 and printed.endswith("not ready\n")


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["--hostfile", "hosts"], {}, "hosts:2: 'b slots=two' is no host"),
        (["--hostfile", "absent"], {}, "--hostfile absent: cannot be read"),
        (["--hostfile", "good"], {"DS_ENV_FILE": "bad_env"}, "bad_env:1: '# mine' is no NAME=value"),
        (["--hostfile", "good", "--num_gpus", "2"], {}, "--num_gpus is for this machine alone"),
        (["--deepspeed", "zero9"], {}, "--deepspeed zero9: neither a file nor one of the shipped"),
        (["--train_data", "a=1", "b"], {}, "give each PATH=WEIGHT"),
        (["--num_gpus", "0"], {}, "--num_gpus: '0' is not a whole number above 0"),
        (["--timeout", "1m"], {}, "--timeout: '1m' is not a whole number above 0"),
        (["--nodes", "2"], {}, "unrecognized arguments: --nodes"),
        (["--learning_rate", "1e-5", "--bf16", "True", "--nodes", "2"], {}, "unrecognized arguments: --nodes (--help"),
        (["--bf16", "maybe"], {}, "--bf16: 'maybe' is neither True nor False"),
        (["--bf16", "--fp16", "true"], {}, "--bf16 and --fp16: give one of them"),
        (["stray"], {}, "unrecognized arguments: stray"),
        (["--hostfile", "good"], {"DS_ENV_FILE": "no_text"}, "no_text: cannot be read"),
        ([], {"MASTER_PORT": "http"}, "MASTER_PORT=http is no port"),
        ([], {"MASTER_PORT": "²"}, "MASTER_PORT=² is no port"),
    ],
)
def test_a_users_mistake_is_one_message_and_status_2(tmp_path, monkeypatch, capsys, words, variables, said):
    """Said by name, before any host is contacted: no process starts."""
    (tmp_path / "hosts").write_text("a slots=1\nb slots=two\n")
    (tmp_path / "good").write_text("192.0.2.9 slots=1\n")
    (tmp_path / "bad_env").write_text("# mine\nA=1\n")
    (tmp_path / "no_text").write_bytes(b"A=\xff\n")
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    try:
        status = doctor.main(words)
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and said in capsys.readouterr().err


def on_first_host(hosts, work: Path, *words: object) -> list[str]:
    """The doctor, started on the first of the two hosts, with ssh set up in place of the user's own."""
    prepare = f"touch /etc/ssh/ssh_config; mount --bind '{hosts[0]}/ssh_config' /etc/ssh/ssh_config; "
    return inside(hosts[1][0], prepare + 'exec "$@"', *COMMAND, "--hostfile", *words)


def test_two_hosts_are_ready(hosts, work):
    """One rank on each of two hosts, reached by ssh: every check is ok, the status 0."""
    words = ["launch/hostfile", "--model_name_or_path", "model", "--train_data", "groups-0.jsonl", "groups-*.jsonl"]
    words += ["--output_dir", "out", "--save_total_limit", 2, "--deepspeed", "zero2", "--cache_dir", "cache"]
    status, printed = run(on_first_host(hosts, work, *words), work, DS_ENV_FILE=work / "launch/.deepspeed_env")
    assert status == 0, printed
    wanted = ("hostfile", "ssh", "versions", "model", "data", "devices", "memory", "output", "interface", "clock", "port",
              "gradients", "bandwidth")  # fmt: skip
    assert marks(printed) == {check: {"ok"} for check in wanted}
    text = " ".join(printed.split())
    assert "one folder of all 2 hosts" in text and "29500 is free, reached at 192.0.2.1 by the others" in text
    assert "2 ranks against one process, ZeRO 2" in text
    assert all(f"{address} GLOO_SOCKET_IFNAME=link0: link0 {address}" in text for address in ADDRESSES)
    assert not list(work.glob(".bge_ds-doctor*"))


@contextlib.contextmanager
def hidden(name: str, folder: Path):
    """The folder is an empty one in the mounts of a host's sshd, and of what comes in by it."""
    sshd = next(pid for pid in quick("ip", "netns", "pids", name).stdout.split() if is_sshd(pid))
    mount = ["nsenter", "-t", sshd, "-m"]
    made = quick(*mount, "mount", "-t", "tmpfs", "none", folder)
    assert made.returncode == 0, made.stderr
    try:
        yield
    finally:
        quick(*mount, "umount", folder)


def is_sshd(pid: str) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "sshd"


@contextlib.contextmanager
def port_taken(name: str, port: int):
    script = f"import socket; s = socket.create_server(('', {port})); print('ready', flush=True); input()"
    command = ["ip", "netns", "exec", name, sys.executable, "-c", script]
    taken = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert taken.stdout.readline() == "ready\n"
        yield
    finally:
        taken.kill()
        taken.communicate()


def test_what_is_wrong_between_hosts_is_found(hosts, work):
    """A host that nobody answers at, a folder that the second host does not see, a port in use: all in one table."""
    (work / "three").write_text((work / "launch/hostfile").read_text() + "192.0.2.9 slots=1\n")
    (work / "unshared").mkdir()
    variables = {"DS_ENV_FILE": work / "launch/.deepspeed_env", "MASTER_PORT": 29533}
    with hidden(hosts[1][1], work / "unshared"), port_taken(hosts[1][0], 29533):
        status, printed = run(on_first_host(hosts, work, "three", "--output_dir", "unshared/out"), work, **variables)
    assert status == 1, printed
    text = " ".join(printed.split())
    assert "failed ssh 192.0.2.9 cannot be reached" in text and "out of the hostfile" in text
    assert "failed output 192.0.2.2 does not see what 192.0.2.1 writes" in text and "mount one folder of all hosts" in text
    assert "failed port 192.0.2.1 29533 cannot be had" in text and "MASTER_PORT" in text
    found = marks(printed)
    assert found["versions"] == {"ok"} and found["interface"] == {"ok"} and found["gradients"] == {"skipped"}
    assert not list((work / "unshared").iterdir())


def test_ranks_that_hang_end_by_themselves(monkeypatch):
    """Ranks that do not come to their end in time stop, and the doctor says so and shows where they were."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    plan, started = Plan({doctor.THIS_MACHINE: 2}, port=helpers.free_port()), time.monotonic()
    outcome = doctor.launch_selftest(plan, {"stage": 1}, "", True, timeout_s=1)  # torch alone takes longer to import
    (found,) = network_checks.ranks(*outcome, plan.ranks, 1)
    assert time.monotonic() - started < 60
    assert found.status == FAILED and "no result within 1 s" in found.text
    assert any("Timeout" in line for line in found.printed) and any("File" in line for line in found.printed)


def test_many_hosts_are_few_lines(capsys):
    """What hosts share is one line that names them; of many that are well, one stands for all; failures all show."""
    names = [f"h{i}" for i in range(9)]
    table = Table(names)
    table.add([Finding("versions", name, FAILED, "torch 2.12", "install") for name in names[:2]])
    table.add([Finding("interface", name, OK, f"eth0 10.0.0.{i}") for i, name in enumerate(names)])
    table.add([Finding("memory", name, OK, "1 GiB") for name in names])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["failed", "versions", "2", "hosts", "h0,", "h1:", "torch", "2.12"],
        ["->", "install"],
        ["ok", "interface", "9", "hosts", "such", "as", "eth0", "10.0.0.0"],
        ["ok", "memory", "all", "1", "GiB"],
    ]
    assert table.failed
