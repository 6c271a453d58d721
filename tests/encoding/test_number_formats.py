"""What is stored of vectors, against torch and plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bge_ds.encoding.number_formats import cut, from_stored, to_stored

FLOATS = st.floats(-2, 2, width=32)
VECTORS = arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=FLOATS)


@given(VECTORS)
def test_bfloat16_is_torchs(vectors_ND):
    """The bits are those of torch's bfloat16, halves rounded to even, and come back as the float32 that it stands for."""
    expected = torch.from_numpy(vectors_ND).bfloat16()
    stored, scales = to_stored(vectors_ND, "bfloat16")
    assert stored.dtype == np.uint16 and scales is None
    np.testing.assert_array_equal(stored, expected.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(from_stored(stored, None, "bfloat16"), expected.float().numpy())


@given(VECTORS)
def test_int8_is_within_half_a_step(vectors_ND):
    """Each feature comes back within half of the vector's scale; the largest is +-127; a vector of zeros stays one."""
    stored, scales = to_stored(vectors_ND, "int8")
    assert stored.dtype == np.int8 and scales.dtype == np.float32
    back = from_stored(stored, scales, "int8")
    assert back.dtype == np.float32
    assert (np.abs(back - vectors_ND) <= 0.5001 * scales[:, None] + 1e-38).all()
    for vector, row in zip(vectors_ND, stored, strict=True):
        assert np.abs(row.astype(int)).max() == (127 if np.abs(vector).max() > 1e-30 else np.abs(row.astype(int)).max())


def test_float16_that_overflows_is_refused():
    """A feature beyond 65504 would become infinite without a word."""
    assert from_stored(*to_stored(np.array([[65504.0]], np.float32), "float16"), "float16").tolist() == [[65504.0]]
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        to_stored(np.array([[70000.0]], np.float32), "float16")


def test_a_cut_vector_is_normalised_where_the_model_normalises():
    """The first features, of unit length again; unnormalised models' vectors are cut alone; zeros do not become NaN."""
    vectors_ND = np.array([[3, 4, 12], [0, 0, 1]], np.float32)
    np.testing.assert_allclose(cut(vectors_ND, 2, normalize=True), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(cut(vectors_ND, 2, normalize=False), [[3, 4], [0, 0]])
    assert cut(vectors_ND, 2, normalize=False).flags["C_CONTIGUOUS"]
