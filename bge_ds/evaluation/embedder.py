"""A trained model as a function from texts to vectors, with the pooling, normalisation and prompts that its files name.

Shapes: N texts, D features.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bge_ds.data.preprocess import validate
from bge_ds.evaluation import DEFAULT_LENGTHS, retrieval
from bge_ds.modeling import encoder

Side = Literal["query", "passage"]
PROMPTS = "config_sentence_transformers.json"
_SETTINGS = ("modules.json", "*/config.json", PROMPTS)


@dataclass
class EmbeddingSettings:
    """How texts become vectors. sources: where each setting comes from, to be printed."""

    pooling: str
    normalize: bool
    query_prompt: str = ""
    passage_prompt: str = ""
    sources: list[str] = field(default_factory=list)

    @classmethod
    def read(
        cls, folder: Path, *, pooling: str | None = None, normalize: bool | None = None, query_prompt: str | None = None,
        passage_prompt: str | None = None,
    ) -> EmbeddingSettings:  # fmt: skip
        """Given values take precedence, then the model's sentence-transformers files, then cls and normalized.

        Raises ValueError for files that cannot be read.
        """
        found = encoder.read_pooling(folder)
        origin = "from modules.json" if found else "by default: the model has no modules.json"
        settings = cls(*(found or ("cls", True)))
        for name, value in (("pooling", pooling), ("normalize", normalize)):
            if value is not None:
                setattr(settings, name, value)
            settings.sources.append(f"{name} {getattr(settings, name)} ({origin if value is None else 'from the flag'})")
        prompts = read_prompts(folder / PROMPTS)
        sides = (("query", query_prompt, ("query",)), ("passage", passage_prompt, ("passage", "document", "corpus")))
        for side, value, keys in sides:
            prompt = next((prompts[key] for key in keys if prompts.get(key)), "") if value is None else value
            setattr(settings, f"{side}_prompt", prompt)
            if prompt:
                settings.sources.append(f"{side} prompt {prompt!r} (from the {'model' if value is None else 'flag'})")
        return settings


def read_prompts(path: Path) -> dict[str, str]:
    """The prompts of a sentence-transformers configuration by name; {} without the file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("prompts") or {}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error})") from None


def settings_folder(
    name_or_path: str, cache_dir: str | None = None, wanted: tuple[str, ...] = _SETTINGS, flag: str = "--model_name_or_path"
) -> Path:
    """The folder of a model; of a hub model the `wanted` files are downloaded, by default a few kB of sentence-transformers'.

    Raises ValueError, naming the flag, where there is no such model.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, cache_dir=cache_dir, allow_patterns=list(wanted)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{flag} {name_or_path}: neither a folder here nor a model that the hub gave ({error})") from None


class Embedder:
    """Texts to vectors: `embedder(["what is a shard"], "query")`, or `embed` for a numpy-friendly tensor on the CPU."""

    def __init__(
        self, model: encoder.Encoder, tokenizer: PreTrainedTokenizerBase, settings: EmbeddingSettings, *,
        query_max_len: int | None = None, passage_max_len: int | None = None, batch_size: int | None = None,
        bf16: bool = False, use_cpu: bool = False,
    ):  # fmt: skip
        """query_max_len, passage_max_len: tokens, prompt and special tokens included. batch_size: full-length texts, by default
        64, and 8 on a CPU, whose caches hold no more."""
        limit = encoder.longest_text(model.backbone.config)
        given = {"query_max_len": query_max_len, "passage_max_len": passage_max_len}
        self.lengths = {name: given[name] or min(default, limit) for name, default in DEFAULT_LENGTHS.items()}
        encoder.check_lengths(model.backbone.config, **self.lengths)
        self.device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
        self.model, self.tokenizer, self.settings = model.to(self.device).eval(), tokenizer, settings
        self.batch_size, self.bf16 = batch_size or (8 if self.device.type == "cpu" else 64), bf16

    @classmethod
    def load(
        cls, name_or_path: str | Path, *, cache_dir: str | None = None, pooling: str | None = None,
        normalize: bool | None = None, query_prompt: str | None = None, passage_prompt: str | None = None, **how,
    ) -> Embedder:  # fmt: skip
        """From a folder or hub name. None: as the model's files say. how: arguments of the constructor.

        Raises ValueError for a model that does not exist or whose files cannot be read.
        """
        name = str(name_or_path)
        settings = EmbeddingSettings.read(
            settings_folder(name, cache_dir), pooling=pooling, normalize=normalize, query_prompt=query_prompt,
            passage_prompt=passage_prompt,
        )  # fmt: skip
        tokenizer = validate.load_tokenizer(name, cache_dir=cache_dir)
        try:
            model = encoder.Encoder.load(name, settings.pooling, settings.normalize, cache_dir=cache_dir)
        except OSError as error:
            raise ValueError(f"--model_name_or_path {name}: {error}") from None
        return cls(model, tokenizer, settings, **how)

    def __call__(self, texts: list[str], side: Side) -> torch.Tensor:
        """Vectors (N x D, fp32, on the model's device) of texts with the side's prompt, cut to the side's length."""
        return self.encode_ids(self.tokenize(texts, side), side).to(self.device)

    def tokenize(self, texts: list[str], side: Side) -> list[list[int]]:
        """Token ids of texts with the side's prompt, special tokens included, cut to the side's length."""
        prompt = self.settings.query_prompt if side == "query" else self.settings.passage_prompt
        return retrieval.tokenize(self.tokenizer, [prompt + text for text in texts], self.lengths[f"{side}_max_len"])

    def encode_ids(
        self, ids: Sequence[Sequence[int] | np.ndarray], side: Side, tell: Callable[[int, int], None] | None = None
    ) -> torch.Tensor:
        """Vectors (N x D, fp32, on the CPU) of what `tokenize` gave. tell: is told the texts and tokens of each pass."""
        half = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with half:
            return self.model.encode_ids(list(ids), self.batch_size * self.lengths[f"{side}_max_len"], tell).float()

    def describe(self) -> str:
        """How it computes and where its settings come from."""
        how = encoder.describe_execution(self.model.backbone.config, self.device, next(self.model.parameters()).dtype)
        return f"on {self.device}, {how}: {', '.join([*self.settings.sources, *['bf16'] * self.bf16])}"

    def effective(self) -> dict[str, str | int | bool]:
        """The settings as plain values."""
        settings = {key: getattr(self.settings, key) for key in ("pooling", "normalize", "query_prompt", "passage_prompt")}
        return settings | self.lengths | {"bf16": self.bf16, "device": self.device.type}
