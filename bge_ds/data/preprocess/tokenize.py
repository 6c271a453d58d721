"""Texts to token ids and words.

Texts are encoded many at a time, and what follows (cutting, word numbers, special tokens) is arithmetic on arrays of a
whole batch: done text by text it took half as long again as the tokenizer itself. Nothing here knows about lines,
ranks or torch.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from bge_ds.data.preprocess import token_cache, word_segmentation, word_starts
from bge_ds.data.ragged import RaggedArrays, inside, stretches

BATCH = 256  # texts handed to the tokenizer at a time: their encodings take some 30 times the room of their ids


@dataclass(frozen=True)
class TokenizerCore:
    """What decides a tokenizer's ids, as plain values that travel to worker processes."""

    name: str
    json: str = field(repr=False)
    fingerprint: str
    vocab_size: int  # ids are below it
    prefix_ids: tuple[int, ...]  # special tokens before a text, e.g. [CLS]
    suffix_ids: tuple[int, ...]  # and after it, e.g. [SEP]
    special_ids: frozenset[int]  # those that carry no text; the unknown token is not among them
    unknown_id: int  # what text outside the vocabulary becomes; -1 where every text has tokens


class TokenizedTexts(NamedTuple):
    """Texts as arrays, special tokens at the ends of each."""

    ids: RaggedArrays  # int32; nothing of a text that gives no token
    words: np.ndarray | None  # int32, the word (0, 1, 2, ...) of its text that each token belongs to
    cuts: np.ndarray  # int64, how many tokens were cut off each text


class BatchTokenizer:
    """Texts to token ids with the special tokens at the ends, cut to a length. One for each worker process.

    word_segmenter: which library says what a word is in scripts without spaces, see `word_segmentation.py`. Raises ValueError
    where it is not installed."""

    def __init__(self, tokenizer: TokenizerCore, word_segmenter: str = word_segmentation.NONE) -> None:
        self.core = tokenizer
        self._segment = word_segmentation.load(word_segmenter)
        self._backend = Tokenizer.from_str(tokenizer.json)
        self._affixes = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
        self._is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_special[[i for i in tokenizer.special_ids if 0 <= i < tokenizer.vocab_size]] = True
        self._splits_at_space = len(set(self._backend.encode("a b", add_special_tokens=False).word_ids)) > 1
        # jieba finds words in whole texts.
        local = word_segmenter == word_segmentation.NONE and token_cache.is_local(tokenizer.json)
        self._memo = token_cache.TokenCache(self._tokenize) if local else None
        self.count_prompt = lru_cache(maxsize=1024)(self._count)

    def check_room(self, length: int, name: str, instruction: str = "") -> None:
        """Raises ValueError where a length (flag `name`) has no room for a text beside its specials and instruction."""
        taken = self._affixes + self.count_prompt(instruction)
        if taken >= length:
            what = "special tokens and instruction" if instruction else "special tokens"
            raise ValueError(f"{name} {length} leaves no room for text: {what} take {taken} tokens, give {taken + 1}")

    def encode(self, texts: list[str], length: int, prefix: str | list[str] = "", words: bool = False) -> TokenizedTexts:
        """Ids of each `prefix + text`, at most `length`; none where the text gives no token.

        prefix: one for all, or one for each text. words: with the word of each token; a special token is its own."""
        prefixes = [prefix] * len(texts) if isinstance(prefix, str) else prefix
        parts = [
            self._encode_some(texts[first : first + BATCH], prefixes[first : first + BATCH], length, words)
            for first in range(0, max(1, len(texts)), BATCH)
        ]
        numbers = np.concatenate([part.words for part in parts]) if words else None
        return TokenizedTexts(RaggedArrays.join([p.ids for p in parts]), numbers, np.concatenate([p.cuts for p in parts]))

    def _encode_some(self, texts: list[str], prefixes: list[str], length: int, words: bool) -> TokenizedTexts:
        room = length - self._affixes
        ids, starts = self._tokens(list(map(str.__add__, prefixes, texts)), room, words)
        silent = self._is_silent(ids)
        # An instruction has tokens of its own: look at the text alone, where it is short or begins without a letter.
        doubtful = [
            i
            for i, (text, prefix) in enumerate(zip(texts, prefixes, strict=True))
            if prefix and (len(text) < 64 or not any(map(str.isalnum, text[:64])))
        ]
        if doubtful:
            silent[doubtful] = self._is_silent(self._tokens([texts[i] for i in doubtful], room, False)[0])
        kept = np.minimum(ids.lengths, room)
        starts = starts[np.repeat(~silent, kept)] if words else None
        return self._with_affixes(ids, starts, np.where(silent, 0, kept), ids.lengths - kept)

    def _tokens(self, texts: list[str], room: int, words: bool) -> tuple[RaggedArrays, np.ndarray | None]:
        """(ids of each, and, for the first `room` of each, whether a word begins there), without special tokens."""
        if self._memo is not None:
            ids, starts = self._memo.look_up(texts)
            if words and (ids.lengths > room).any():
                starts = starts[inside(ids.lengths) < np.repeat(np.minimum(ids.lengths, room), ids.lengths)]
            return ids, starts
        if not words:  # the tokenizer need not find offsets
            return _ids(self._batch(texts, fast=True)), None
        encodings = self._batch(texts)
        return _ids(encodings), word_starts.starts(texts, encodings, room, self._splits_at_space, self._segment)

    def _tokenize(self, texts: list[str]) -> tuple[RaggedArrays, np.ndarray, np.ndarray]:
        """What `token_cache.TokenCache` asks for."""
        encodings = self._batch(texts)
        ids = _ids(encodings)
        at = (begin for encoding in encodings for begin, _ in encoding.offsets)
        starts = word_starts.starts(texts, encodings, ids.lengths.max(initial=0), self._splits_at_space, None)
        return ids, starts, np.fromiter(at, np.int64, len(ids.values))

    def _with_affixes(self, ids: RaggedArrays, starts: np.ndarray | None, kept: np.ndarray, cuts: np.ndarray) -> TokenizedTexts:
        """Puts the special tokens around the first `kept` tokens of each text; around none where that is 0."""
        core, lengths = self.core, np.where(kept > 0, kept + self._affixes, 0)
        begin, kept_K = (np.cumsum(lengths) - lengths)[kept > 0], kept[kept > 0]  # of the K texts that have tokens
        first, last = begin + len(core.prefix_ids), begin + len(core.prefix_ids) + kept_K - 1
        body = inside(kept_K) + np.repeat(first, kept_K)
        made = np.empty(lengths.sum(), np.int32)
        made[body] = ids.values if len(ids.values) == len(body) else stretches(ids.values, ids.starts, kept)
        for i, token in enumerate(core.prefix_ids):
            made[begin + i] = token
        for i, token in enumerate(core.suffix_ids):
            made[last + 1 + i] = token
        words = None
        if starts is not None:
            begins = np.ones(len(made), np.int32)
            begins[body] = starts
            begins[first] = 1
            words = np.cumsum(begins, dtype=np.int32)
            words -= np.repeat(words[begin], lengths[kept > 0])
        return TokenizedTexts(RaggedArrays(made, lengths), words, cuts)

    def _batch(self, texts: list[str], fast: bool = False) -> list[Encoding]:
        """What the tokenizer makes of texts, without special tokens. fast: without offsets."""
        # No threads, which would make a later fork unsafe; cores are shared out by process.
        with environment_variable("TOKENIZERS_PARALLELISM", "false"):
            return (self._backend.encode_batch_fast if fast else self._backend.encode_batch)(texts, add_special_tokens=False)

    def _is_silent(self, ids: RaggedArrays) -> np.ndarray:
        """bool, for each text whether it says nothing: no token, or a few special ones alone."""
        silent = ids.lengths < 64
        silent[np.repeat(np.arange(len(silent)), ids.lengths)[~self._is_special[ids.values]]] = False
        return silent

    def _count(self, text: str) -> int:
        return len(self._tokens([text], 0, False)[0].values) if text else 0


def _ids(encodings: list[Encoding]) -> RaggedArrays:
    return RaggedArrays.of_lists([encoding.ids for encoding in encodings], np.int32)


@contextlib.contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Sets it for a while; it is not touched where it has that value."""
    before = os.environ.get(name)
    if before == value:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
