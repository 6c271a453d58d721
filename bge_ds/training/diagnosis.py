"""Signs that a run does not learn, read from its log records. Each is said once, with its remedy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from bge_ds.data.diagnosis import PAGE

IN_A_ROW = 5  # records that must show a sign before it is said
CHANCE = 0.97  # share of the loss of guessing from which a loss counts as that of guessing
COLLAPSED = 0.97  # mean cosine of the batch's passages from which they count as one vector
CLIPPED = 20  # records in a row with a norm above the limit
FAR_ABOVE = 5.0  # their median norm, in limits: Adam makes up for a smaller constant factor


class Signs:
    """Reads a run's records. warmup: steps in which nothing is judged. max_norm: --max_grad_norm, 0 for none."""

    def __init__(self, warmup: int, max_norm: float):
        self.warmup, self.max_norm = warmup, max_norm
        self.counts = {"chance": 0, "collapse": 0}
        self.norms: list[float] = []
        self.said: set[str] = set()

    def read(self, record: Mapping[str, float | None], chance: float | None) -> list[str]:
        """What the record is the last proof of. chance: the loss of guessing, where the objective knows it."""
        if (record["step"] or 0) <= self.warmup:
            return []
        loss, cosine = record.get("loss"), record.get("passage_cosine")
        shown = {
            "chance": chance is not None and loss is not None and loss >= CHANCE * chance,
            "collapse": cosine is not None and cosine >= COLLAPSED,
        }
        for name, holds in shown.items():
            self.counts[name] = self.counts[name] + 1 if holds else 0
        norm = record.get("grad_norm")
        self.norms = [*self.norms[-CLIPPED + 1 :], norm if norm is not None else math.inf]
        found = {name for name, count in self.counts.items() if count >= IN_A_ROW}
        if self._clipped():
            found.add("clipped")
        return list(self._say(sorted(found - self.said), loss, chance, cosine))

    def _clipped(self) -> bool:
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        if not self.max_norm or len(finite) < CLIPPED:
            return False
        return min(finite) > self.max_norm and statistics.median(finite) > FAR_ABOVE * self.max_norm

    def _say(self, names: Iterable[str], loss: float | None, chance: float | None, cosine: float | None) -> Iterable[str]:
        words = {
            "chance": lambda: (
                f"the loss, {loss:.3f}, is still that of guessing ({chance:.3f}): nothing is learned; raise --learning_rate, "
                f"lower --temperature, or check that queries and positives belong together ({PAGE}#loss-at-chance)"
            ),
            "collapse": lambda: (
                f"the passages' vectors are nearly one (mean cosine {cosine:.3f}); lower --learning_rate, raise --temperature, "
                f"or take the pooling that the model was trained with ({PAGE}#collapse)"
            ),
            "clipped": lambda: (
                f"every gradient of the last {CLIPPED} records was clipped: their median norm is "
                f"{statistics.median(self.norms):.1f}, --max_grad_norm {self.max_norm:g}; raise it or lower --learning_rate "
                f"({PAGE}#clipped-gradients)"
            ),
        }
        for name in names:
            self.said.add(name)
            yield words[name]()
