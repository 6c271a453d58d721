"""Selection: ranks, reasons, margins, sampling and filling, on rankings written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bge_ds.mining.selection import REASONS, Rules, choose, fill

ROWS = np.array([7, 3, 9, 1, 0, 5, 2, -1])
SCORES = np.array([7, 6, 5, 4, 3, 2, 1, -np.inf]) / 8
NONE = np.array([], np.int64)


def chosen(rules: Rules, positives=NONE, own: int = -1, lowest: float = 0.0, group: int = 0) -> tuple[list[int], dict]:
    rows, dropped = choose(group, ROWS, SCORES, np.array(positives, np.int64), own, lowest, rules)
    return rows.tolist(), {name: int(count) for name, count in zip(REASONS, dropped, strict=True) if count}


@pytest.mark.parametrize(
    ("rules", "expected", "dropped"),
    [
        ({"range_for_sampling": (0, 4)}, [7, 3, 9, 1], {}),
        ({"range_for_sampling": (2, 20)}, [9, 1, 0, 5, 2], {}),
        ({"range_for_sampling": (0, 8), "max_score": 6 / 8}, [3, 9, 1, 0, 5, 2], {"max_score": 1}),
        ({"range_for_sampling": (0, 8), "min_score": 3 / 8}, [7, 3, 9, 1, 0], {"min_score": 2}),
        ({"range_for_sampling": (0, 8), "absolute_margin": 0.0}, [9, 1, 0, 5, 2], {"absolute_margin": 2}),
        ({"range_for_sampling": (0, 8), "absolute_margin": 2 / 8}, [0, 5, 2], {"absolute_margin": 4}),
        ({"range_for_sampling": (0, 8), "relative_margin": 0.5}, [5, 2], {"relative_margin": 5}),
        (
            {"range_for_sampling": (0, 8), "relative_margin": 0.5, "max_score": 0.75},
            [5, 2],
            {"max_score": 1, "relative_margin": 4},
        ),
    ],
)
def test_ranks_and_limits(rules, expected, dropped):
    """Ranks count from 0, the last is not taken; a passage is dropped for the first reason that holds, at a limit for none.
    The lowest positive scores 5/8."""
    assert chosen(Rules(sampling="top", **rules), lowest=5 / 8) == (expected, dropped)


def test_positives_and_the_query_take_ranks_and_are_dropped():
    """As in FlagEmbedding the range counts all passages, and what is no negative is dropped from it afterwards."""
    rules = Rules(range_for_sampling=(1, 4), sampling="top")
    assert chosen(rules, positives=[3, 5], own=9) == ([1], {"positive": 1, "query": 1})


def test_a_relative_margin_below_zero():
    """Where the lowest positive's score is negative, the margin still lowers the limit."""
    assert Rules(relative_margin=0.5).limits(-0.4) == {"relative_margin": pytest.approx(-0.6)}


def test_sampling_is_uniform_without_replacement_and_by_group():
    """Each of 5 passages is among 2 sampled ones in 2/5 of the groups, in the order of the ranking; a group's draw depends on
    the seed and its number alone."""
    draws = [chosen(Rules(range_for_sampling=(2, 9), negative_number=2), group=group)[0] for group in range(2000)]
    assert all(ROWS.tolist().index(a) < ROWS.tolist().index(b) for a, b in draws)
    shares = np.bincount(np.ravel(draws), minlength=10)[[9, 1, 0, 5, 2]] / 2000
    np.testing.assert_allclose(shares, 0.4, atol=0.04)
    assert draws[17] == chosen(Rules(range_for_sampling=(2, 9), negative_number=2), group=17)[0]
    assert draws != [
        chosen(Rules(range_for_sampling=(2, 9), negative_number=2, seed=1), group=group)[0] for group in range(2000)
    ]


def test_filling_takes_any_text_but_positives_the_query_and_what_scores_too_high():
    """A pool with just enough texts is used up; limits hold for random texts too, but for the least score."""
    rules = Rules(negative_number=6, min_score=5.0)
    got = fill(0, np.array([4]), np.array([1, 2]), 3, 0.0, rules, 9, score=None)
    assert sorted(got.tolist()) == [0, 5, 6, 7, 8]
    assert got.tolist() != fill(1, np.array([4]), np.array([1, 2]), 3, 0.0, rules, 9, score=None).tolist()
    limited = Rules(negative_number=6, absolute_margin=1.0)
    got = fill(0, NONE, NONE, -1, 7.0, limited, 9, score=lambda rows: rows.astype(float))
    assert len(got) == 6 and set(got.tolist()) <= set(range(7))
    assert len(fill(0, NONE, NONE, -1, 3.0, limited, 9, score=lambda rows: rows.astype(float))) == 3


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"range_for_sampling": (10, 10)}, "--range_for_sampling 10-10"),
        ({"max_score": float("nan")}, "--max_score nan"),
        ({"seed": -1}, "--seed -1"),
        ({"max_score": 0.1, "min_score": 0.2}, "nothing is between"),
    ],
)
def test_rules_that_exclude_everything(rules, words):
    """Rules that no passage can meet are named by their flags."""
    with pytest.raises(ValueError, match=words):
        Rules(**rules)
