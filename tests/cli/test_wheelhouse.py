"""Wheels for a machine without a network: small, whole, and enough to train with."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile

import helpers
import pytest


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder of wheels for Python 3.12, as the script makes it."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [helpers.REPO / "launch/wheelhouse.sh", folder, "3.12"]
    environment = {**helpers.environment(), "PYTHON": sys.executable}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    if result.returncode and any(words in result.stderr for words in ("Failed to establish", "Temporary failure", "timed out")):
        pytest.skip("no package index can be reached")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "--no-index --no-deps" in result.stdout
    return folder


def test_it_is_small_and_for_the_python_asked_for(wheels):
    """Under 40 MiB; compiled wheels are those of the other machine's Python, whatever Python runs the script."""
    files = sorted(wheels.glob("*.whl"))
    assert sum(file.stat().st_size for file in files) < 40 << 20
    names = {file.name.split("-")[0] for file in files}
    assert {"bge_ds", "deepspeed", "orjson", "ir_measures", "pydantic_core"} <= names
    assert not names & {"torch", "transformers", "triton", "numpy", "pyarrow"}
    compiled = [file.name for file in files if "-cp" in file.name]
    assert compiled and all("-cp312-cp312-" in name or "-abi3-" in name for name in compiled)


def test_the_wheel_of_bge_ds_is_whole(wheels):
    """Its configs and the start-up line that lets `deepspeed` take -m come along, and all that it requires."""
    (wheel,) = wheels.glob("bge_ds-*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        (metadata,) = [content.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    assert {"bge_ds/finetune.py", "bge_ds/ds_configs/zero3.json", "bge_ds_startup.pth"} <= set(names)
    lines = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    required = {re.split(r"[^\w.-]", line.removeprefix("Requires-Dist: "))[0].replace("-", "_") for line in lines}
    left_out = {"torch", "transformers", "tokenizers", "numpy", "filelock", "tqdm", "safetensors", "datasets", "pyarrow"}
    assert len(required) > 12 and required - left_out <= {file.name.split("-")[0] for file in wheels.glob("*.whl")}


def test_what_it_cannot_do_is_said(tmp_path):
    """A version that is none is an error before anything is fetched."""
    result = subprocess.run([helpers.REPO / "launch/wheelhouse.sh", tmp_path, "twelve"], capture_output=True, text=True)
    assert result.returncode == 2 and "'twelve' is no version of Python; give it as 3.12" in result.stderr
