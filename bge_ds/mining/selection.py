"""Which of a query's ranked passages become its negatives: a pure function of the ranking, the rules and the group's number.

Shapes: K ranked passages, E excluded ones.

The positive of a margin is the lowest-scoring one of the query, so that a negative is below all of them
(NV-Retriever, arXiv:2407.15831).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Why a ranked passage is dropped, in the order in which the reasons are tried.
REASONS = ("positive", "query", "max_score", "min_score", "absolute_margin", "relative_margin")
_FILL_DRAWS = 4  # random texts drawn for each that is missing, as scores may exclude some

Score = Callable[[np.ndarray], np.ndarray]  # rows of passages -> their scores


@dataclass(frozen=True)
class Rules:
    """The flags of `bge_ds.mine` that decide which passages become negatives. range_for_sampling: (first, last), the ranks
    [first, last) of the search, counted from 0."""

    range_for_sampling: tuple[int, int] = (10, 210)
    negative_number: int = 15
    sampling: Literal["random", "top"] = "random"
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    no_fill: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises ValueError for values that exclude each other or are no numbers."""
        first, last = self.range_for_sampling
        if not 0 <= first < last:
            raise ValueError(
                f"--range_for_sampling {first}-{last}: give FIRST-LAST with FIRST below LAST, such as 10-210, "
                "which skips the 10 best passages and takes the next 200"
            )
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} is below 0: give a whole number from 0 on")
        for name in REASONS[2:]:
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise ValueError(f"--{name} {value} is not a finite number")
        if None not in (self.min_score, self.max_score) and self.min_score > self.max_score:  # type: ignore[operator]
            raise ValueError(f"--min_score {self.min_score:g} is above --max_score {self.max_score:g}: nothing is between them")

    @property
    def has_margin(self) -> bool:
        return self.absolute_margin is not None or self.relative_margin is not None

    def limits(self, lowest: float) -> dict[str, float]:
        """The most that a negative may score, by reason. lowest: score of the query's lowest-scoring positive."""
        found = {} if self.max_score is None else {"max_score": self.max_score}
        if self.absolute_margin is not None:
            found["absolute_margin"] = lowest - self.absolute_margin
        if self.relative_margin is not None:
            found["relative_margin"] = lowest - self.relative_margin * abs(lowest)
        return found


def reasons(
    rows_K: np.ndarray, scores_K: np.ndarray, positives_E: np.ndarray, own: int, lowest: float, rules: Rules
) -> np.ndarray:
    """Of each passage, the index of the first of REASONS that drops it, or -1. own: row of the query's own text, or -1."""
    found_K = np.full(len(rows_K), -1)
    limits = rules.limits(lowest)
    for index in reversed(range(len(REASONS))):
        name = REASONS[index]
        if name == "positive":
            drops_K = (rows_K[:, None] == positives_E).any(axis=1)
        elif name == "query":
            drops_K = rows_K == own
        elif name == "min_score" and rules.min_score is not None:
            drops_K = scores_K < rules.min_score
        elif name in limits:
            drops_K = scores_K > limits[name]
        else:
            continue
        found_K[drops_K] = index
    return found_K


def choose(
    group: int, rows_K: np.ndarray, scores_K: np.ndarray, positives_E: np.ndarray, own: int, lowest: float, rules: Rules
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the negatives, best first; how many passages of the range each of REASONS dropped).

    group: number of the group in the input. rows_K, scores_K (float64): the ranking, best first; row -1 is no passage.
    """
    ranks = slice(*rules.range_for_sampling)
    rows_K, scores_K = rows_K[ranks], scores_K[ranks]
    found = rows_K >= 0
    rows_K, scores_K = rows_K[found], scores_K[found]
    reasons_K = reasons(rows_K, scores_K, positives_E, own, lowest, rules)
    allowed = rows_K[reasons_K < 0]
    if rules.sampling == "top" or len(allowed) <= rules.negative_number:
        chosen = allowed[: rules.negative_number]
    else:
        drawn = np.random.default_rng((rules.seed, group)).choice(len(allowed), rules.negative_number, replace=False)
        chosen = allowed[np.sort(drawn)]
    return chosen, np.bincount(reasons_K[reasons_K >= 0], minlength=len(REASONS))


def fill(
    group: int, chosen: np.ndarray, positives_E: np.ndarray, own: int, lowest: float, rules: Rules, pool: int, score: Score
) -> np.ndarray:
    """Random rows of a pool of `pool` passages to bring `chosen` to the number wanted, as far as there are such.

    None is a positive, the query or chosen already, and none scores too high for a negative; too low is none, as random texts
    are easy. score: is called where there are such limits.
    """
    missing = rules.negative_number - len(chosen)
    never = np.concatenate([chosen, positives_E, [own]])
    rng = np.random.default_rng((rules.seed, group, 1))
    drawn = rng.choice(pool, min(pool, len(never) + _FILL_DRAWS * missing), replace=False)
    drawn = drawn[~np.isin(drawn, never)]
    if limits := rules.limits(lowest):
        drawn = drawn[score(drawn) <= min(limits.values())]
    return drawn[:missing]
