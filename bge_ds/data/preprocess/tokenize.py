"""TokenizedTexts to token ids and words.

TokenizedTexts are encoded many at a time, and what follows (cutting, word numbers, special tokens) is arithmetic on arrays of a
whole batch: done text by text it took half as long again as the tokenizer itself. Nothing here knows about lines,
ranks or torch.
"""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache

import numpy as np
from tokenizers import Encoding, Tokenizer

from bge_ds.data.preprocess import token_cache, word_segmentation, word_starts
from bge_ds.data.ragged import RaggedArrays, inside

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


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts as arrays, end to end, special tokens at the ends of each. Texts that say nothing are in `silent` alone."""

    ids: np.ndarray  # int32
    words: np.ndarray  # int32, the word (0, 1, 2, ...) of its text that each token belongs to
    lengths: np.ndarray  # tokens of each text
    cuts: np.ndarray  # bool, whether it was cut
    silent: np.ndarray  # bool, for all texts that were given: whether it gives no token


class BatchTokenizer:
    """TokenizedTexts to token ids with the special tokens at the ends, cut to a length. One for each worker process.

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

    def ids(self, texts: list[str], length: int, prefix: str | list[str] = "") -> tuple[list[list[int]], list[bool]]:
        """Ids of each `prefix + text`, at most `length`, and whether it was cut. [] where the text gives no token.

        prefix: one for all, or one for each text."""
        prefixes = [prefix] * len(texts) if isinstance(prefix, str) else prefix
        rows, cuts = [], []
        room = length - self._affixes
        for some, before in zip(_batches(texts), _batches(prefixes), strict=True):
            bodies = self._bodies(list(map(str.__add__, before, some)))
            silent = self._silent(some, before, bodies)
            rows += [[] if says_nothing else self._wrap(body[:room]) for body, says_nothing in zip(bodies, silent, strict=True)]
            cuts += [len(body) > room for body in bodies]
        return rows, cuts

    def encode(self, texts: list[str], length: int) -> "TokenizedTexts":
        """Ids of each text, at most `length`, and the word of each token; a special token is a word of its own."""
        parts = [self._encode_some(some, length) for some in _batches(texts)]
        return TokenizedTexts(
            *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(TokenizedTexts))
        )

    def _encode_some(self, texts: list[str], length: int) -> "TokenizedTexts":
        room = length - self._affixes
        (ids, counts), starts = self._tokens(texts, room)
        silent, kept = self._without_text(ids, counts), np.minimum(counts, room)
        if silent.any():
            ids, starts = ids[np.repeat(~silent, counts)], starts[np.repeat(~silent, kept)]
            counts, kept = counts[~silent], kept[~silent]
        if (kept < counts).any():
            ids = ids[inside(counts) < np.repeat(kept, counts)]
        return self._with_affixes(ids, starts, kept, counts > room, silent)

    def _tokens(self, texts: list[str], room: int) -> tuple[RaggedArrays, np.ndarray]:
        """(ids of each, and, for the first `room` of each, whether a word begins there), without special tokens."""
        if self._memo is None:
            encodings = self._batch(texts)
            return _ids(encodings), word_starts.starts(texts, encodings, room, self._splits_at_space, self._segment)
        ids, starts = self._memo.look_up(texts)
        if (ids.lengths > room).any():
            starts = starts[inside(ids.lengths) < np.repeat(np.minimum(ids.lengths, room), ids.lengths)]
        return ids, starts

    def _tokenize(self, texts: list[str]) -> tuple[RaggedArrays, np.ndarray, np.ndarray]:
        """What `token_cache.TokenCache` asks for."""
        encodings = self._batch(texts)
        ids = _ids(encodings)
        at = (begin for encoding in encodings for begin, _ in encoding.offsets)
        starts = word_starts.starts(texts, encodings, ids.lengths.max(initial=0), self._splits_at_space, None)
        return ids, starts, np.fromiter(at, np.int64, len(ids.values))

    def _with_affixes(
        self, ids: np.ndarray, starts: np.ndarray, kept: np.ndarray, cuts: np.ndarray, silent: np.ndarray
    ) -> "TokenizedTexts":
        """Puts the special tokens around each text; `kept` are the lengths without them, none is 0."""
        head, lengths = len(self.core.prefix_ids), kept + self._affixes
        number = np.cumsum(starts, dtype=np.int32)
        first, last = number[np.cumsum(kept) - kept], number[np.cumsum(kept) - 1]
        begin = np.cumsum(lengths) - lengths
        place = inside(kept) + np.repeat(begin + head, kept)
        made = TokenizedTexts(np.empty(lengths.sum(), np.int32), np.empty(lengths.sum(), np.int32), lengths, cuts, silent)
        made.ids[place] = ids
        made.words[place] = number - np.repeat(first - head, kept)
        for i, token in enumerate(self.core.prefix_ids):
            made.ids[begin + i], made.words[begin + i] = token, i
        for i, token in enumerate(self.core.suffix_ids):
            at = begin + head + kept + i
            made.ids[at], made.words[at] = token, last - first + head + 1 + i
        return made

    def _batch(self, texts: list[str]) -> list[Encoding]:
        with _one_thread():
            return self._backend.encode_batch(texts, add_special_tokens=False)

    def _bodies(self, texts: list[str]) -> list[list[int]]:
        """Ids without special tokens; the tokenizer need not find offsets for them."""
        if self._memo is not None:
            ids, _ = self._memo.look_up(texts)
            values, ends = ids.values.tolist(), np.cumsum(ids.lengths).tolist()
            return [values[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        with _one_thread():
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _wrap(self, body: list[int]) -> list[int]:
        return [*self.core.prefix_ids, *body, *self.core.suffix_ids]

    def _silent(self, texts: list[str], prefixes: list[str], bodies: list[list[int]]) -> list[bool]:
        """For each text whether it says nothing; `bodies` are the ids with the prefixes."""
        # An instruction has tokens of its own: look at the text alone, where it is short or begins without a letter.
        doubtful = [
            i
            for i, (text, prefix) in enumerate(zip(texts, prefixes, strict=True))
            if prefix and (len(text) < 64 or not any(map(str.isalnum, text[:64])))
        ]
        alone = dict(zip(doubtful, self._bodies([texts[i] for i in doubtful]), strict=True)) if doubtful else {}
        return [self._says_nothing(alone.get(i, body)) for i, body in enumerate(bodies)]

    def _says_nothing(self, body: list[int]) -> bool:
        return not body or (len(body) < 64 and self.core.special_ids.issuperset(body))

    def _without_text(self, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """`_says_nothing` for ids end to end."""
        silent = counts < 64
        silent[np.repeat(np.arange(len(counts)), counts)[~self._is_special[ids]]] = False
        return silent

    def _count(self, text: str) -> int:
        return len(self._bodies([text])[0]) if text else 0


def _batches(values: list[str]) -> Iterator[list[str]]:
    """At least one, so that no text at all needs no care."""
    return (values[first : first + BATCH] for first in range(0, max(1, len(values)), BATCH))


def _ids(encodings: list[Encoding]) -> RaggedArrays:
    counts = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
    return RaggedArrays(_flat((encoding.ids for encoding in encodings), counts), counts)


def _flat(lists: Iterable[list[int]], lengths: np.ndarray) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32, count=int(lengths.sum()))


def _one_thread() -> contextlib.AbstractContextManager[None]:
    """Within it a batch starts no threads, which would make a later fork unsafe; cores are shared out by process."""
    return environment_variable("TOKENIZERS_PARALLELISM", "false")


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
