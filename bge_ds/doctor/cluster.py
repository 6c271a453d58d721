"""The hosts of a run as DeepSpeed's launcher sees them: the hostfile, the variables it forwards, a probe process on each host.

Standard library only: a probe must start, and say what is missing, where the environment is incomplete.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

ANSWER = "bge_ds-doctor: "  # precedes each answer, to tell it from other output
NO_FOLDER, NO_PYTHON = 113, 114  # exit statuses of `on_host`'s shell
SSH_FAILED = 255
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)(\s*|\s+#.*)")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
# DeepSpeed forwards the launching shell's variables with these prefixes, and no others.
_FORWARDED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


def read_hostfile(path: str) -> dict[str, int]:
    """Host -> slots, in the file's order. Raises ValueError for what DeepSpeed refuses or misreads."""
    valid = "valid are lines NAME slots=N, N at least 1, such as `worker-1 slots=8`, blank lines and lines that begin with #"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--hostfile {path}: cannot be read ({error}); name a text file: {valid}") from None
    hosts: dict[str, int] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        where = f"{path}:{number}: {line!r}"
        match = _LINE.fullmatch(line)
        if match is None or int(match["slots"]) < 1:
            raise ValueError(f"{where} is no host and its slots; {valid}")
        name = match["name"]
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{where}: {name!r} is no name that ssh and pdsh take alike; name one host a line, without patterns"
            )
        if name in hosts:
            raise ValueError(f"{where}: {name} stands in line {seen[name]} already; keep one line, with the slots of both")
        hosts[name], seen[name] = int(match["slots"]), number
    if not hosts:
        raise ValueError(f"{path}: names no host; {valid}")
    return hosts


def forwarded_variables() -> tuple[dict[str, str], list[str]]:
    """(variables that the launcher sets on every host, the .deepspeed_env files that it reads them from).

    Raises ValueError, naming file and line, for a line that the launcher or the hosts' shells cannot take.
    """
    found = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = [os.path.join(folder, name) for folder in (os.path.expanduser("~"), ".")]
    paths = [path for path in dict.fromkeys(map(os.path.abspath, paths)) if os.path.isfile(path)]
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None
        for number, line in enumerate(lines, start=1):
            if not _VARIABLE.match(line):
                raise ValueError(
                    f"{path}:{number}: {line!r} is no NAME=value, and the launcher's reader stops at it; "
                    "remove the line (blank and comment lines too)"
                )
            variable, value = line.split("=", 1)
            found[variable] = value.strip()
    return found, paths


def on_host(host: str, variables: dict[str, str], module: str, *arguments: str) -> list[str]:
    """The ssh command that runs a module of this Python on a host, in this folder, with the launcher's variables."""
    exports = ""
    for name, value in variables.items():
        # As the launcher does: in double quotes the host's shell still expands $PATH.
        plain = not re.search(r"[^\w@%+=:,./-]", value)
        exports += f"export {name}={value}; " if plain else f'export {name}="{value}"; '
    python = shlex.quote(sys.executable)
    words = " ".join(map(shlex.quote, ["-u", "-m", module, *arguments]))
    script = (
        f"{exports}cd {shlex.quote(os.getcwd())} || exit {NO_FOLDER}; "
        f"test -x {python} || exit {NO_PYTHON}; exec {python} {words}"
    )
    options = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *options, host, script]


class NoAnswer(Exception):
    """A host gave no answer. status: exit status of its process, None: it still runs. printed: its last lines."""

    def __init__(self, status: int | None, printed: list[str]):
        super().__init__(f"status {status}", printed)
        self.status, self.printed = status, printed


class ProbeProcess:
    """A probe on a host: it reads one JSON question a line and prints one answer a line, until its input ends."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self._printed: deque[str] = deque(maxlen=20)
        self._answers: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            before, found, answer = line.partition(ANSWER)
            if before.strip():
                self._printed.append(before.strip())
            if found:
                self._answers.put(json.loads(answer))
        self._answers.put(None)

    def ask(self, timeout_s: float, do: str, **details) -> dict:
        """The answer, with `sent` and `received`, seconds of this machine's clock. Raises NoAnswer."""
        sent = time.time()
        with contextlib.suppress(OSError):  # the process has ended: `_read` has queued None
            self.process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self.process.stdin.flush()
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise NoAnswer(None, list(self._printed)) from None
        if answer is None:
            self._answers.put(None)  # for the next question
            raise NoAnswer(self.process.wait(), list(self._printed))
        return {**answer, "sent": sent, "received": time.time()}

    def close(self) -> None:
        """Ends the probe, which removes what it made."""
        with contextlib.suppress(OSError):  # it ended before it read a question
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
