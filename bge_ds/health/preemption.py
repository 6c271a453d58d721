"""The one step after which all ranks of a run stop, agreed on between their watches while the ranks go on stepping.

Rank 0 proposes a step that no rank should have passed when it hears of it. From then on each holds there, and answers with
the step it has done. Where one was past the proposal already, a later step is proposed, farther ahead each time; where none
was, all are told that it is agreed. Between a signal and that word a rank may wait; without a signal it never does.
"""

from __future__ import annotations

import threading


class CommonStep:
    """What one rank knows of that step. Methods of the main thread and of the watching thread are marked so."""

    def __init__(self, world: int):
        self.reached: int | None = None  # the last step that the main thread has done
        self.by = ""  # the signal that stops the run, and the rank that it came to
        self._world = world
        self._changed = threading.Condition()
        self._proposal: int | None = None
        self._agreed = False
        self._ahead = 2
        self._answers: dict[int, int] = {}

    def done(self, step: int) -> int | None:
        """Main thread: a step is over. The step to stop after, once there is one; waits where it may be this one."""
        with self._changed:
            self.reached = step
            if self._world == 1:
                return step if self.by else None
            while self._proposal == step and not self._agreed:
                self._changed.wait(1)
            return self._proposal if self._agreed else None

    def hold(self, step: int) -> int:
        """Watching thread: the main thread goes no further than `step`, if it is not past it. The step it has done, or -1."""
        with self._changed:
            self._proposal = step
            self._changed.notify_all()
            return -1 if self.reached is None else self.reached

    def agree(self) -> None:
        """Watching thread: every rank holds at the proposal."""
        with self._changed:
            self._agreed = True
            self._changed.notify_all()

    def propose(self) -> int:
        """Watching thread of rank 0: a step for all ranks, ahead of every answer so far; this rank holds at it."""
        step = max(self.reached or 0, *self._answers.values(), 0) + self._ahead
        self._ahead *= 2
        self._answers = {0: self.hold(step)}
        return step

    def answer(self, rank: int, reached: int, proposal: int) -> bool | None:
        """Watching thread of rank 0: what another rank has done. True: all hold. False: some were past it. None: not all said.

        Answers to an earlier proposal count for nothing.
        """
        if proposal != self._proposal or self._agreed:
            return None
        self._answers[rank] = reached
        if len(self._answers) < self._world:
            return None
        return max(self._answers.values()) < proposal
