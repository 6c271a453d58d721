"""The last message of a process that is about to end, printed without waiting for other threads or readers."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading


def print_at_exit(text: str, errors: int) -> None:
    """Writes to the descriptor `errors`, in this thread: another might get the interpreter's lock too late.

    A full pipe that nobody reads does not block it: a pipe that is ready takes 4,096 bytes without waiting.
    """
    data, ready = text.encode(), select.poll()
    ready.register(errors, select.POLLOUT)
    with contextlib.suppress(OSError):  # closed
        while data and ready.poll(2000):
            data = data[os.write(errors, data[:4096]) :]
    # What the main thread has printed, unless flushing blocks.
    flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
    flushing.start()
    flushing.join(2)
