"""The hosts of a run as DeepSpeed's launcher takes them: the hostfile, the variables it forwards, a talk with each host.

Standard library only: what starts here must start where half an environment is missing.
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

MARK = "bge_ds-doctor: "  # in front of each answer; whatever else a host prints has none
NO_FOLDER, NO_PYTHON = 113, 114  # statuses of `on_host`'s shell
SSH_LOST = 255
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)(\s*|\s+#.*)")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
# DeepSpeed forwards the launching shell's variables whose names begin so, and no others.
_FORWARDED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


def read_hostfile(path: str) -> dict[str, int]:
    """Host -> slots, in the file's order. Raises ValueError for what DeepSpeed refuses, and for what it takes wrongly."""
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
    """(what the launcher sets on every host, the .deepspeed_env files that it reads for that).

    Raises ValueError, naming file and line, where the launcher would crash or the hosts' shells would stumble.
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
        # As the launcher does it: double quotes, in which the host's shell still replaces $PATH.
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


class Silence(Exception):
    """A host gave no answer. status: of the ended process, None where it runs on without a word. said: its last lines."""

    def __init__(self, status: int | None, said: list[str]):
        super().__init__(f"status {status}", said)
        self.status, self.said = status, said


class Talk:
    """A probe on some host: one JSON question a line in, one answer a line out. It ends when its input does."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self.said: deque[str] = deque(maxlen=20)
        self._answers: queue.Queue[dict | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            before, mark, answer = line.partition(MARK)
            if before.strip():
                self.said.append(before.strip())
            if mark:
                self._answers.put(json.loads(answer))
        self._answers.put(None)

    def ask(self, timeout_s: float, do: str, **details) -> dict:
        """The answer, with `sent` and `received`, seconds of this machine's clock. Raises Silence."""
        sent = time.time()
        with contextlib.suppress(OSError):  # it has ended: its answer below is none, with what it printed
            self.process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self.process.stdin.flush()
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise Silence(None, list(self.said)) from None
        if answer is None:
            self._answers.put(None)  # for who asks again
            raise Silence(self.process.wait(), list(self.said))
        return {**answer, "sent": sent, "received": time.time()}

    def close(self) -> None:
        """Ends the probe, which takes back what it made."""
        with contextlib.suppress(OSError):  # it ended with a question unread
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
