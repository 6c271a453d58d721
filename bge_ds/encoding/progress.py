"""How far encoding is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

EVERY_S = 30.0  # between two lines


class Progress:
    """Texts done of `total`, with the rates since it was made and an estimate of the time left.

    The estimate counts tokens: the texts of a block come longest first, so that a rate of texts is far off within one.
    done: texts that an earlier run finished. shows: False for ranks that have nothing to say.
    """

    def __init__(
        self, total: int, done: int = 0, name: str = "", shows: bool = True, stream: TextIO | None = None, unit: str = "texts"
    ):
        self.total, self.before, self.name, self.shows, self.unit = total, done, name, shows, unit
        self.texts = self.tokens = 0  # encoded
        self.known_texts = self.known_tokens = 0  # tokenized
        self._stream = stream or sys.stderr
        self._began = self._said = time.monotonic()
        terminal = shows and self._stream.isatty()
        shape = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + unit + "{postfix}"
        self._bar = tqdm(total=total, initial=done, desc=name, bar_format=shape, file=self._stream) if terminal else None

    def tokenized(self, texts: int, tokens: int) -> None:
        self.known_texts, self.known_tokens = self.known_texts + texts, self.known_tokens + tokens

    def encoded(self, texts: int, tokens: int) -> None:
        self.texts, self.tokens = self.texts + texts, self.tokens + tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self.rates(), refresh=False)
            self._bar.update(texts)
        elif self.shows and time.monotonic() - self._said >= EVERY_S:
            self._say()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shows:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        done = f"{self.before + self.texts:,} of {self.total:,} {self.unit}"
        print(f"{self.name}{done}, {self.rates()}", file=self._stream, flush=True)

    def rates(self) -> str:
        """Texts and tokens a second, and the time left, in words."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self.texts / seconds
        words = f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s, {self.tokens / seconds:,.0f} tokens/s"
        left = self.total - self.before - self.texts
        if not left or not self.tokens:
            return words
        ahead = (self.total - self.before) * self.known_tokens / max(1, self.known_texts) - self.tokens
        return f"{words}, {_time(seconds * max(0.0, ahead) / self.tokens)} left"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
