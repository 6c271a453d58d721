"""Triton's interpreter, in which kernels run on the CPU, in Python.

Triton decides at its first import whether it interprets. So a file of tests has one that runs the whole file again in a
process that has asked for it, and its tests ask for `INTERPRETED`, or are marked `only`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import helpers
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
only = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: another test of this file runs it")
runs_again = pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="needs triton; this process may interpret")


def run_again(file: str, *options: str) -> None:
    """All tests of the file, in the interpreter; options go to pytest. AssertionError with its words where one fails."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, file]
    environment = {**helpers.environment(), "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=helpers.REPO, env=environment)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
