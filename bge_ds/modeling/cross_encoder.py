"""Pairs of query and passage to scores: an unmodified Hugging Face cross-encoder, run without padding.

Shapes: T tokens of N pairs in one row, D features.

Two kinds, told apart by the config's architecture:

    ...ForSequenceClassification   one label; transformers' own head, which is given one state of each pair
    ...ForCausalLM                 the logit of the token "Yes" at a pair's last token (FlagEmbedding's FlagLLMReranker)

The row runs through the backbone as in `encoder.py`; what pairs consist of is `data/pairs.py`'s part. Types that are not listed
in `encoder.FAMILIES` run padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from bge_ds.kernels.packed import PackedPairs, PackedTexts, chunk_bounds, pack_pairs
from bge_ds.modeling.encoder import ATTENTION, FAMILIES, load_backbone, load_config, packed_inputs, padded_inputs, pool
from bge_ds.modeling.passes import run_pieces

Kind = Literal["classifier", "decoder"]
YES = "Yes"
_KINDS: dict[str, Kind] = {"ForSequenceClassification": "classifier", "ForCausalLM": "decoder"}
_POOLINGS = {"cls": "cls", "bos": "cls", "mean": "mean"}  # `classifier_pooling` of a config; other heads take the first token


def kind_of(config: PretrainedConfig) -> Kind | None:
    """The kind of cross-encoder that a config's architecture names; None for another model, such as an embedder."""
    names = config.architectures or []
    return next((kind for end, kind in _KINDS.items() for name in names if name.endswith(end)), None)


def yes_token(tokenizer) -> int:
    """The id of the token "Yes". Raises ValueError where it is not one token."""
    ids = tokenizer(YES, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path} has no token {YES!r}, whose logit is a decoder's score: use another"
        )
    return ids[0]


class CrossEncoder(nn.Module):
    """forward(pairs) -> N fp32 scores (logits) in the caller's order.

    model: a transformers model of one of the two kinds, its padding-free attention set by `load_backbone` where its family has
    it. yes: id of the token whose logit is the score of a decoder; None for a classifier.
    """

    def __init__(self, model: nn.Module, yes: int | None = None):
        super().__init__()
        self.model, self.yes = model, yes
        self.packed = model.config._attn_implementation == ATTENTION
        self.takes_types = "token_type_ids" in inspect.signature(type(model).forward).parameters
        self.takes_types &= getattr(model.config, "type_vocab_size", 2) > 1
        if yes is None and self.packed:
            pooling = _POOLINGS[getattr(model.config, "classifier_pooling", "cls")]
            model.base_model.register_forward_hook(partial(_one_state_a_pair, pooling), with_kwargs=True)

    @classmethod
    def load(
        cls, name_or_path: str, *, yes: int | None = None, new_head: bool = False, config: PretrainedConfig | None = None,
        attention: str | None = None, **options,
    ) -> CrossEncoder:  # fmt: skip
        """From a folder or hub name. yes: id of a decoder's "Yes", see `yes_token`; a classifier ignores it.

        new_head: a model without a head, for training, becomes a classifier with a random one; by default every weight must be
        there. options: as for `load_backbone` (`attention="sdpa"`: the stock model, padded). Raises ValueError for a model of
        neither kind or with several labels.
        """
        name = str(name_or_path)
        config = config or load_config(name, **options)
        if (kind := kind_of(config)) is None and new_head:
            kind, config.num_labels = "classifier", 1
        check(config, kind)
        if kind == "decoder" and yes is None:
            raise ValueError(f"{name} is a decoder, which scores by the token {YES!r}: give its id as yes")
        if kind == "classifier" and getattr(config, "classifier_pooling", "cls") not in _POOLINGS:
            attention = attention or "sdpa"  # the head needs every token's state
        auto = AutoModelForCausalLM if kind == "decoder" else AutoModelForSequenceClassification
        model = load_backbone(auto, name, config=config, attention=attention, new_head=new_head, **options)
        return cls(model, yes if kind == "decoder" else None)

    def forward(self, pairs: PackedPairs) -> torch.Tensor:
        texts, model = pairs.texts, self.model
        if self.yes is not None:
            last_N = texts.cu_seqlens[1:].long() - 1
            scores_N = model(**packed_inputs(model, texts, texts.ids_T), logits_to_keep=last_N).logits[0, :, self.yes]
        else:
            inputs = packed_inputs if self.packed else padded_inputs
            scores_N = model(**inputs(model, texts, texts.ids_T, pairs.types_T if self.takes_types else None)).logits[:, 0]
        return scores_N.float()[texts.place_N]

    @torch.no_grad()  # not inference_mode: ZeRO-3 gathers weights here that a later backward uses
    def score_ids(
        self, pairs: Sequence[np.ndarray], second: np.ndarray | None = None, batch_tokens: int = 16384,
        tell: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Scores (fp32, on the CPU) of pairs given as `pack_pairs` takes them, at most batch_tokens tokens at a time.

        tell: see `run_pieces`.
        """
        packed = pack_pairs(pairs, second)
        scores_N = run_pieces(self, packed.split(chunk_bounds(packed.texts.runs, None, batch_tokens)), tell)
        return scores_N.cpu()[packed.texts.place_N]


def check(config: PretrainedConfig, kind: Kind | None) -> None:
    """Raises ValueError for a config that no cross-encoder has."""
    decoders = sorted(name for name, family in FAMILIES.items() if family.decoder)
    name, decoder = config.name_or_path or "the model", config.model_type in decoders
    if kind is None:
        raise ValueError(
            f"{name} is a {', '.join(config.architectures or ['model without a named architecture'])}, no cross-encoder: name "
            "one with a classification head of one label, or a decoder that answers Yes"
        )
    if kind == "decoder" and not decoder:
        raise ValueError(f"{name}: {config.model_type} is not among the decoders that score by {YES!r}: {', '.join(decoders)}")
    if kind == "classifier" and decoder:
        raise ValueError(
            f"{name} is a decoder with a classification head, for whose pairs there is no layout: name an encoder with such a "
            f"head, or a decoder without, which scores by {YES!r}"
        )
    if kind == "classifier" and config.num_labels != 1:
        raise ValueError(f"{name} has {config.num_labels} labels; a cross-encoder has one, the score: name another model")


def _one_state_a_pair(pooling: str, backbone: nn.Module, args: tuple, inputs: dict, out):
    """Gives a head, which takes the first token of each row or their mean, rows of one state each: N x 1 x D, not 1 x T x D."""
    texts: PackedTexts | None = inputs.get("packed")
    if texts is None:  # called as the stock model, which it then is
        return out
    hidden_TD = out.last_hidden_state[0]
    out.last_hidden_state = pool(hidden_TD, texts, pooling).to(hidden_TD.dtype)[:, None]
    if getattr(backbone, "pooler", None) is not None:
        out.pooler_output = backbone.pooler(out.last_hidden_state)
    return out
