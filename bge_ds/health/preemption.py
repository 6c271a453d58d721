"""The common step after which all ranks of a run stop, agreed on by their watching threads while training continues.

Rank 0 proposes a step that no rank is expected to have passed yet. Each rank then waits at that step, and answers with the
last step it has done. If a rank had passed the proposal, rank 0 proposes a later one, farther ahead each time; otherwise it
tells all ranks that they agree. A rank waits only between a signal and the agreement.
"""

from __future__ import annotations

import threading


class CommonStep:
    """A rank's view of that step. Docstrings say which thread calls a method."""

    def __init__(self, world: int):
        self.reached: int | None = None  # the last step that the main thread has done
        self.by = ""  # the signal that stops the run, and the rank that received it
        self._world = world
        self._changed = threading.Condition()
        self._proposal: int | None = None
        self._agreed = False
        self._ahead = 2
        self._answers: dict[int, int] = {}

    def done(self, step: int) -> int | None:
        """Main thread: `step` is done. Returns the step to stop after, once agreed; waits while that may be this one."""
        with self._changed:
            self.reached = step
            if self._world == 1:
                return step if self.by else None
            while self._proposal == step and not self._agreed:
                self._changed.wait(1)
            return self._proposal if self._agreed else None

    def hold(self, step: int) -> int:
        """Watching thread: stops the main thread at `step`, unless it has passed it. Returns the last step done, or -1."""
        with self._changed:
            self._proposal = step
            self._changed.notify_all()
            return -1 if self.reached is None else self.reached

    def agree(self) -> None:
        """Watching thread: every rank waits at the proposed step."""
        with self._changed:
            self._agreed = True
            self._changed.notify_all()

    def propose(self) -> int:
        """Watching thread of rank 0: proposes a step ahead of every answer so far, at which this rank waits."""
        step = max(self.reached or 0, *self._answers.values(), 0) + self._ahead
        self._ahead *= 2
        self._answers = {0: self.hold(step)}
        return step

    def answer(self, rank: int, reached: int, proposal: int) -> bool | None:
        """Watching thread of rank 0: takes an answer. True: all ranks wait. False: some had passed it. None: some are missing.

        Answers to an earlier proposal are ignored.
        """
        if proposal != self._proposal or self._agreed:
            return None
        self._answers[rank] = reached
        if len(self._answers) < self._world:
            return None
        return max(self._answers.values()) < proposal
