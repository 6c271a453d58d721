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
class Member:
    """A rank as others name it. host: name, and address where it is another host than rank 0's. local: rank on its host."""

    rank: int
    host: str
    pid: int
    local: int

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


LONGEST_UNKNOWN = 1 << 24  # bytes of one line; the names of 100,000 ranks fit


class Link:
    """A connection to another rank: lines of JSON each way. member: who is there; unknown until it has said so."""

    def __init__(self, sock: socket.socket):
        self.sock, self.member, self.heard, self._rest = sock, None, time.monotonic(), b""
        self.over = False  # it said goodbye, or failed: its end is no loss
        self.failed = False
        sock.settimeout(5)  # sending waits only where the buffer of many minutes of heartbeats is full
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: str, **content) -> None:
        # A link that breaks here is found broken when it is read: one place decides what that means.
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """The messages that have arrived; None: the other end is closed. Raises ValueError for what is no message."""
        try:
            data = self.sock.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        if self.member is None and len(self._rest) + len(data) > LONGEST_UNKNOWN:
            raise ValueError("too long for one that has not said who it is")
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def wait(self, seconds: float, worthwhile: Callable[[], bool]) -> list[dict]:
        """The first messages. Raises OSError where the other end closes or says nothing for so long, or where waiting for it
        is no longer worthwhile, which is asked each second."""
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
