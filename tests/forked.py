"""Python processes that begin with torch, DeepSpeed and bge_ds imported: forked by a server that has imported them once.

Starting a rank takes seconds of imports, and the tests start hundreds. `Process` is what `subprocess.Popen` is for a program
of `tests/programs`. Where there is a GPU, processes are started the ordinary way: CUDA does not survive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

import programs

REPO = Path(__file__).resolve().parent.parent


class Process:
    """A forked process that runs a program of `tests/programs`. stdout, stderr: file descriptors."""

    def __init__(
        self, server: str | Path, program: str, args: list[str], env: dict[str, str], stdout: int, stderr: int, cwd: Path
    ):
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(server))
        request = json.dumps({"program": program, "args": args, "env": env, "cwd": str(cwd)}).encode()
        socket.send_fds(self._socket, [len(request).to_bytes(8, "little")], [stdout, stderr])
        self._socket.sendall(request)
        self._lines = self._socket.makefile()
        self.pid = int(self._lines.readline())

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, below 0 of a signal. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            readable = selectors.DefaultSelector()
            with readable:
                readable.register(self._socket, selectors.EVENT_READ)
                if not readable.select(timeout):
                    raise subprocess.TimeoutExpired("a forked rank", timeout or 0)
            self.returncode = int(self._lines.readline())
            self._lines.close()
            self._socket.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@functools.cache
def server() -> Path | None:
    """The socket of this session's server, which is started when first asked for; None where there is a GPU."""
    import torch

    if torch.cuda.is_available() or not hasattr(os, "fork"):
        return None
    path = Path(tempfile.mkdtemp(prefix="bge-ds-forks-")) / "server"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    process = subprocess.Popen([sys.executable, __file__, "serve", path], env=environment, stdout=subprocess.PIPE, text=True)
    atexit.register(process.wait)
    atexit.register(process.kill)
    assert process.stdout.readline() == "ready\n"
    return path


# ------------------------------------------------------------------------------------------------ the server


def serve(path: str) -> tuple[dict, list[int]]:
    """Answer for ever. Comes back in each forked process only, with what it is asked to be and its two streams."""
    import cpuinfo
    import deepspeed  # noqa: F401
    import sentence_transformers  # noqa: F401

    from bge_ds import evaluate, finetune, pretrain, rerank  # noqa: F401
    from bge_ds.objectives import contrastive, reranking, retromae  # noqa: F401
    from bge_ds.training import command, loop  # noqa: F401

    # DeepSpeed asks for the processor each time it makes a CPUAdam, which takes a second in a process of its own.
    processor = cpuinfo.get_cpu_info()
    cpuinfo.get_cpu_info = lambda: dict(processor)

    # DeepSpeed imports it when it first wraps a model, and with it the whole of torch's compiler.
    with contextlib.suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")

    children: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as asked:
        listener.bind(path)
        listener.listen()
        asked.register(listener, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in asked.select(0.01):
                if key.fileobj is not listener:  # whoever asked for the process is gone
                    asked.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
                    continue
                connection, _ = listener.accept()
                size, streams, *_ = socket.recv_fds(connection, 8, 2)
                request = connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
                pid = os.fork()
                if pid == 0:
                    for held in (connection, *children.values()):
                        held.close()
                    return json.loads(request), streams
                for stream in streams:
                    os.close(stream)
                connection.sendall(f"{pid}\n".encode())
                children[pid] = connection
                asked.register(connection, selectors.EVENT_READ, pid)
            while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with children.pop(ended[0]) as connection, contextlib.suppress(BrokenPipeError, KeyError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
                    asked.unregister(connection)


def become(wanted: dict, streams: list[int]) -> None:
    """This process is now what `python tests/programs PROGRAM ARGS` would be, its imports done."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, stream in enumerate([nothing, *streams]):
        os.dup2(stream, descriptor)
        os.close(stream)
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        programs.run(wanted["program"], *wanted["args"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    # All that Python does at its end but taking a thousand modules apart, which takes a second.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ask(path: str, number: int, program: str, words: list[str]) -> int:
    """Be a launcher: run a program of `tests/programs` as ranks of one group; their status.

    When one has failed, the others have a minute to end by themselves.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(sock.getsockname()[1])}  # fmt: skip
    environments = [{**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    ranks = [Process(path, program, words, environment, 1, 2, Path.cwd()) for environment in environments]
    deadline = None
    while None in [rank.poll() for rank in ranks]:
        if deadline is None and any(rank.returncode for rank in ranks):
            deadline = time.monotonic() + 60
        if deadline and time.monotonic() > deadline:
            print("ranks did not end within a minute of another's death", file=sys.stderr)
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    failed = [rank.returncode for rank in ranks if rank.returncode]
    return 0 if not failed else failed[0] if failed[0] > 0 else 128 - failed[0]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        become(*serve(sys.argv[2]))
    else:
        sys.exit(ask(sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:]))
