"""Starts the ranks of a command without importing everything again: a process that has it all forks them when asked.

    python ranks_server.py SOCKET                      the server
    python ranks_server.py SOCKET NUMBER HOOK WORDS    asks it for NUMBER ranks of `bge_ds.finetune WORDS`; ends as they do

HOOK is a Python file that each rank executes first, or "". Like a launcher, the server ends the other ranks when one has
failed, after a while in which they may end by themselves. Standard output and error are the asking process's.
"""

from __future__ import annotations

import array
import json
import os
import runpy
import signal
import socket
import sys
import time

import helpers

PATIENCE = 60  # seconds for the others, when one has failed


def ask(path: str, number: str, hook: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        request = json.dumps([int(number), hook, words, os.getcwd()]).encode()
        streams = array.array("i", [1, 2])
        sock.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        sock.shutdown(socket.SHUT_WR)
        return json.loads(sock.makefile().read())


def serve(path: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401

    from bge_ds import finetune  # noqa: F401

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                request, streams, *_ = socket.recv_fds(connection, 1 << 20, 2)
                status = start(*json.loads(request), streams)
                for stream in streams:
                    os.close(stream)
                connection.sendall(json.dumps(status).encode())


def start(number: int, hook: str, words: list[str], folder: str, streams: list[int]) -> int:
    """The first status of a rank that is not 0 (a signal's number below 0, as `subprocess` has it), or 0."""
    port = helpers.free_port()
    ranks = {}
    for rank in range(number):
        pid = os.fork()
        if pid == 0:
            become(rank, number, port, hook, words, folder, streams)
        ranks[pid] = rank
    first, deadline = 0, None
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            del ranks[pid]
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first, deadline = code, time.monotonic() + PATIENCE
        elif deadline and time.monotonic() > deadline:
            os.write(streams[1], f"the server ends ranks {sorted(ranks.values())}, which did not end\n".encode())
            for left in ranks:
                os.kill(left, signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.01)
    return first if first >= 0 else 128 - first


def become(rank: int, number: int, port: int, hook: str, words: list[str], folder: str, streams: list[int]) -> None:
    """This process becomes the rank: it does not come back."""
    status = 1
    try:
        os.dup2(streams[0], 1)
        os.dup2(streams[1], 2)
        os.chdir(folder)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(number),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        if hook:
            runpy.run_path(hook)
        from bge_ds import finetune

        status = finetune.main(words)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        sys.exit(ask(*sys.argv[1:4], sys.argv[4:]))
