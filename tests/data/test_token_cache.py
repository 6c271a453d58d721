"""The memory of stretches: never another token, word or length than the tokenizer gives for the whole text."""

from __future__ import annotations

import helpers
import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bge_ds.data.preprocess import token_cache, validate

LETTERS = st.sampled_from(
    [*"aEx.,-#?!0", "é", "e\u0301", "\u0301", "ß", "Σ", "ς", "İ", "中", "文字", "가", "ก็", "\u200b", "\u00ad"]
)
SPACES = st.sampled_from([" ", "  ", "\t", "\n", "\u00a0", "\u3000", "\x00", "\ufffd", " [MASK] ", "[SEP]", "[UNK] "])
WORDS = st.one_of(LETTERS, SPACES, st.sampled_from(" ".join(helpers.SENTENCES).split()), st.text(max_size=3))
TEXTS = st.lists(st.lists(WORDS, max_size=12).map("".join), min_size=1, max_size=6)


def encoders(folder):
    """One that remembers, and one that tokenizes whole texts."""
    core = validate.core(validate.load_tokenizer(folder))
    with_memo, without = validate.BatchTokenizer(core), validate.BatchTokenizer(core)
    assert with_memo._memo is not None
    without._memo = None
    return with_memo, without


def check_same(ours, theirs):
    """Ids, where each text's end, words, cuts."""
    for one, other in zip((*ours.ids, *ours[1:]), (*theirs.ids, *theirs[1:]), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def pair(tiny_tokenizer_path):
    return encoders(tiny_tokenizer_path)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=TEXTS, length=st.integers(3, 40), prefix=st.sampled_from(["", "query: ", "the"]))
def test_what_is_remembered_is_what_is_computed(pair, texts, length, prefix):
    """Ids, words, cuts and silent texts of any Unicode, special tokens in the text included, at any length."""
    for before in ("", prefix):
        check_same(*(encoder.encode(texts, length, before, words=True) for encoder in pair))
        check_same(*(encoder.encode(texts, length, before) for encoder in pair))


def test_real_texts_by_a_real_tokenizer(minilm_path):
    pair = encoders(minilm_path)
    texts = [f"{a} {b}\n\n{a}" for a in helpers.SENTENCES for b in ("Füße, ΑΣ Σ. 中文 text", "x" * 120, "don't U.S. 3.14")]
    for length in (8, 512):
        check_same(*(encoder.encode(texts, length, words=True) for encoder in pair))


def test_what_is_remembered_is_bounded(tiny_tokenizer_path, monkeypatch):
    """When the memory is full it keeps what came often, and what it gives stays the same."""
    monkeypatch.setattr(token_cache, "CHARACTERS", 60)
    ours, theirs = encoders(tiny_tokenizer_path)
    for i in range(20):
        texts = [f"fox{i} jumps over{i % 3} dogs", f"the end{i}"]
        check_same(ours.encode(texts, 64), theirs.encode(texts, 64))
        assert ours._memo._characters <= 60 and len(ours._memo._known) <= 60
    assert "dogs" in ours._memo._known and "fox1" not in ours._memo._known


@pytest.mark.parametrize(
    ("kind", "change", "local"),
    [
        ("wordpiece", {}, True),
        ("wordpiece", {"pre_tokenizer": None}, False),
        ("wordpiece", {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, False),
        ("bytes", {}, False),
        ("unigram", {}, False),
    ],
)
def test_only_tokenizers_that_end_at_spaces_are_remembered(tmp_path, kind, change, local):
    """A tokenizer that sees across a space, or may, is asked for whole texts."""
    core = validate.core(validate.load_tokenizer(helpers.make_tokenizer(kind, tmp_path)))
    assert token_cache.is_local(orjson.dumps(orjson.loads(core.json) | change).decode()) is local


def test_an_added_token_with_a_space_needs_whole_texts(tmp_path):
    tokenizer = validate.load_tokenizer(helpers.make_tokenizer("wordpiece", tmp_path))
    tokenizer.add_tokens(["quick fox"])
    core = validate.core(tokenizer)
    assert not token_cache.is_local(core.json) and validate.BatchTokenizer(core)._memo is None
