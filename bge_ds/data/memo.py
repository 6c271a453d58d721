"""What a tokenizer makes of each stretch of text between two spaces, remembered: most stretches come again and again.

Some tokenizers look no further than a space, as BERT's: the tokens of a text are those of its stretches, one after the
other. Then a look-up of a stretch takes the place of tokenizing it, at a tenth of the time.
"""

import itertools
from collections.abc import Callable

import numpy as np
import orjson

from .lists import Lists, inside, stretches

CHARACTERS = 1 << 20  # that are remembered, some 25 MB of stretches; then all are forgotten, and soon met again
_ALL = 1 << 60  # tokens: more than any text has


def is_local(tokenizer_json: str) -> bool:
    """Whether this tokenizer's tokens of a text are those of its stretches between spaces (U+0020), by its parts.

    BERT's normalizer changes characters by themselves (and combining marks with the one before, never a space), its
    pre-tokenizer parts words at white space, and WordPiece sees one word at a time. An added token with a space in it
    would be found in a whole text only."""
    parts = orjson.loads(tokenizer_json)
    kinds = [(parts.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    spaced = any(" " in token["content"] for token in parts.get("added_tokens") or [])
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not spaced


class Memo:
    """Stretches and their tokens.

    encode: (texts, room) -> (ids of each, and, for the first `room` of each, whether a word begins there, end to end)."""

    def __init__(self, encode: Callable[[list[str], int], tuple[Lists, np.ndarray]]) -> None:
        self._encode = encode
        self._forget()

    def look_up(self, texts: list[str], room: int) -> tuple[Lists, np.ndarray]:
        """What `encode` would give."""
        parts = [text.split(" ") for text in texts]
        flat = list(itertools.chain.from_iterable(parts))
        places = list(map(self._known.get, flat))
        if None in places:
            new = [part for part, place in zip(flat, places, strict=True) if place is None]
            if self._characters + sum(map(len, new)) > CHARACTERS:
                self._forget()
                new = flat
            self._learn(list(dict.fromkeys(new)))
            places = list(map(self._known.__getitem__, flat))
        places = np.array(places, np.int64)
        lengths = self._lengths[places]
        tokens = stretches(self._tokens, self._starts[places], lengths)
        ends = np.cumsum(list(map(len, parts)), dtype=np.int64)  # of each text, in stretches
        counts = np.diff(np.append(0, np.cumsum(lengths))[ends], prepend=0)
        starts = tokens & 1
        if (counts > room).any():
            starts = starts[inside(counts) < np.repeat(np.minimum(counts, room), counts)]
        return Lists(tokens >> 1, counts), starts.astype(bool)

    def _learn(self, parts: list[str]) -> None:
        ids, begins = self._encode(parts, _ALL)
        self._known.update(zip(parts, range(len(self._known), len(self._known) + len(parts)), strict=True))
        self._characters += sum(map(len, parts))
        self._starts = np.append(self._starts, len(self._tokens) + ids.starts)
        self._lengths = np.append(self._lengths, ids.lengths)
        self._tokens = np.append(self._tokens, ids.values.astype(np.int32) << 1 | begins)

    def _forget(self) -> None:
        self._known: dict[str, int] = {}  # stretch -> its number
        self._starts = self._lengths = np.zeros(0, np.int64)  # of each stretch, in `_tokens`
        self._tokens = np.zeros(0, np.int32)  # id and, in the lowest bit, whether a word begins there
        self._characters = 0
