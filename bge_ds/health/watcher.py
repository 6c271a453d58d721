"""The watching thread of a rank: heartbeats, lost ranks, failures, signals, and the end of the process.

The process ends by `os._exit`: a main thread that waits in a collective for a dead rank cannot be interrupted.

The thread takes no lock that is held for longer than two assignments, and writes to file descriptors. It needs the
interpreter's lock, which a library may hold for seconds. So a silent rank is lost only after `SILENCE_S`, and data that has
arrived is read before silence is measured.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch.distributed as dist

from bge_ds.health import exit_codes, rendezvous
from bge_ds.health.connections import Connection, Peer
from bge_ds.health.exit_message import print_at_exit
from bge_ds.health.preemption import CommonStep

BEAT_S = 2.0
TURN_S = 0.5  # between two looks at the clock
SILENCE_S = 30.0  # a run must end within 60 s of a loss; the rest is for ending
GRACE_S = 5.0  # for other ranks that find the same error to print it themselves
STARTUP_GRACE_S = 2.0  # a launcher sends SIGTERM when another rank has died: that loss is to be reported first
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_DIED = "ended without a word: killed, out of memory, or stopped by its host"
_SILENT = f"has been silent for {SILENCE_S:g} s: its host or the network to it is gone, or it hangs"
_GO_ON = "start again with --resume_from_checkpoint auto to resume from the last checkpoint"


class Watcher:
    """The watch of one rank. The main thread calls the methods without underscore; others run in the watching thread."""

    def __init__(self, rank: int, world: int, join_timeout_s: float):
        self.rank, self.world = rank, world
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.store: dist.Store | None = None
        self.joined = threading.Event()
        self.connections: list[Connection] = []  # rank 0: to every other rank; the others: to rank 0
        self.peers: dict[int, Peer] = {}  # all ranks of the run, once all have joined
        self.closed = False
        self._errors = os.dup(2)  # DeepSpeed redirects descriptor 2 to a file for a while
        self._selector = selectors.PollSelector()  # unlike epoll, it has no descriptor that a forked child would share
        self._listener: socket.socket | None = None
        self._secret = secrets.token_hex(8)
        self._here, self._there = socket.socketpair()
        self._here.setblocking(False)
        self._there.setblocking(False)
        self._calls: deque[Callable[[], None]] = deque()
        self._join_timeout_s = join_timeout_s
        self._join_by = time.monotonic() + join_timeout_s
        self._next_turn = self._next_beat = time.monotonic()
        self._ending: tuple[float, int, str, bool] | None = None  # when, status, message, whether this rank prints it
        self._waiting = self._failing = False
        self.stop = CommonStep(world)
        self._startup_ends: float | None = None
        self.handlers: dict[int, object] = {}
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    # The main thread

    def start(self) -> None:
        self._selector.register(self._here, selectors.EVENT_READ, self._run_calls)
        if threading.current_thread() is threading.main_thread():
            # The C handler writes the signal's number at once, whatever the main thread does.
            self._old_fd = signal.set_wakeup_fd(self._there.fileno(), warn_on_full_buffer=False)
            self.handlers = {number: signal.signal(number, _ignore) for number in SIGNALS}
        if self.world == 1:
            self.joined.set()
        self._thread.start()
        if self.rank == 0 and self.world > 1:
            self._host()
        elif self.world > 1:
            self._connect()
        self.joined.wait()  # the thread ends the process where that takes too long

    def _host(self) -> None:
        try:
            self.store, where = rendezvous.host_store(self.world, self._join_timeout_s)
        except RuntimeError as error:
            self._end(exit_codes.FAILED, str(error), say=True)
        listener = rendezvous.listen(self.world)
        self._call(lambda: self._open(listener))
        rendezvous.publish(self.store, where, listener, self._secret)

    def _connect(self) -> None:
        self.store, connection, arrived = rendezvous.find_rank_zero(self.rank, self.world, self.local, self._join_timeout_s)
        self._call(lambda: self._add(connection, arrived[1:]))  # the first is the welcome

    def fail(self, status: int, message: str) -> None:
        self._call(lambda: self._tell_failure(status, message))
        self._thread.join(5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def await_cause(self, seconds: float) -> None:
        self._waiting = True  # read by the next turn
        time.sleep(seconds)

    def leave(self, keep_ignoring: bool) -> None:
        self._call(self._say_goodbye)
        self._thread.join(5)
        if self.handlers:
            for number, handler in self.handlers.items():
                signal.signal(number, signal.SIG_IGN if keep_ignoring else handler)
            signal.set_wakeup_fd(self._old_fd)
        self.close()

    def close(self) -> None:
        """Closes this process's ends of all sockets; a forked child closes its copies so."""
        for sock in (self._here, self._there, self._listener, *(connection.sock for connection in self.connections)):
            if sock is not None:
                sock.close()
        os.close(self._errors)

    def _call(self, function: Callable[[], None]) -> None:
        self._calls.append(function)
        with contextlib.suppress(BlockingIOError):  # full: the thread is being woken already
            self._there.send(b"\0")

    # The watching thread

    def _watch(self) -> None:
        try:
            while not self.closed:
                self._turn()
        except Exception:
            self._end(exit_codes.FAILED, f"the watch of rank {self.rank} failed:\n{traceback.format_exc()}", say=True)

    def _turn(self) -> None:
        for key, _ in self._selector.select(max(0.0, self._next_turn - time.monotonic())):
            key.data()
        if self.closed:
            return
        self._lose([connection for connection in self.connections if connection.sock.fileno() < 0], _DIED)
        now = time.monotonic()
        if (late := now - self._next_turn) > BEAT_S:  # this process was suspended and received nothing meanwhile
            for connection in self.connections:
                connection.last_received += late
        self._next_turn = now + TURN_S
        self._lose([connection for connection in self.connections if now - connection.last_received > SILENCE_S], _SILENT)
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            self._send_all("beat")
        if not self.joined.is_set() and now > self._join_by:
            self._miss()
        if self._startup_ends is not None and now > self._startup_ends:
            self._startup_ends = None
            self._stop_or_end()
        if self._ending is not None and (now > self._ending[0] or self._waiting):
            self._end(*self._ending[1:])

    def _run_calls(self) -> None:
        numbers = dict.fromkeys(number for number in self._here.recv(1 << 12) if number in SIGNALS)
        while self._calls:
            self._calls.popleft()()
        for number in numbers:
            self._signal(signal.Signals(number).name)

    def _open(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has disconnected already
            self._add(Connection(self._listener.accept()[0]))

    def _add(self, connection: Connection, arrived: Sequence[dict] = ()) -> None:
        self.connections.append(connection)
        self._selector.register(connection.sock, selectors.EVENT_READ, lambda: self._read(connection))
        for message in arrived:
            self._take(connection, message)

    def _drop(self, connection: Connection) -> None:
        """Closes a connection; one of a rank that has not ended stays in the list, for `_lose`."""
        self._selector.unregister(connection.sock)
        connection.sock.close()
        if connection.ended or self._is_unknown(connection):
            self.connections.remove(connection)

    def _is_unknown(self, connection: Connection) -> bool:
        """On rank 0, of a peer that has not named itself: it may be a port scanner."""
        return self.rank == 0 and connection.peer is None

    def _read(self, connection: Connection) -> None:
        try:
            messages = connection.receive()
            if messages is None:
                self._drop(connection)
                return
            for message in messages:
                self._take(connection, message)
        except (ValueError, KeyError, TypeError, RecursionError):
            if not self._is_unknown(connection):
                raise
            self._drop(connection)

    def _take(self, connection: Connection, message: dict) -> None:
        if self._is_unknown(connection):
            self._welcome(connection, **message)
        else:
            getattr(self, "_on_" + message.pop("kind"))(connection, **message)

    def _welcome(self, connection: Connection, kind: str, secret: str, rank: int, name: str, pid: int, local: int) -> None:
        # A rank that has joined before belongs to the next run, whose rank 0 has not started yet.
        known = {other.peer.rank for other in self.connections if other.peer} | self.peers.keys()
        if kind != "hello" or secret != self._secret or rank in known or not 0 < rank < self.world:
            raise ValueError("not a rank of this run")
        theirs, ours = connection.sock.getpeername()[0], connection.sock.getsockname()[0]
        here = theirs == ours or theirs.removeprefix("::ffff:").startswith("127.") or theirs == "::1"
        host = rendezvous.own_host() if here else f"{name}, {theirs.removeprefix('::ffff:')}"
        connection.peer = Peer(rank, host, pid, local)
        connection.send("welcome")
        if len(known) + 1 < self.world - 1:
            return
        own = Peer(0, rendezvous.own_host(), os.getpid(), self.local)
        self.peers = {peer.rank: peer for peer in [own, *(other.peer for other in self.connections if other.peer)]}
        self._send_all("all", peers=[asdict(peer) for peer in self.peers.values()])
        self.joined.set()

    def _miss(self) -> None:
        """Not all ranks have joined in time."""
        waited = f"after {self._join_timeout_s:g} s (--join_timeout)"
        if self.rank == 0:
            there = {0} | {connection.peer.rank for connection in self.connections if connection.peer}
            self._end_all(exit_codes.LOST, rendezvous.describe_absent(self.world, there, waited))
        elif not self.connections:  # else rank 0 reports which ranks are missing
            self._end(exit_codes.LOST, rendezvous.describe_no_answer(waited), say=self.local == 0)

    def _send_all(self, kind: str, **content) -> None:
        for connection in self.connections:
            connection.send(kind, **content)

    def _on_all(self, connection: Connection, peers: list[dict]) -> None:
        self.peers = {peer["rank"]: Peer(**peer) for peer in peers}
        connection.peer = self.peers[0]
        self.joined.set()

    def _on_beat(self, connection: Connection) -> None:
        """`receive` has noted the time."""

    def _on_bye(self, connection: Connection) -> None:
        connection.ended = True

    def _lose(self, connections: list[Connection], what: str) -> None:
        """Connections of ranks that died or are silent end the run; those of unknown peers are closed."""
        lost = []
        for connection in connections:
            if self._is_unknown(connection):
                self._drop(connection)
            elif not connection.ended:
                lost.append(connection)
        if not lost or self._ending is not None:
            return
        for connection in lost:
            connection.ended = True
        address, port = rendezvous.master_address()
        names = " and ".join(str(connection.peer or f"rank 0 (at {address}:{port})") for connection in lost)
        self._end_all(exit_codes.LOST, f"{names} {what}; {_GO_ON}")

    def _on_failed(self, connection: Connection, status: int, message: str) -> None:
        connection.ended = connection.failed = True
        self._end_all(status, f"{connection.peer} failed: {message}", grace=GRACE_S)

    def _on_end(self, connection: Connection, status: int, message: str, grace: float, say: bool) -> None:
        connection.ended = True  # rank 0 ends as well
        self._end_soon(status, message, grace, say)

    def _tell_failure(self, status: int, message: str) -> None:
        """The last message of this rank."""
        self._failing = self.closed = True
        if self.rank == 0:
            self._tell_end(status, f"{self.peers.get(0, 'rank 0')} failed: {message}", GRACE_S)
        else:
            self._send_all("failed", status=status, message=message)

    def _end_all(self, status: int, message: str, grace: float = 0.0) -> None:
        """Ends the whole run on rank 0; on another rank, which has lost rank 0, this process."""
        if self.rank == 0:
            say = self._tell_end(status, message, grace)
        else:
            on_host = [peer.rank for peer in self.peers.values() if peer.rank and peer.host == self.peers[self.rank].host]
            say = self.rank == min(on_host, default=self.rank)
        self._end_soon(status, message, grace, say)

    def _tell_end(self, status: int, message: str, grace: float) -> bool:
        """Tells the other ranks, of which one a host prints the message. Returns whether this rank is to print it.

        Where the first rank of a host has failed, that rank has printed its error already.
        """
        told = {connection.peer.host for connection in self.connections if connection.failed and connection.peer.local == 0}
        say = not self._failing and rendezvous.own_host() not in told
        told.add(rendezvous.own_host())
        for connection in sorted((x for x in self.connections if x.peer and not x.ended), key=lambda x: x.peer.rank):
            connection.send("end", status=status, message=message, grace=grace, say=connection.peer.host not in told)
            told.add(connection.peer.host)
        return say

    def _end_soon(self, status: int, message: str, grace: float, say: bool) -> None:
        if self._ending is None:
            self._ending = (time.monotonic() + grace, status, message, say)

    def _say_goodbye(self) -> None:
        self._send_all("bye")
        self.closed = True

    def _end(self, status: int, message: str, say: bool) -> None:
        """Ends this process."""
        if say:
            text = message if status == exit_codes.PREEMPTED else f"error: {message}"
            print_at_exit(text + "\n", self._errors)
        if self.rank == 0:
            time.sleep(0.5)  # so that what was sent arrives before the connection closes
        os._exit(status)

    # Stopping at one step

    def _on_signal(self, connection: Connection, name: str) -> None:
        self._signal(name, str(connection.peer))

    def _signal(self, name: str, by: str = "") -> None:
        if self.closed:
            return
        if self._ending is not None:  # already ending: the launcher does not want to wait
            self._end(*self._ending[1:])
        if self.rank and self.connections:
            self._send_all("signal", name=name)
        elif not self.stop.by and (self.rank == 0 or not self.joined.is_set()):
            self.stop.by = f"{name} to {by or self.peers.get(0) or f'rank {self.rank}'}"
            if self.stop.reached is None:
                self._startup_ends = time.monotonic() + (STARTUP_GRACE_S if self.world > 1 else 0)
            else:
                self._stop_or_end()

    def _stop_or_end(self) -> None:
        """After a signal: agrees on a common last step or, before the first step, ends the run."""
        if self.stop.reached is not None:
            if self.world > 1:
                self._propose()
            return
        # Before all ranks have joined, a launcher's SIGTERM may be the only sign that another rank has died.
        lost = self.stop.by.startswith("SIGTERM") and not self.joined.is_set()
        then = "not all ranks had come: one may have died" if lost else "nothing was to be saved"
        status = exit_codes.LOST if lost else exit_codes.PREEMPTED
        self._end_all(status, f"stopped by {self.stop.by} before the first step; {then}; {_GO_ON}")

    def _propose(self) -> None:
        step = self.stop.propose()
        self._send_all("propose", step=step, by=self.stop.by)

    def _on_propose(self, connection: Connection, step: int, by: str) -> None:
        self.stop.by = by
        connection.send("at", step=self.stop.hold(step), proposal=step)

    def _on_at(self, connection: Connection, step: int, proposal: int) -> None:
        all_hold = self.stop.answer(connection.peer.rank, step, proposal)
        if all_hold is None:
            return
        if not all_hold:
            self._propose()
            return
        self._send_all("agreed")
        self.stop.agree()

    def _on_agreed(self, connection: Connection) -> None:
        self.stop.agree()


def _ignore(number: int, frame) -> None:
    """Handler of the signals that the watching thread reads from its socket; without one, they would end the process."""
