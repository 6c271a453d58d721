"""The hostfile and the variables of the launcher: what DeepSpeed reads, and each mistake named by file and line."""

from __future__ import annotations

import sys

import pytest
from deepspeed.launcher import runner

from bge_ds.doctor import cluster


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    """The same hosts, slots and order as the launcher's own reader gives."""
    path = tmp_path / "hosts"
    path.write_text("# all\n\n  worker-2   slots=8  \nroot@10.0.0.7\tslots=4 # old\nworker-1 slots=2\n  # end\n")
    found = cluster.read_hostfile(str(path))
    assert list(found.items()) == [("worker-2", 8), ("root@10.0.0.7", 4), ("worker-1", 2)]
    assert list(runner.fetch_hostfile(str(path)).items()) == list(found.items())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a slots=2\nb\n", ":2: 'b' is no host and its slots"),
        ("a slots=x\n", ":1: 'a slots=x'"),
        ("a slots=8x\n", ":1: 'a slots=8x'"),
        ("a slots=0\n", ":1: 'a slots=0'"),
        ("a slot=8\n", ":1: 'a slot=8'"),
        ("a:8\n", ":1: 'a:8'"),
        ("a slots=2\n\nb slots=1\na slots=1\n", ":4: 'a slots=1': a stands in line 1 already"),
        ("w[1-3] slots=2\n", "'w[1-3]' is no name"),
        ("-oProxyCommand=x slots=2\n", "is no name"),
        ("# nothing\n\n", "names no host"),
    ],
)
def test_a_mistake_in_a_hostfile_is_named_by_line(tmp_path, text, named):
    """What DeepSpeed refuses, and what it takes for something else: file, line and what is valid."""
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        cluster.read_hostfile(str(path))
    assert str(caught.value).startswith(str(path)) and named in str(caught.value)


def test_a_missing_hostfile_is_named(tmp_path):
    """DeepSpeed goes on alone, on this machine, where the file is missing."""
    with pytest.raises(ValueError, match=r"absent.*NAME slots=N"):
        cluster.read_hostfile(str(tmp_path / "absent"))


def test_the_launchers_variables_are_forwarded_and_no_others(tmp_path, monkeypatch):
    """Those whose names begin as DeepSpeed's own list has it, and all of .deepspeed_env in home and working folder."""
    assert set(runner.EXPORT_ENVS) <= set(cluster._FORWARDED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/lib")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.deepspeed_env").write_text("A=1\nB=1\n")
    (tmp_path / ".deepspeed_env").write_text("B=2 x\nPATH=/env/bin:$PATH\n")
    found, files = cluster.forwarded_variables()
    assert files == [str(tmp_path / "home/.deepspeed_env"), str(tmp_path / ".deepspeed_env")]
    assert found.items() >= {"A": "1", "B": "2 x", "NCCL_DEBUG": "INFO", "PYTHONPATH": f"{tmp_path}:/lib"}.items()
    assert "HF_HUB_OFFLINE" not in found
    script = cluster.on_host("h", found, "mod", "it's")[-1]
    # As the launcher writes them: in double quotes the host's own PATH is put in.
    assert 'export B="2 x"; ' in script and 'export PATH="/env/bin:$PATH"; ' in script and "export A=1; " in script
    assert script.endswith(f"""exec {sys.executable} -u -m mod 'it'"'"'s'""")


@pytest.mark.parametrize("line", ["", "# a comment", "A", "export A=1", "A B=1"])
def test_a_line_of_deepspeed_env_that_is_no_variable_is_named(tmp_path, monkeypatch, line):
    """The launcher crashes at it, or its shells read the rest as a comment."""
    path = tmp_path / "variables"
    path.write_text(f"A=1\n{line}\nB=2\n")
    monkeypatch.setenv("DS_ENV_FILE", str(path))
    with pytest.raises(ValueError, match=rf"{path}:2: '{line}' is no NAME=value"):
        cluster.forwarded_variables()


def test_ssh_takes_the_options_that_pdsh_gets(monkeypatch):
    """Options for pdsh's ssh are those of the doctor's, which never asks for a password."""
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222 -i '/my key'")
    command = cluster.on_host("h", {}, "mod")
    assert command[0] == "ssh" and "BatchMode=yes" in command and command[-2] == "h"
    assert command[command.index("-p") + 1] == "2222" and command[command.index("-i") + 1] == "/my key"


def ask(script: str, **how):
    talk = cluster.ProbeProcess([sys.executable, "-u", "-c", script])
    try:
        return talk.ask(**{"timeout_s": 30, "do": "it", **how})
    finally:
        talk.close()


def test_an_answer_is_found_among_other_lines():
    """What a login shell or a library prints around an answer is no part of it."""
    script = f"print('welcome'); print(input()); print('x {cluster.ANSWER}' + '{{\"a\": 1}}'); print('bye')"
    answer = ask(script)
    assert answer["a"] == 1 and answer["sent"] <= answer["received"]


@pytest.mark.parametrize(
    ("script", "timeout_s", "status"),
    [("import sys; print('why'); sys.exit(7)", 30, 7), ("print('why'); input(); input()", 5, None)],
)
def test_no_answer_ends_with_what_was_said(script, timeout_s, status):
    """A probe that ended tells its status, one that hangs none; both their last lines. Neither keeps the doctor waiting."""
    with pytest.raises(cluster.NoAnswer) as caught:
        ask(script, timeout_s=timeout_s)
    assert caught.value.status == status and caught.value.printed == ["why"]
