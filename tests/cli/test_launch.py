"""Launching: `deepspeed -m`, what a wheel carries, and the scripts of `launch/`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import helpers
import pytest

from bge_ds.deepspeed_engine import launcher_module_flag

BIN = Path(sys.executable).parent
SCRIPTS = sorted([*(helpers.REPO / "launch").glob("*.sh"), helpers.REPO / ".ci/run"])


@pytest.mark.parametrize(
    ("line", "position"),
    [
        ("-m pkg.mod --x 1", 0),
        ("--num_gpus 2 -m pkg.mod", 2),
        ("--num_gpus=2 -H hosts --bind_cores_to_rank -m pkg.mod -m 3", 4),
        ("--num_g 2 --no_local_rank -m pkg.mod", 3),
        ("--launcher_args -m -m pkg.mod", 2),
        ("train.py -m 3", None),
        ("--num_gpus 2 train.py --module -m", None),
        ("--module pkg.mod -m 3", None),
        ("--no_python -- prog -m", None),
        ("--some_newer_option 5 -m pkg.mod", None),
        ("--num_gpus 2", None),
        ("", None),
    ],
)
def test_only_the_launchers_own_m_is_found(line, position):
    """A `-m` before the script or module name is the launcher's; any later one is the user's and must stay as it is."""
    assert launcher_module_flag.module_flag_position(line.split()) == position


def test_every_launcher_option_with_a_value_is_known(monkeypatch):
    """An option of the installed DeepSpeed that takes a value and is missing from our table would hide a later `-m`."""
    from deepspeed.launcher import runner

    seen = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, args=None: seen.append(parser))
    runner.parse_args([])
    options = [action for action in seen[0]._actions if action.option_strings]
    with_value = {name for action in options if action.nargs is None for name in action.option_strings}
    without = {name for action in options if action.nargs == 0 for name in action.option_strings}
    known = {*launcher_module_flag.SHORT_WITH_VALUE, *launcher_module_flag.LONG_WITH_VALUE}
    assert len(with_value) > 10
    assert with_value <= known
    assert not without & known
    assert "-m" not in with_value | without  # the day DeepSpeed takes -m itself, the start-up line can go


def test_other_programs_are_left_alone(tmp_path, monkeypatch):
    """A program that is merely called `ds`, or a missing file, keeps its arguments: no interference."""
    other = tmp_path / "ds"
    other.write_text("#!/usr/bin/env python3\nprint('another ds')\n")
    real = tmp_path / "deepspeed"
    real.write_text("#!/usr/bin/env python3\nfrom deepspeed.launcher.runner import main\n")
    for program, expected in ((other, "-m"), (tmp_path / "absent/deepspeed", "-m"), (real, "--module")):
        monkeypatch.setattr(sys, "argv", [str(program), "-m", "x"])
        launcher_module_flag.accept_dash_m()
        assert sys.argv == [str(program), expected, "x"]
    for arguments in ([], [""], None):
        monkeypatch.setattr(sys, "argv", arguments)
        launcher_module_flag.accept_dash_m()  # an embedded or interactive Python; must not raise


TOY_MODULE = """
import os, sys
with open("seen by rank " + os.environ["RANK"], "w") as out:  # not printed: lines of two ranks may run together
    print(os.environ["WORLD_SIZE"], sys.argv[2:], file=out)
"""


@pytest.mark.parametrize("flag", ["-m", "--module"])
def test_the_real_deepspeed_command(tmp_path, flag):
    """`deepspeed --num_gpus 2 -m module` starts two ranks as `--module` does, and the module's own `-m` reaches it."""
    try:
        importlib.metadata.version("bge_ds")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("bge_ds is not installed, so its start-up line is not either")
    (tmp_path / "toy_module.py").write_text(TOY_MODULE)
    port = str(helpers.free_port())
    command = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", port, flag, "toy_module", "-m", "7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"seen by rank {rank}").read_text() for rank in (0, 1)] == ["2 ['-m', '7']\n"] * 2


def test_a_wheel_carries_the_start_up_line_and_the_configs(tmp_path):
    """Without its `*.pth` an installed package refuses `-m`; without the JSON files it knows no `--deepspeed zero1`."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (helpers.REPO / name).exists():
            shutil.copy(helpers.REPO / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("bge_ds", "ds_configs"):
        shutil.copytree(helpers.REPO / name, source / name, ignore=ignored)
    build = [sys.executable, "-c", "import setuptools.build_meta as b; b.build_wheel('..')"]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        line = archive.read("bge_ds_startup.pth").decode()
    configs = {f"bge_ds/ds_configs/{path.name}" for path in (helpers.REPO / "ds_configs").glob("*.json")}
    assert configs and configs <= set(names)
    assert "bge_ds/deepspeed_engine/launcher_module_flag.py" in names
    assert line.startswith("import ") and line.count("\n") == 1  # Python runs a *.pth line only if it begins so


def test_the_start_up_line_costs_other_programs_nothing():
    """A Python program that is not `deepspeed` starts without importing anything of ours."""
    found = subprocess.run(
        [sys.executable, "-c", "import sys; print([m for m in sys.modules if m.startswith('bge_ds')])"],
        cwd="/", capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert found.stdout.strip() == "[]"
    assert not found.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    """Every launch script is valid bash (checked without running it) and can be executed unless it is only sourced."""
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(script, os.X_OK) or script.name == "environment.sh"


def test_multinode_refuses_what_would_crash_later(tmp_path):
    """A missing hostfile, and a comment in `.deepspeed_env`, are errors before any host is touched."""
    launch = tmp_path / "launch"
    shutil.copytree(helpers.REPO / "launch", launch, ignore=shutil.ignore_patterns(".deepspeed_env"))
    script = launch / "finetune_multinode.sh"
    env = {**os.environ, "HOSTFILE": str(tmp_path / "absent")}
    done = subprocess.run([script], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "no hostfile" in done.stderr
    (launch / ".deepspeed_env").write_text("A=1\n\n# a comment\n")
    env["HOSTFILE"] = str(launch / "hostfile")
    done = subprocess.run([script], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "2:\n3:# a comment" in done.stderr


def test_the_sample_environment_file_has_only_assignments():
    """A blank or comment line in `.deepspeed_env` crashes DeepSpeed's reader on the first host."""
    lines = (helpers.REPO / "launch/deepspeed_env.sample").read_text().split("\n")
    assert lines.pop() == ""  # the file ends with a newline, and no line is empty
    assert lines and all(line.count("=") >= 1 and line.split("=")[0].isidentifier() for line in lines)


def test_the_sample_hostfile_is_one_that_deepspeed_reads():
    """The sample is parsed by DeepSpeed itself, so that copying it and changing the names is enough."""
    from deepspeed.launcher.runner import _parse_hostfile

    hosts = _parse_hostfile((helpers.REPO / "launch/hostfile").read_text().splitlines())
    assert len(hosts) == 2 and all(slots > 0 for slots in hosts.values())
