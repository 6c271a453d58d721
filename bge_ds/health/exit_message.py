"""The last message of a process that is about to end, printed without waiting for anyone."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading


def print_at_exit(text: str, errors: int) -> None:
    """To standard error, by this thread itself: another might wait longer for the interpreter's lock than this process lives.

    A pipe that nobody reads any more keeps nobody: one that is ready takes 4,096 bytes without waiting.
    """
    data, ready = text.encode(), select.poll()
    ready.register(errors, select.POLLOUT)
    with contextlib.suppress(OSError):  # closed
        while data and ready.poll(2000):
            data = data[os.write(errors, data[:4096]) :]
    # What the main thread has printed, if that can be had.
    flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
    flushing.start()
    flushing.join(2)
