"""Words of scripts written without spaces, as a library finds them: `--word_segmenter`.

RetroMAE masks whole words. Without a segmenter each token of such a script, one character mostly, is a word of its own;
with one, the tokens of a word that it finds are masked together. Tokens are never cut: where one reaches into the next
word, it belongs to the word that it begins in.
"""

import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

NONE = "none"
SEGMENTERS = (NONE, "jieba")
# A text -> for each character whether it continues a word that holds a character of an unspaced script.
Segment = Callable[[str], np.ndarray]

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_BETWEEN = re.compile(r"\s|[^\w+#&.%-]")  # what never lies inside a word: jieba looks at each stretch between alone


def load(name: str) -> Segment | None:
    """The segmenter of that name; None for `none`. Its dictionary, some seconds, is read when the first text comes.

    Raises ValueError for an unknown one, or one that is not installed."""
    if name == NONE:
        return None
    if name not in SEGMENTERS:
        raise ValueError(f"--word_segmenter {name}: give {' or '.join(SEGMENTERS)}")
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            "--word_segmenter jieba needs jieba, which is not installed: pip install jieba (or bge_ds with [chinese]),"
            f" or leave the flag out, or give {NONE}"
        )

    @lru_cache(maxsize=1)
    def tokenizer() -> Any:
        import jieba

        jieba.setLogLevel(logging.WARNING)
        made = jieba.Tokenizer()
        made.initialize()
        return made

    def segment(text: str) -> np.ndarray:
        inside = np.zeros(max(1, len(text)), bool)
        for word, start, end in tokenizer().tokenize(text):
            if end - start > 1 and _HAN.search(word):
                inside[start + 1 : end] = True
        return inside

    return segment


def version(name: str) -> str:
    """What tells one segmenter's words from another's: its name and version; the name alone for `none`."""
    return name if name == NONE else f"{name} {importlib.metadata.version(name)}"


def end_of_block(text: str, at: int) -> int:
    """The end of the stretch that position `at` lies in: words of the text before do not depend on what follows it."""
    found = _BETWEEN.search(text, at)
    return found.start() if found else len(text)
