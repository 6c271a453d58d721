"""The watching thread of a rank: heartbeats, lost ranks, failures and signals, and the end of the process.

Ending is `os._exit`: a main thread that waits in a collective for a dead rank cannot be asked to leave.

The thread takes no lock that is held for longer than two assignments, and writes by file descriptor. It needs the
interpreter's lock, which a library may hold for seconds: that is why silence counts as death only after `SILENCE_S`, and why
data that has arrived is read before silence is judged.
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
from bge_ds.health.connections import Link, Member
from bge_ds.health.exit_message import print_at_exit
from bge_ds.health.preemption import CommonStep

BEAT_S = 2.0
TURN_S = 0.5  # between two looks at the clock
SILENCE_S = 30.0  # a run must end within 60 s of a loss; the rest is for ending
GRACE_S = 5.0  # for ranks that find the same mistake as another, to say so themselves
STARTUP_GRACE_S = 2.0  # a launcher sends SIGTERM when another rank has died: the death has the word first
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_GO_ON = "start again with --resume_from_checkpoint auto to go on from the last checkpoint"


class Watcher:
    """The watch of one rank. Methods without an underscore are the main thread's; all others run in the watching thread."""

    def __init__(self, rank: int, world: int, join_timeout_s: float):
        self.rank, self.world = rank, world
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.store: dist.Store | None = None
        self.joined = threading.Event()
        self.links: list[Link] = []  # rank 0: to every other rank; the others: to rank 0
        self.members: dict[int, Member] = {}  # of the whole run, once all have joined
        self.closed = False
        self._errors = os.dup(2)  # DeepSpeed's probes point 2 to a file of their own for a while
        self._selector = selectors.PollSelector()  # no descriptor of its own that a forked child would share
        self._listener: socket.socket | None = None
        self._secret = secrets.token_hex(8)
        self._here, self._there = socket.socketpair()
        self._here.setblocking(False)
        self._there.setblocking(False)
        self._orders: deque[Callable[[], None]] = deque()
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
        self._selector.register(self._here, selectors.EVENT_READ, self._take_orders)
        if threading.current_thread() is threading.main_thread():
            # Written by the C handler, at once, whatever the main thread is in.
            self._old_fd = signal.set_wakeup_fd(self._there.fileno(), warn_on_full_buffer=False)
            self.handlers = {number: signal.signal(number, _noted_elsewhere) for number in SIGNALS}
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
        self._order(lambda: self._open(listener))
        rendezvous.publish(self.store, where, listener, self._secret)

    def _connect(self) -> None:
        self.store, link, arrived = rendezvous.call_rank_zero(self.rank, self.world, self.local, self._join_timeout_s)
        self._order(lambda: self._add(link, arrived[1:]))  # the first is the welcome

    def fail(self, status: int, message: str) -> None:
        self._order(lambda: self._tell_failure(status, message))
        self._thread.join(5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def await_cause(self, seconds: float) -> None:
        self._order(self._stop_waiting)
        time.sleep(seconds)

    def leave(self, keep_ignoring: bool) -> None:
        self._order(self._say_goodbye)
        self._thread.join(5)
        if self.handlers:
            for number, handler in self.handlers.items():
                signal.signal(number, signal.SIG_IGN if keep_ignoring else handler)
            signal.set_wakeup_fd(self._old_fd)
        self.close()

    def close(self) -> None:
        """Closes this process's ends of all sockets; also what a forked child does with the copies it has got."""
        for sock in (self._here, self._there, self._listener, *(link.sock for link in self.links)):
            if sock is not None:
                sock.close()
        os.close(self._errors)

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        with contextlib.suppress(BlockingIOError):  # full: the thread has been woken often enough
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
        self._lose([link for link in self.links if link.sock.fileno() < 0], "died")
        now = time.monotonic()
        if (late := now - self._next_turn) > BEAT_S:  # this process stood still: for that long, it heard nobody
            for link in self.links:
                link.heard += late
        self._next_turn = now + TURN_S
        self._lose([link for link in self.links if now - link.heard > SILENCE_S], "silent")
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            for link in self.links:
                link.send("beat")
        if not self.joined.is_set() and now > self._join_by:
            self._miss()
        if self._startup_ends is not None and now > self._startup_ends:
            self._startup_ends = None
            self._stop_or_end()
        if self._ending is not None and (now > self._ending[0] or self._waiting):
            self._end(*self._ending[1:])

    def _take_orders(self) -> None:
        numbers = dict.fromkeys(number for number in self._here.recv(1 << 12) if number in SIGNALS)
        while self._orders:
            self._orders.popleft()()
        for number in numbers:
            self._signal(signal.Signals(number).name)

    def _open(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has gone again
            self._add(Link(self._listener.accept()[0]))

    def _add(self, link: Link, arrived: Sequence[dict] = ()) -> None:
        self.links.append(link)
        self._selector.register(link.sock, selectors.EVENT_READ, lambda: self._read(link))
        for message in arrived:
            self._take(link, message)

    def _drop(self, link: Link) -> None:
        """Close a link; one that has ended without a goodbye stays in the list, for `_lose` to find."""
        self._selector.unregister(link.sock)
        link.sock.close()
        if link.over or self._is_strange(link):
            self.links.remove(link)

    def _is_strange(self, link: Link) -> bool:
        """On rank 0, who has not said which rank it is: a port scanner may call too."""
        return self.rank == 0 and link.member is None

    def _read(self, link: Link) -> None:
        try:
            messages = link.receive()
            if messages is None:
                self._drop(link)
                return
            for message in messages:
                self._take(link, message)
        except (ValueError, KeyError, TypeError, RecursionError):
            if not self._is_strange(link):
                raise
            self._drop(link)

    def _take(self, link: Link, message: dict) -> None:
        if self._is_strange(link):
            self._welcome(link, **message)
        else:
            getattr(self, "_on_" + message.pop("kind"))(link, **message)

    def _welcome(self, link: Link, kind: str, secret: str, rank: int, name: str, pid: int, local: int) -> None:
        # One that has come before is never taken in again: it belongs to the next run, whose rank 0 is yet to come.
        known = {other.member.rank for other in self.links if other.member} | self.members.keys()
        if kind != "hello" or secret != self._secret or rank in known or not 0 < rank < self.world:
            raise ValueError("not a rank of this run")
        theirs, ours = link.sock.getpeername()[0], link.sock.getsockname()[0]
        here = theirs == ours or theirs.removeprefix("::ffff:").startswith("127.") or theirs == "::1"
        host = rendezvous.own_host() if here else f"{name}, {theirs.removeprefix('::ffff:')}"
        link.member = Member(rank, host, pid, local)
        link.send("welcome")
        if len(known) + 1 < self.world - 1:
            return
        members = [
            Member(0, rendezvous.own_host(), os.getpid(), self.local),
            *(other.member for other in self.links if other.member),
        ]
        self.members = {member.rank: member for member in members}
        for other in self.links:
            other.send("all", members=[asdict(member) for member in members])
        self.joined.set()

    def _miss(self) -> None:
        """Not all have joined in time."""
        waited = f"after {self._join_timeout_s:g} s (--join_timeout)"
        if self.rank == 0:
            there = {0} | {link.member.rank for link in self.links if link.member}
            self._end_all(exit_codes.LOST, rendezvous.describe_absent(self.world, there, waited))
        elif not self.links:  # else it is for rank 0 to say who is missing
            self._end(exit_codes.LOST, rendezvous.describe_no_answer(waited), say=self.local == 0)

    def _on_all(self, link: Link, members: list[dict]) -> None:
        self.members = {member["rank"]: Member(**member) for member in members}
        link.member = self.members[0]
        self.joined.set()

    def _on_beat(self, link: Link) -> None:
        """That it came is all it says."""

    def _on_bye(self, link: Link) -> None:
        link.over = True

    def _lose(self, links: list[Link], how: str) -> None:
        """These are gone without a word."""
        for link in links:
            if self._is_strange(link):
                self._drop(link)
        links = [link for link in links if not link.over and not self._is_strange(link)]
        if not links or self._ending is not None:
            return
        for link in links:
            link.over = True
        address, port = rendezvous.meeting_point()
        names = " and ".join(str(link.member or f"rank 0 (at {address}:{port})") for link in links)
        message = {
            "died": f"{names} ended without a word: killed, out of memory, or stopped by its host",
            "silent": f"{names} has been silent for {SILENCE_S:g} s: its host or the network to it is gone, or it hangs",
        }[how]
        self._end_all(exit_codes.LOST, f"{message}; {_GO_ON}")

    def _on_failed(self, link: Link, status: int, message: str) -> None:
        link.over = link.failed = True
        self._end_all(status, f"{link.member} failed: {message}", grace=GRACE_S)

    def _on_end(self, link: Link, status: int, message: str, grace: float, say: bool) -> None:
        link.over = True  # rank 0 ends as well
        self._end_soon(status, message, grace, say)

    def _tell_failure(self, status: int, message: str) -> None:
        """The last that this rank says."""
        self._failing = self.closed = True
        if self.rank == 0:
            self._tell_end(status, f"{self.members.get(0, 'rank 0')} failed: {message}", GRACE_S)
            return
        for link in self.links:
            link.send("failed", status=status, message=message)

    def _end_all(self, status: int, message: str, grace: float = 0.0) -> None:
        """On rank 0, the end of the whole run; on another, which has lost rank 0, its own."""
        if self.rank == 0:
            say = self._tell_end(status, message, grace)
        else:
            beside = [m.rank for m in self.members.values() if m.rank and m.host == self.members[self.rank].host]
            say = not beside or min(beside) == self.rank
        self._end_soon(status, message, grace, say)

    def _tell_end(self, status: int, message: str, grace: float) -> bool:
        """Tell the others, of whom one a host is to print the message. Whether this rank is to.

        On a host whose first rank has failed, that rank has printed its mistake.
        """
        told = {link.member.host for link in self.links if link.failed and link.member.local == 0}
        say = not self._failing and rendezvous.own_host() not in told
        told.add(rendezvous.own_host())
        for link in sorted((x for x in self.links if x.member and not x.over), key=lambda x: x.member.rank):
            link.send("end", status=status, message=message, grace=grace, say=link.member.host not in told)
            told.add(link.member.host)
        return say

    def _end_soon(self, status: int, message: str, grace: float, say: bool) -> None:
        if self._ending is None:
            self._ending = (time.monotonic() + grace, status, message, say)

    def _stop_waiting(self) -> None:
        self._waiting = True

    def _say_goodbye(self) -> None:
        for link in self.links:
            if not link.over:
                link.send("bye")
        self.closed = True

    def _end(self, status: int, message: str, say: bool) -> None:
        """The end of this process."""
        if say:
            text = message if status == exit_codes.PREEMPTED else f"error: {message}"
            print_at_exit(text + "\n", self._errors)
        if self.rank == 0:
            time.sleep(0.5)  # what was sent arrives before the connection ends
        os._exit(status)

    # Stopping at one step

    def _on_signal(self, link: Link, name: str) -> None:
        self._signal(name, str(link.member))

    def _signal(self, name: str, by: str = "") -> None:
        if self.closed:
            return
        if self._ending is not None:  # a launcher hurries on what is ending
            self._end(*self._ending[1:])
        if self.rank and self.links:
            for link in self.links:
                link.send("signal", name=name)
        elif not self.stop.by and (self.rank == 0 or not self.joined.is_set()):
            self.stop.by = f"{name} to {by or self.members.get(0) or f'rank {self.rank}'}"
            if self.stop.reached is None:
                self._startup_ends = time.monotonic() + (STARTUP_GRACE_S if self.world > 1 else 0)
            else:
                self._stop_or_end()

    def _stop_or_end(self) -> None:
        """What a signal asks for: a common last step, or, before the first one, the end."""
        if self.stop.reached is not None:
            if self.world > 1:
                self._propose()
            return
        # Before all are there, SIGTERM may be a launcher's word that another rank has died, which nobody else can tell.
        lost = self.stop.by.startswith("SIGTERM") and not self.joined.is_set()
        then = "not all ranks had come: one may have died" if lost else "nothing was to be saved"
        status = exit_codes.LOST if lost else exit_codes.PREEMPTED
        self._end_all(status, f"stopped by {self.stop.by} before the first step; {then}; {_GO_ON}")

    def _propose(self) -> None:
        step = self.stop.propose()
        for link in self.links:
            link.send("propose", step=step, by=self.stop.by)

    def _on_propose(self, link: Link, step: int, by: str) -> None:
        self.stop.by = by
        link.send("at", step=self.stop.hold(step), proposal=step)

    def _on_at(self, link: Link, step: int, proposal: int) -> None:
        all_hold = self.stop.answer(link.member.rank, step, proposal)
        if all_hold is None:
            return
        if not all_hold:
            self._propose()
            return
        for other in self.links:
            other.send("agreed")
        self.stop.agree()

    def _on_agreed(self, link: Link) -> None:
        self.stop.agree()


def _noted_elsewhere(number: int, frame) -> None:
    """The handler of the signals that the watching thread reads from its socket; without one, they would kill."""
