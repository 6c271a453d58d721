"""Connections between ranks: lines of JSON each way."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A rank, as messages name it. host: name, and address if it is not rank 0's host. local: rank on its host."""

    rank: int
    host: str
    pid: int
    local: int

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


LONGEST_LINE = 1 << 24  # bytes, of an unknown peer; the names of 100,000 ranks fit


class Connection:
    """A connection to another rank. peer: that rank; None until it has named itself. last_received: monotonic seconds."""

    def __init__(self, sock: socket.socket):
        self.sock, self.last_received, self._rest = sock, time.monotonic(), b""
        self.peer: Peer | None = None
        self.ended = False  # it has said goodbye or failed: when it closes, the rank is not lost
        self.failed = False
        sock.settimeout(5)  # sending waits only when the buffer, which holds many minutes of heartbeats, is full
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: str, **content) -> None:
        # A broken connection is noticed when it is read: one place decides what that means.
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """The messages that have arrived; None: the other end is closed. Raises ValueError for anything else."""
        try:
            data = self.sock.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        self.last_received = time.monotonic()
        if self.peer is None and len(self._rest) + len(data) > LONGEST_LINE:
            raise ValueError("too long a message of an unknown peer")
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def wait(self, seconds: float, worthwhile: Callable[[], bool]) -> list[dict]:
        """The first messages. Raises OSError where the other end closes, sends nothing for so long, or where `worthwhile`,
        which is called each second, returns False."""
        until, ready = time.monotonic() + seconds, select.poll()
        ready.register(self.sock, select.POLLIN)
        messages: list[dict] | None = []
        while messages is not None and time.monotonic() < until:
            if ready.poll(1000):
                messages = self.receive()
                if messages:
                    return messages
            elif not worthwhile():
                break
        self.sock.close()
        raise ConnectionError("no answer")
