"""Which word each token of a text belongs to.

Words come from the tokenizer's own word ids (its pre-tokenizer's pieces) and its offsets, not from a marker such as `##`,
so they mean the same for WordPiece, byte-level BPE and SentencePiece. Two cases need the offsets. Scripts written
without spaces arrive as one long piece in byte-level BPE and SentencePiece: there each token is a word, and the tokens
that share one character stay together. And a tokenizer without a pre-tokenizer calls the whole text one piece: there
white space parts the words. Most texts are neither, so those of a batch are looked at as one array.
"""

import itertools
import re
from collections.abc import Callable

import numpy as np
from tokenizers import Encoding

from bge_ds.data.preprocess import word_segmentation

# Scripts whose words are not parted by spaces: Thai to Tibetan, Myanmar, Khmer, kana, ideographs and their extensions.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
Span = tuple[int, int]  # (start, end) of a token in its text, in characters


def starts(
    texts: list[str],
    encodings: list[Encoding],
    room: int,
    splits_at_space: bool,
    segment: word_segmentation.Segment | None = None,
) -> np.ndarray:
    """bool, for the first `room` tokens of each text, end to end: whether a word begins there.

    encodings: of the texts, without special tokens. segment: tells the words of scripts without spaces; without it each
    token there is a word."""
    pieces = [encoding.word_ids[:room] for encoding in encodings]
    lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
    try:
        flat = np.fromiter(itertools.chain.from_iterable(pieces), dtype=np.int64, count=int(lengths.sum()))
        plain = splits_at_space
    except TypeError:  # None among them: a token outside all pieces
        flat, plain = np.zeros(int(lengths.sum()), dtype=np.int64), False
    found = np.ones(len(flat), dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=found[1:])
    begins = np.cumsum(lengths) - lengths
    found[begins[lengths > 0]] = True
    for i, text in enumerate(texts):
        unspaced = not text.isascii() and UNSPACED.search(text) is not None
        if (unspaced or not plain) and pieces[i]:
            found[begins[i] : begins[i] + lengths[i]] = _by_offsets(
                text, encodings[i], pieces[i], splits_at_space, segment if unspaced else None
            )
    return found


def _by_offsets(
    text: str,
    encoding: Encoding,
    pieces: list[int | None],
    splits_at_space: bool,
    segment: word_segmentation.Segment | None,
) -> list[bool] | np.ndarray:
    """`starts` for one text that has tokens; `pieces` are the word ids of those asked for."""
    joined = [i for i in range(1, len(pieces)) if pieces[i] is not None and pieces[i] == pieces[i - 1]]
    span: Callable[[int], Span] = encoding.token_to_chars
    if segment is not None or 4 * len(joined) > len(pieces):
        span = encoding.offsets.__getitem__  # all of them at once: dearer where few are needed
    found = [True] * len(pieces)
    for i in joined:
        found[i] = _starts_word(text, span(i), span(i - 1), splits_at_space)
    if segment is None:
        return found
    inside = segment(text[: word_segmentation.end_of_block(text, span(len(pieces) - 1)[1])])
    # The same character, cut into bytes, begins no word either way; a token that crosses into the next word stays.
    at = np.array([span(i)[0] for i in range(1, len(pieces))], dtype=np.int64)
    starting = np.array(found)
    starting[1:] &= ~inside[np.minimum(at, len(inside) - 1)]
    return starting


def _starts_word(text: str, span: Span, last: Span, splits_at_space: bool) -> bool:
    """Whether a token begins a word inside one piece of the pre-tokenizer."""
    start, end = span[0], last[1]
    if start < end or start >= len(text):  # the same character, cut into bytes
        return False
    if not splits_at_space and any(map(str.isspace, text[end : start + 1])):
        return True
    if not text[last[0] : end].strip():  # a token for the space alone (its span may be trimmed to nothing)
        return False
    return bool(UNSPACED.match(text, start) or (end and UNSPACED.match(text, end - 1)))
