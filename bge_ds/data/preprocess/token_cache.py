"""What a tokenizer makes of each stretch of text between two spaces, remembered: most stretches come again and again.

Some tokenizers look no further than a space, as BERT's: the tokens of a text are those of its stretches, one after the
other. Then a look-up of a stretch takes the place of tokenizing it.
"""

import itertools
from collections.abc import Callable

import numpy as np
import orjson

from bge_ds.data.ragged import RaggedArrays, stretches

CHARACTERS = 1 << 20  # that are remembered (measured: some 20 MiB a process); then those that came once are forgotten
TOGETHER = 64  # new stretches that are tokenized as one text: one by one takes twice as long


def is_local(tokenizer_json: str) -> bool:
    """Whether this tokenizer's tokens of a text are those of its stretches between spaces (U+0020), by its parts.

    BERT's normalizer changes characters by themselves (and combining marks with the one before, never a space), its
    pre-tokenizer parts words at white space, and WordPiece sees one word at a time. An added token with a space in it
    would be found in a whole text only."""
    parts = orjson.loads(tokenizer_json)
    kinds = [(parts.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    spaced = any(" " in token["content"] for token in parts.get("added_tokens") or [])
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not spaced


class TokenCache:
    """Stretches and their tokens.

    encode: texts -> (ids of each, whether a word begins at each token, the character where each token begins), all whole
    and end to end."""

    def __init__(self, encode: Callable[[list[str]], tuple[RaggedArrays, np.ndarray, np.ndarray]]) -> None:
        self._encode = encode
        self._known: dict[str, int] = {}  # stretch -> its number
        self._starts = self._lengths = np.zeros(0, np.int64)  # of each stretch, in `_tokens`
        self._tokens = np.zeros(0, np.int32)  # id and, in the lowest bit, whether a word begins there
        self._uses = np.zeros(0, np.int64)  # of each stretch, since the last time that some were forgotten
        self._characters = 0

    def look_up(self, texts: list[str]) -> tuple[RaggedArrays, np.ndarray]:
        """(ids of each text, whether a word begins at each token), without special tokens."""
        parts = [text.split(" ") for text in texts]
        flat = list(itertools.chain.from_iterable(parts))
        places = list(map(self._known.get, flat))
        if None in places:
            new = dict.fromkeys(part for part, place in zip(flat, places, strict=True) if place is None)
            if self._characters + sum(map(len, new)) > CHARACTERS:
                self._forget()
                new = dict.fromkeys(part for part in flat if part not in self._known)
            self._learn(list(new))
            places = list(map(self._known.__getitem__, flat))
        places = np.array(places, np.int64)
        self._uses += np.bincount(places, minlength=len(self._known))
        lengths = self._lengths[places]
        tokens = stretches(self._tokens, self._starts[places], lengths)
        ends = np.cumsum(list(map(len, parts)), dtype=np.int64)  # of each text, in stretches
        counts = np.diff(np.append(0, np.cumsum(lengths))[ends], prepend=0)
        return RaggedArrays(tokens >> 1, counts), (tokens & 1).astype(bool)

    def _learn(self, new: list[str]) -> None:
        texts = [" ".join(new[first : first + TOGETHER]) for first in range(0, len(new), TOGETHER)]
        ids, begins, at = self._encode(texts)
        # Where stretches begin when the texts, too, are joined by a space.
        first = np.cumsum([0] + [len(part) + 1 for part in new])[:-1]
        text_begins = first[::TOGETHER]
        part_of_token = np.searchsorted(first, at + np.repeat(text_begins, ids.lengths), side="right") - 1
        assert (np.diff(part_of_token) >= 0).all(), "tokens out of the order of their text"
        lengths = np.bincount(part_of_token, minlength=len(new))
        self._known.update(zip(new, range(len(self._known), len(self._known) + len(new)), strict=True))
        self._characters += sum(map(len, new))
        self._starts = np.append(self._starts, len(self._tokens) + np.cumsum(lengths) - lengths)
        self._lengths = np.append(self._lengths, lengths)
        self._tokens = np.append(self._tokens, ids.values.astype(np.int32) << 1 | begins)
        self._uses = np.append(self._uses, np.zeros(len(new), np.int64))

    def _forget(self) -> None:
        """Keeps what came most often, more than once, and fills half of the room."""
        parts = list(self._known)  # in the order of their numbers
        most = np.argsort(-self._uses, kind="stable")
        most = most[self._uses[most] > 1]
        most = most[np.cumsum([len(parts[place]) for place in most.tolist()]) <= CHARACTERS // 2]
        kept = np.sort(most)
        self._known = {parts[place]: number for number, place in enumerate(kept.tolist())}
        self._characters = sum(map(len, self._known))
        self._tokens = stretches(self._tokens, self._starts[kept], self._lengths[kept])
        self._lengths = self._lengths[kept]
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._uses = np.zeros(len(kept), np.int64)
