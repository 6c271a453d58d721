"""Arrays end to end: each operation does to every array what its plain form does to one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ds.data import ragged
from bge_ds.data.ragged import RaggedArrays

ARRAYS = st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=9)


def arrays_of(rows) -> list[np.ndarray]:
    return [np.array(row, np.uint16) for row in rows]


def same(found: RaggedArrays, wanted) -> None:
    assert [part.tolist() for part in found.split()] == [list(part) for part in wanted]
    assert found.values.dtype == np.uint16 and found.lengths.tolist() == [len(part) for part in wanted]


@given(ARRAYS, st.randoms(), st.booleans())
def test_taking_and_joining_keep_each_array(rows, random, long):
    """Any choice of arrays, in any order and with repeats, by either way of copying; a value is found by its two numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "_LONG", 0 if long else 128)
        whole = RaggedArrays.of(arrays_of(rows))
        chosen = random.choices(range(len(rows)), k=2 * len(rows))
        same(whole.take(np.array(chosen)), [rows[i] for i in chosen])
        same(RaggedArrays.join([whole, whole.take(np.array(chosen))]), rows + [rows[i] for i in chosen])
    places = [(i, j) for i, row in enumerate(rows) for j in range(len(row))]
    if places:
        found = whole.at(*np.array(places).T)
        assert found.tolist() == [rows[i][j] for i, j in places]


@given(ARRAYS, st.integers(2, 9), st.integers(0, 2))
def test_cut_keeps_the_closing_tokens(rows, length, suffix):
    """An array that is too long loses what lies before its last `suffix` values; the others stay."""
    wanted = [row if len(row) <= length else row[: length - suffix] + row[len(row) - suffix :] for row in rows]
    same(RaggedArrays.of(arrays_of(rows)).cut(length, suffix), wanted)


def test_what_fits_is_not_copied():
    whole = RaggedArrays.of(arrays_of([[1, 2], [3]]))
    assert whole.cut(2, 1) is whole
