"""Texts to vectors: an unmodified Hugging Face backbone, run without padding, pooled and normalised.

Shapes: T tokens of N texts in one row, D features.

All texts of a batch are packed into one row. Everything in a transformer except attention works token by token and needs no
change. Attention is replaced, through transformers' own interface, by `kernels.attention.varlen_attention`, which keeps each
text to itself; positions restart at each text. Weights and saved files stay the stock model's. A model type that is not listed
in FAMILIES runs padded, and the run's summary says so.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoConfig, AutoModel, LlamaConfig, LlamaModel, PretrainedConfig

from bge_ds.kernels.attention import BACKENDS, attention_backend, varlen_attention, why_slow
from bge_ds.kernels.cpu.dropout import use_fast_dropout
from bge_ds.kernels.packed import PackedTexts, chunk_bounds, pack, split
from bge_ds.kernels.segment_mean import segment_mean
from bge_ds.kernels.triton_support import at_least_fp32
from bge_ds.modeling.compilation import pad_to_bucket
from bge_ds.modeling.passes import run_pieces

logger = logging.getLogger(__name__)

ATTENTION = "bge_ds_varlen"
POOLINGS = ("cls", "mean", "last_token")
# The flags of sentence-transformers' Pooling config, before it had "pooling_mode".
POOLING_FLAGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last_token": "pooling_mode_lasttoken"}


class Family(NamedTuple):
    """What the forward needs to know of a model type; the defaults are for unlisted types.

    unpadded: its attention can be replaced through transformers' interface. positions_after_padding: positions start at the
    padding id + 1 (RoBERTa), not at 0. decoder: attention is causal unless the config says `is_causal: false`.
    """

    unpadded: bool = False
    positions_after_padding: bool = False
    decoder: bool = False


_ENCODERS = ("bert", "distilbert", "electra", "ernie", "eurobert", "modernbert", "nomic_bert")
_ROBERTAS = ("camembert", "roberta", "xlm-roberta", "xlm-roberta-xl")
_DECODERS = ("gemma", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
# A type may be added if test_encoder.py passes for it unchanged.
FAMILIES = {
    **dict.fromkeys(_ENCODERS, Family(unpadded=True)),
    **dict.fromkeys(_ROBERTAS, Family(unpadded=True, positions_after_padding=True)),
    **dict.fromkeys(_DECODERS, Family(unpadded=True, decoder=True)),
    "mpnet": Family(positions_after_padding=True),
}


@torch.compiler.disable  # text boundaries differ at each step: inside a graph, they would recompile it each time
def _attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, is_causal=None, packed=None,
    **kwargs,
):  # fmt: skip
    """Called by transformers: q, k, v are 1 x heads x T x head_dim; the output is 1 x T x heads x head_dim."""
    if packed is None:
        raise ValueError(
            f"{type(module).__name__} was built for padding-free input ({ATTENTION!r}) and called without it; "
            'load the saved model with transformers, or call model.set_attn_implementation("sdpa") first'
        )
    causal_by_default = getattr(module, "is_causal", False)
    causal = (causal_by_default if is_causal is None else is_causal) and getattr(module.config, "is_causal", True)
    if sliding_window is not None and causal_by_default and not causal:
        # transformers' mask of a bidirectional decoder reaches `sliding_window` tokens, one more than that of a causal one.
        sliding_window += 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attention(
        q, k, v, packed.cu_seqlens, packed.runs, scale=scaling, dropout=dropout, causal=causal, window=sliding_window
    )
    return out[None], None


# Registered without a mask function, so that transformers makes no mask: to do so it would read back from the device whether a
# decoder's positions restart.
AttentionInterface.register(ATTENTION, _attention)


def can_run_unpadded(config: PretrainedConfig) -> bool:
    return _family(config).unpadded


def unpadded_families() -> str:
    return ", ".join(sorted(name for name, family in FAMILIES.items() if family.unpadded))


def _family(config: PretrainedConfig) -> Family:
    return FAMILIES.get(config.model_type, Family())


def _attention_to_use(config: PretrainedConfig, wanted: str | None) -> str | None:
    """The attention implementation to request; None leaves the choice to transformers, as not every padded model has SDPA."""
    if can_run_unpadded(config):
        return wanted or ATTENTION
    return None if wanted == "sdpa" else wanted


def has_causal_attention(config: PretrainedConfig) -> bool:
    """Whether a token sees only itself and the tokens before it."""
    return _family(config).decoder and getattr(config, "is_causal", True)


def longest_text(config: PretrainedConfig) -> int:
    """Number of positions: those with an embedding or, for rotary positions, those that the config names."""
    limit = getattr(config, "max_position_embeddings", None) or 1 << 30
    if _family(config).positions_after_padding:
        return limit - config.pad_token_id - 1
    return limit


def check_lengths(config: PretrainedConfig, **lengths: int) -> None:
    for name, length in lengths.items():
        if length > longest_text(config):
            raise ValueError(
                f"--{name} {length} is more than the {longest_text(config)} positions of {config.name_or_path or 'the model'}; "
                f"use --{name} {longest_text(config)} or less, or a model with more positions"
            )


def check_vocabulary(config: PretrainedConfig, tokenizer) -> None:
    """ValueError where the tokenizer has ids without an embedding in the model: on a GPU they would abort the process."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer knows {len(tokenizer)} tokens and {config.name_or_path or 'the model'} embeds {config.vocab_size}: "
            "they do not belong together; name the model's own tokenizer, or enlarge the model by transformers' "
            "resize_token_embeddings and save it"
        )


def load_config(name_or_path: str, **options) -> PretrainedConfig:
    """`AutoConfig.from_pretrained` that never runs, or offers to run, code from the model's folder."""
    return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **options)


def load_backbone(
    model_class, name_or_path: str, *, config: PretrainedConfig | None = None, attention: str | None = None,
    bidirectional: bool = False, new_head: bool = True, **options,
):  # fmt: skip
    """`model_class.from_pretrained` in fp32, with padding-free attention where the family supports it.

    bidirectional: let every token of a decoder see the whole text. It is written into the config, so the saved model does so
    too, here and in transformers; False leaves the config as it is. new_head: whether a head or pooler may start random.
    """
    # A copy: two models built from one config object would share its attention setting.
    config = copy.deepcopy(config) if config is not None else load_config(name_or_path, **options)
    if bidirectional:
        _make_bidirectional(config)
    attention = _attention_to_use(config, attention)
    with _quiet_transformers():
        model, info = model_class.from_pretrained(
            name_or_path, config=config, attn_implementation=attention, dtype=torch.float32, output_loading_info=True,
            trust_remote_code=False, **options,
        )  # fmt: skip
    _restore_buffers(model)
    # A head or pooler may be new. Weights missing from the encoder itself mean a wrong folder, and training would hide it.
    required = {k for k, _ in model.base_model.named_parameters()} - {"pooler.dense.weight", "pooler.dense.bias"}
    names = {k: k.removeprefix(model.base_model_prefix + ".") for k in sorted(info["missing_keys"])}
    missing = [k for k, name in names.items() if not new_head or name in required]
    if missing or info["mismatched_keys"]:
        what = ", ".join(missing[:3]) or f"shapes of {sorted(info['mismatched_keys'])[:3]}"
        raise ValueError(f"{name_or_path} does not hold a whole {config.model_type} model: wrong or missing {what}")
    new = sorted({k.rsplit(".", 1)[0] for k in info["missing_keys"]})
    if new:
        logger.info("%s has no weights for %s: they start random", name_or_path, ", ".join(new))
    if attention == ATTENTION:
        use_fast_dropout(model)
    return model


def _restore_buffers(model: nn.Module) -> None:
    """Recompute in fp32 the buffers that `from_pretrained` has computed in 16 bits: rotary frequencies, under ZeRO-3.

    DeepSpeed creates every tensor in 16 bits while it shards a model of that type, and transformers 5.17 leaves these so.
    """
    for module in model.modules():
        rounded = [name for name, x in module.named_buffers(recurse=False) if x.dtype in (torch.bfloat16, torch.float16)]
        for name in rounded:
            module._buffers[name] = torch.full_like(module._buffers[name], float("nan"), dtype=torch.float32)
        if rounded:  # transformers initialises no parameter again that it has loaded
            model._init_weights(module)
        for name in rounded:
            if module._buffers[name].isnan().any():
                raise ValueError(
                    f"transformers {transformers.__version__} makes {name} of {type(module).__name__} in 16 bits under ZeRO 3; "
                    "upgrade transformers, or take --deepspeed zero2"
                )


def _make_bidirectional(config: PretrainedConfig) -> None:
    if not _family(config).decoder:
        decoders = ", ".join(sorted(name for name, family in FAMILIES.items() if family.decoder))
        raise ValueError(
            f"bidirectional is for decoders ({decoders}); {config.name_or_path or 'the model'} is of type "
            f"{config.model_type}; leave it out"
        )
    if not _stock_runs_bidirectionally():
        raise ValueError(
            f"bidirectional needs a transformers that heeds is_causal in a decoder's config; {transformers.__version__} does "
            "not, and would run the saved model otherwise than it was trained; upgrade transformers"
        )
    config.is_causal = False


@cache
def _stock_runs_bidirectionally() -> bool:
    """Whether the installed transformers honours `is_causal: false`: tried on a tiny model, as no version is documented."""
    config = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.is_causal = False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = LlamaModel(config).eval()
        one, other = model(input_ids=torch.tensor([[1, 2], [1, 3]]), use_cache=False).last_hidden_state[:, 0]
    return not torch.equal(one, other)


@contextmanager
def _quiet_transformers():
    """Suppress its loading report, which lists every unused head; `load_backbone` reports what matters."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def build_backbone(model_class, config: PretrainedConfig) -> nn.Module:
    """As `load_backbone`, with random weights."""
    attention = _attention_to_use(config, None)
    model = model_class.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)
    if attention == ATTENTION:
        use_fast_dropout(model)
    return model


def run_backbone(backbone: nn.Module, texts: PackedTexts, ids_T: torch.Tensor | None = None) -> torch.Tensor:
    """Last hidden states T x D of packed texts; `ids_T` replaces the texts' own ids, for instance by masked ones."""
    ids_T = texts.ids_T if ids_T is None else ids_T
    if backbone.config._attn_implementation == ATTENTION:
        return backbone(**packed_inputs(backbone, texts, ids_T)).last_hidden_state[0, : texts.tokens]
    text_T = torch.repeat_interleave(texts.cu_seqlens.diff(), output_size=texts.tokens)
    return backbone(**padded_inputs(backbone, texts, ids_T)).last_hidden_state[text_T, texts.positions_T]


def packed_inputs(
    model: nn.Module, texts: PackedTexts, ids_T: torch.Tensor, types_T: torch.Tensor | None = None
) -> dict[str, Any]:
    """What a padding-free model, with or without a head, is called with."""
    bucket = getattr(model.base_model, "token_bucket", None)
    if bucket and model.training:
        texts, ids_T = pad_to_bucket(texts, ids_T, bucket)
    inputs = {"input_ids": ids_T[None], "position_ids": position_ids(model.config, texts)[None], "packed": texts}
    if types_T is not None:
        inputs["token_type_ids"] = F.pad(types_T, (0, len(ids_T) - len(types_T)))[None]
    return inputs | no_cache(model)


def no_cache(backbone: nn.Module) -> dict[str, bool]:
    """An option of the forward pass that turns off the key-value cache of decoders; not every encoder accepts the argument."""
    return {"use_cache": False} if _knows_use_cache(type(backbone)) else {}


@cache
def _knows_use_cache(model_class: type) -> bool:
    return "use_cache" in inspect.signature(model_class.forward).parameters


def position_ids(config: PretrainedConfig, texts: PackedTexts) -> torch.Tensor:
    """int64 T: indices into the model's position embedding."""
    if _family(config).positions_after_padding:
        return texts.positions_T + config.pad_token_id + 1
    return texts.positions_T


def padded_inputs(
    model: nn.Module, texts: PackedTexts, ids_T: torch.Tensor, types_T: torch.Tensor | None = None
) -> dict[str, Any]:
    """The same for a model that runs padded: texts in packed order."""
    fills = {"input_ids": model.config.pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
    values = zip(fills.items(), (ids_T, torch.ones_like(ids_T), types_T), strict=True)
    lengths = [length for n, length in texts.runs for _ in range(n)]
    return no_cache(model) | {
        name: pad_sequence(list(values_T.split(lengths)), batch_first=True, padding_value=fill)
        for (name, fill), values_T in values
        if values_T is not None
    }


def pool(hidden_TD: torch.Tensor, texts: PackedTexts, pooling: str) -> torch.Tensor:
    """One vector per text, N x D, in packed order; at least fp32, whatever the model computes in."""
    if pooling == "cls":
        return at_least_fp32(hidden_TD[texts.cu_seqlens[:-1].long()])
    if pooling == "last_token":
        return at_least_fp32(hidden_TD[texts.cu_seqlens[1:].long() - 1])
    return segment_mean(hidden_TD, texts.cu_seqlens, texts.runs)


class Encoder(nn.Module):
    """forward(texts) -> N x D fp32 vectors in the caller's order.

    backbone: a Hugging Face encoder or decoder. pooling: one of POOLINGS. normalize: to unit length.
    """

    def __init__(self, backbone: nn.Module, pooling: str = "cls", normalize: bool = True):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
        if pooling == "cls" and has_causal_attention(backbone.config):
            raise ValueError(
                f"pooling 'cls' of a causal {backbone.config.model_type}: the first token sees none of the text; use "
                "last_token or mean, or load it with bidirectional=True"
            )
        self.backbone, self.pooling, self.normalize = backbone, pooling, normalize
        # The pooler's output is never used: trainable, it would only decay in the optimizer.
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler.requires_grad_(False)

    @classmethod
    def load(cls, name_or_path: str, pooling: str = "cls", normalize: bool = True, **options):
        """From a folder or hub name; options as for `load_backbone` (`attention="sdpa"`: the stock model, padded)."""
        return cls(load_backbone(AutoModel, str(name_or_path), **options), pooling, normalize)

    def forward(self, texts: PackedTexts) -> torch.Tensor:
        vectors = pool(run_backbone(self.backbone, texts), texts, self.pooling)
        if self.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return vectors[texts.place_N]

    @torch.no_grad()  # not inference_mode: ZeRO-3 gathers weights here that a later backward uses
    def encode_ids(self, ids: list, batch_tokens: int = 16384, tell: Callable[[int, int], None] | None = None) -> torch.Tensor:
        """Vectors (len(ids) x D, fp32, on the CPU) of texts given as token ids, at most batch_tokens tokens at a time.

        tell: see `run_pieces`.
        """
        texts, _ = pack(ids)
        vectors_ND = run_pieces(self, split(texts, chunk_bounds(texts.runs, None, batch_tokens)), tell)
        return vectors_ND.cpu()[texts.place_N]  # one copy, since each one waits for the device


def describe_execution(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """How the backbone runs, in words, for the run's summary."""
    if can_run_unpadded(config):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        facts = device.type, dtype, head_dim
        slow = why_slow(*facts)
        return f"without padding, {BACKENDS[attention_backend(*facts)]}" + (f" (slow on a GPU: {slow})" if slow else "")
    return f"padded ({config.model_type} is not one of the families that run without padding: {unpadded_families()})"


def read_pooling(folder: Path) -> tuple[str, bool] | None:
    """(pooling, whether to normalise) of a sentence-transformers folder; None where the folder is not one."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return None
    entries = json.loads(modules.read_text(encoding="utf-8"))
    types = [entry["type"].rsplit(".", 1)[-1] for entry in entries]
    unknown = sorted(set(types) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ValueError(
            f"{modules}: {', '.join(unknown)} layers are not supported; load this model with sentence-transformers"
        )
    pooling = "cls"
    for entry, kind in zip(entries, types, strict=True):
        if kind != "Pooling":
            continue
        settings = json.loads((folder / entry["path"] / "config.json").read_text(encoding="utf-8"))
        mode = settings.get("pooling_mode")
        if mode is None:
            mode = next((name for name, key in POOLING_FLAGS.items() if settings.get(key)), None)
        pooling = {"lasttoken": "last_token"}.get(mode, mode)
        if pooling not in POOLINGS:
            raise ValueError(f"{folder / entry['path'] / 'config.json'}: pooling {mode!r} is not one of {', '.join(POOLINGS)}")
    return pooling, "Normalize" in types
