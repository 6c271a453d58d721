"""Teachers: what gives a query and a passage a score. One of three kinds, told by the model's files or named by a flag.

    classifier   a cross-encoder with a classification head of one label
    decoder      a cross-encoder that answers Yes or No
    embedder     similarity of two vectors

Shapes: B queries, P passages, each of one of the queries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from bge_ds.data.pairs import PASSAGE_PREFIX, PROMPT, QUERY_PREFIX, PairLayout, Pairs
from bge_ds.data.preprocess import validate
from bge_ds.data.ragged import RaggedArrays
from bge_ds.evaluation import retrieval
from bge_ds.evaluation.embedder import Embedder
from bge_ds.modeling import cross_encoder, encoder
from bge_ds.modeling.cross_encoder import CrossEncoder, Kind

DEFAULT_MAX_LEN = 512
_TOKENIZED = 512  # texts handed to the tokenizer at a time
Tell = Callable[[int, int], None]


class Read(NamedTuple):
    """Texts that have been tokenized, as a teacher wants them. tokens: in all. units: what `tell` counts."""

    content: Any
    tokens: int
    units: int


class Teacher(Protocol):
    def read(self, queries: list[str], passages: list[str], query_P: np.ndarray) -> Read:
        """Tokenizes. query_P: the query of each passage."""

    def score(self, read: Read, tell: Tell) -> np.ndarray:
        """fp32 P. tell: is told the units and tokens of each pass."""

    def describe(self) -> str:
        """How it computes, in words."""


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made, the prompts before queries and passages, and a decoder's prompt after them.

    max_len: tokens of a pair with its special tokens; of a decoder without its two line breaks and prompts (FlagEmbedding).
    """

    max_len: int
    query_max_len: int
    passage_max_len: int
    query_prompt: str
    passage_prompt: str
    prompt: str

    @classmethod
    def of(
        cls, kind: Kind, longest: int, *, max_len: int | None = None, query_max_len: int | None = None,
        passage_max_len: int | None = None, query_prompt: str | None = None, passage_prompt: str | None = None,
        prompt: str | None = None,
    ) -> PairSettings:  # fmt: skip
        """FlagEmbedding's where None is given; longest: positions of the model."""
        decoder = kind == "decoder"
        length = max_len or min(DEFAULT_MAX_LEN, longest)
        return cls(
            max_len=length, query_max_len=query_max_len or length * 3 // 4, passage_max_len=passage_max_len or length,
            query_prompt=(QUERY_PREFIX if decoder else "") if query_prompt is None else query_prompt,
            passage_prompt=(PASSAGE_PREFIX if decoder else "") if passage_prompt is None else passage_prompt,
            prompt=(PROMPT if decoder else "") if prompt is None else prompt,
        )  # fmt: skip


class CrossEncoderTeacher:
    """Scores are logits of a `CrossEncoder`."""

    def __init__(
        self, model: CrossEncoder, tokenizer: Any, settings: PairSettings, *, batch_size: int | None = None, bf16: bool = False,
        use_cpu: bool = False,
    ) -> None:  # fmt: skip
        """batch_size: full-length pairs, by default 64, and 8 on a CPU. Raises ValueError as `layout_of`."""
        self.device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
        self.model, self.tokenizer, self.settings, self.bf16 = model.to(self.device).eval(), tokenizer, settings, bf16
        self.layout, self.max_len = layout_of(model.model.config, tokenizer, settings, decoder=model.yes is not None)
        self.batch_tokens = (batch_size or (8 if self.device.type == "cpu" else 64)) * self.max_len

    @classmethod
    def load(
        cls, name: str, kind: Kind, settings: PairSettings, *, cache_dir: str | None = None, **how: Any
    ) -> CrossEncoderTeacher:
        """From a folder or hub name. how: arguments of the constructor. Raises ValueError for a model that cannot serve."""
        tokenizer = validate.load_tokenizer(name, cache_dir)
        yes = cross_encoder.yes_token(tokenizer) if kind == "decoder" else None
        try:
            model = CrossEncoder.load(name, yes=yes, cache_dir=cache_dir)
        except OSError as error:
            raise ValueError(f"--model_name_or_path {name}: {error}") from None
        return cls(model, tokenizer, settings, **how)

    def read(self, queries: list[str], passages: list[str], query_P: np.ndarray) -> Read:
        s = self.settings
        left, right = self._ids(s.query_prompt, queries), self._ids(s.passage_prompt, passages)
        lengths = {"query_max_len": s.query_max_len, "passage_max_len": s.passage_max_len, "max_len": self.max_len}
        pairs = self.layout.build(left.take(query_P), right, **lengths)
        return Read(pairs, int(pairs.ids.lengths.sum()), len(query_P))

    def score(self, read: Read, tell: Tell) -> np.ndarray:
        pairs: Pairs = read.content
        half = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with half:
            return self.model.score_ids(pairs.ids.split(), pairs.second, self.batch_tokens, tell).numpy()

    def describe(self) -> str:
        config = self.model.model.config
        kind = "logit of the token Yes" if self.model.yes is not None else "classification head"
        how = encoder.describe_execution(config, self.device, next(self.model.parameters()).dtype)
        return f"cross-encoder ({kind}), on {self.device}, {how}{', bf16' if self.bf16 else ''}"

    def _ids(self, prompt: str, texts: list[str]) -> RaggedArrays:
        """Ids without special tokens; a text that occurs twice is tokenized once."""
        known = {text: n for n, text in enumerate(dict.fromkeys(texts))}
        made = retrieval.tokenize_content(self.tokenizer, [prompt + text for text in known])
        return made.take(np.fromiter(map(known.__getitem__, texts), np.int64, len(texts)))


def layout_of(config: Any, tokenizer: Any, settings: PairSettings, decoder: bool) -> tuple[PairLayout, int]:
    """(how pairs are laid out, tokens of the longest).

    Raises ValueError where a query leaves no room for a passage, and where model, tokenizer and lengths do not fit.
    """
    if not decoder:
        layout, max_len = PairLayout.of_tokenizer(tokenizer), settings.max_len
    else:
        cross_encoder.yes_token(tokenizer)
        layout = PairLayout.of_decoder(tokenizer, settings.prompt)
        # FlagEmbedding gives query and passage the room of line break and prompt, and then adds these.
        max_len = settings.max_len + 2 * len(layout.after)
    try:
        encoder.check_lengths(config, max_len=max_len)
        layout.check_room(settings.query_max_len, max_len)
    except ValueError as error:
        asked = f" and 2 x {len(layout.after)} tokens of the prompt" if decoder else ""
        raise ValueError(f"--query_max_len {settings.query_max_len}, --max_len {settings.max_len}{asked}: {error}") from None
    encoder.check_vocabulary(config, tokenizer)
    return layout, max_len


class EmbedderTeacher:
    """Scores are inner products of an `Embedder`'s vectors: cosines where it normalises."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def read(self, queries: list[str], passages: list[str], query_P: np.ndarray) -> Read:
        known = {text: n for n, text in enumerate(dict.fromkeys(passages))}
        ids = self.embedder.tokenize(queries, "query"), self._tokenized(list(known))
        row_P = np.fromiter(map(known.__getitem__, passages), np.int64, len(passages))
        return Read((*ids, query_P, row_P), sum(len(text) for side in ids for text in side), len(queries) + len(known))

    def _tokenized(self, passages: list[str]) -> list[list[int]]:
        parts = range(0, len(passages), _TOKENIZED)
        return [ids for at in parts for ids in self.embedder.tokenize(passages[at : at + _TOKENIZED], "passage")]

    def score(self, read: Read, tell: Tell) -> np.ndarray:
        queries, passages, query_P, row_P = read.content
        left_BD = self.embedder.encode_ids(queries, "query", tell)
        right_ND = self.embedder.encode_ids(passages, "passage", tell)
        # Row by row in fp32: the products of a pair must not depend on its neighbours.
        parts = zip(torch.from_numpy(query_P).split(1024), torch.from_numpy(row_P).split(1024), strict=True)
        return torch.cat([(left_BD[q] * right_ND[p]).sum(1) for q, p in parts]).numpy()

    def describe(self) -> str:
        return f"embedder, {self.embedder.describe()}"


def config_of(name: str, cache_dir: str | None, flag: str = "--model_name_or_path") -> Any:
    """A model's config. Raises ValueError, naming the flag, where it cannot be read."""
    try:
        return encoder.load_config(name, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {name}: {str(error).splitlines()[0]}") from None


def detect(config: Any, folder: Path) -> str:
    """A teacher's kind, by the architecture of its config; sentence-transformers' files make a decoder an embedder."""
    kind = cross_encoder.kind_of(config)
    if kind == "decoder" and (folder / "modules.json").is_file():
        return "embedder"
    return kind or "embedder"
