"""Pairs put together from ids are those that the tokenizer itself makes of two texts."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from bge_ds.data.pairs import PASSAGE_PREFIX, PROMPT, QUERY_PREFIX, PairLayout
from bge_ds.data.preprocess.validate import load_tokenizer
from bge_ds.data.ragged import RaggedArrays

QUERIES = ["the quick brown fox", "北京", "models embed questions and passages", "fox"]
PASSAGES = ["jumps over the lazy dog", "passages " * 40, "the same, exactly", "fox " * 9]


def ids_of(tokenizer, texts: list[str]) -> RaggedArrays:
    return RaggedArrays.of_lists(tokenizer(texts, add_special_tokens=False)["input_ids"], np.int32)


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "unigram", "minilm"])
@pytest.mark.parametrize("max_len", [400, 60, 45])
def test_encoders_pairs_are_those_of_the_tokenizer(tmp_path, request, kind, max_len):
    """Ids and token types equal tokenizer(query, passage, truncation="only_second"), cut or whole."""
    folder = request.getfixturevalue("minilm_path") if kind == "minilm" else helpers.make_tokenizer(kind, tmp_path, types=True)
    tokenizer = load_tokenizer(folder)
    queries, passages = ids_of(tokenizer, QUERIES), ids_of(tokenizer, PASSAGES)
    lengths = {"query_max_len": 40, "passage_max_len": 400, "max_len": max_len}
    pairs = PairLayout.of_tokenizer(tokenizer).build(queries, passages, **lengths)
    expected = tokenizer(
        QUERIES, PASSAGES, truncation="only_second", max_length=max_len, return_token_type_ids=True
    )  # fmt: skip
    assert [row.tolist() for row in pairs.ids.split()] == expected["input_ids"]
    assert max(pairs.ids.lengths) == min(max_len, max(map(len, expected["input_ids"])))
    types = expected["token_type_ids"]
    if kind in ("wordpiece", "minilm"):
        made = [[int(at >= second) for at in range(len(row))] for row, second in zip(types, pairs.second, strict=True)]
        assert made == types
    else:
        assert pairs.second is None and not any(map(any, types))


def test_queries_and_passages_have_their_own_lengths(tmp_path):
    """Each text is cut to its own length before the pair is, and a query that leaves no room is refused."""
    tokenizer = load_tokenizer(helpers.make_tokenizer("wordpiece", tmp_path))
    layout = PairLayout.of_tokenizer(tokenizer)
    queries, passages = ids_of(tokenizer, QUERIES), ids_of(tokenizer, PASSAGES)
    pairs = layout.build(queries, passages, query_max_len=2, passage_max_len=3, max_len=50)
    for row, query, passage in zip(pairs.ids.split(), queries.split(), passages.split(), strict=True):
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        assert row.tolist() == [cls, *query[:2], sep, *passage[:3], sep]
    with pytest.raises(
        ValueError, match=r"a query of 10 tokens and the 3 that every pair has leave no room .* in 13: give a pair 14"
    ):
        layout.build(queries, passages, query_max_len=10, passage_max_len=3, max_len=13)


@pytest.mark.parametrize("bos", [True, False])
def test_decoders_pairs_are_those_of_flagembedding(tmp_path, bos):
    """[bos] "A: query" newline "B: passage", cut together, then newline and prompt; no bos that is the padding token."""
    tokenizer = load_tokenizer(helpers.make_tokenizer("bytes", tmp_path))
    if not bos:
        tokenizer.pad_token = tokenizer.bos_token
    layout = PairLayout.of_decoder(tokenizer)
    queries = ids_of(tokenizer, [QUERY_PREFIX + text for text in QUERIES])
    passages = ids_of(tokenizer, [PASSAGE_PREFIX + text for text in PASSAGES])
    newline, prompt = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", PROMPT))
    room = 50
    pairs = layout.build(queries, passages, query_max_len=20, passage_max_len=400, max_len=room + len(newline) + len(prompt))
    for row, query, passage in zip(pairs.ids.split(), queries.split(), passages.split(), strict=True):
        first = [*[tokenizer.bos_token_id] * bos, *query[:20]]
        both = (first + newline + passage.tolist())[:room]
        assert row.tolist() == both + newline + prompt
    assert pairs.second is None


def test_tokenizers_without_a_layout_are_refused(tmp_path):
    """Two texts that a tokenizer joins without a token between them would be one text to the model."""
    tokenizer = load_tokenizer(helpers.make_tokenizer("bytes", tmp_path))
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="has no layout for pairs"):
        PairLayout.of_tokenizer(tokenizer)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    ids = RaggedArrays.of([np.arange(4), np.arange(2), np.arange(1)])
    assert [row.tolist() for row in ids.inner(1, 1).split()] == [[1, 2], [], []]
