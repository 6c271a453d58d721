"""Texts to vectors: an unmodified Hugging Face backbone, run without padding, pooled and normalised.

Shapes: T tokens of N texts in one row, D features.

All texts of a batch lie in one row. Everything in a transformer but attention works token by token and needs no
change; attention is replaced through transformers' own interface by `kernels.attention.varlen_attention`, which keeps
each text to itself. Positions restart at each text. The weights and the saved files stay the stock model's.
A backbone whose family is not listed runs padded, and says so.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
)

from bge_ds.kernels.attention import BACKENDS, attention_backend, varlen_attention, why_slow
from bge_ds.kernels.cpu.dropout import use_fast_dropout
from bge_ds.kernels.packed import PackedTexts, chunk_bounds, pack, split
from bge_ds.kernels.segment_mean import segment_mean
from bge_ds.kernels.triton_support import at_least_fp32
from bge_ds.modeling.compilation import pad_to_bucket

logger = logging.getLogger(__name__)

ATTENTION = "bge_ds_varlen"
POOLINGS = ("cls", "mean", "last_token")


class Family(NamedTuple):
    """What the forward has to know of a model type; the defaults are those of a type it has not heard of.

    unpadded: its attention can be replaced through transformers' interface.
    positions_after_padding: positions count from the padding id + 1 (RoBERTa's habit), not from 0.
    decoder: a token sees only what precedes it, unless the config says `is_causal: false`.
    """

    unpadded: bool = False
    positions_after_padding: bool = False
    decoder: bool = False


# A type that test_encoder.py holds for as it is can be added; one that needs more than these three answers cannot.
FAMILIES = {
    **dict.fromkeys(
        ("bert", "distilbert", "electra", "ernie", "eurobert", "modernbert", "nomic_bert"),
        Family(unpadded=True),
    ),
    **dict.fromkeys(
        ("camembert", "roberta", "xlm-roberta", "xlm-roberta-xl"),
        Family(unpadded=True, positions_after_padding=True),
    ),
    **dict.fromkeys(
        ("granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"),
        Family(unpadded=True, decoder=True),
    ),
    "mpnet": Family(positions_after_padding=True),
}


@torch.compiler.disable  # texts end elsewhere at each step: compiled in, it would be compiled again at each
def _attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, is_causal=None, packed=None,
    **kwargs,
):  # fmt: skip
    """What transformers calls: q, k, v are 1 x heads x T x head_dim, the answer 1 x T x heads x head_dim."""
    if packed is None:
        raise ValueError(
            f"{type(module).__name__} was built for padding-free input ({ATTENTION!r}) and called without it; "
            'load the saved model with transformers, or call model.set_attn_implementation("sdpa") first'
        )
    made_causal = getattr(module, "is_causal", False)
    causal = (made_causal if is_causal is None else is_causal) and getattr(module.config, "is_causal", True)
    if sliding_window is not None and made_causal and not causal:
        # Run in both directions, transformers' own mask lets a decoder see as far as the window itself, not one less.
        sliding_window += 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attention(
        q, k, v, packed.cu_seqlens, packed.runs, scale=scaling, dropout=dropout, causal=causal, window=sliding_window
    )
    return out[None], None


# Without a mask function of its own: transformers then makes no mask at all, where it would first read back from the device
# whether the positions of a decoder restart.
AttentionInterface.register(ATTENTION, _attention)


def can_run_unpadded(config: PretrainedConfig) -> bool:
    return _family(config).unpadded


def unpadded_families() -> str:
    return ", ".join(sorted(name for name, family in FAMILIES.items() if family.unpadded))


def _family(config: PretrainedConfig) -> Family:
    return FAMILIES.get(config.model_type, Family())


def _attention_to_use(config: PretrainedConfig, wanted: str | None) -> str | None:
    """What transformers is asked for; None leaves the choice to it, as not every padded model has SDPA."""
    if can_run_unpadded(config):
        return wanted or ATTENTION
    return None if wanted == "sdpa" else wanted


def sees_only_before(config: PretrainedConfig) -> bool:
    """Whether a token sees only itself and what precedes it."""
    return _family(config).decoder and getattr(config, "is_causal", True)


def longest_text(config: PretrainedConfig) -> int:
    """Tokens the positions reach: those with an embedding, or, where positions are rotations, those the model was made for."""
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
    """ValueError where the tokenizer can give ids without an embedding in the model: on a GPU they would abort the process."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer knows {len(tokenizer)} tokens and {config.name_or_path or 'the model'} embeds {config.vocab_size}: "
            "they do not belong together; name the model's own tokenizer, or enlarge the model by transformers' "
            "resize_token_embeddings and save it"
        )


def load_config(name_or_path: str, **options) -> PretrainedConfig:
    """`AutoConfig.from_pretrained`, which asks nobody whether to run code of the model's own: it is not run."""
    return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **options)


def load_backbone(
    model_class, name_or_path: str, *, config: PretrainedConfig | None = None, attention: str | None = None,
    bidirectional: bool = False, **options,
):  # fmt: skip
    """`model_class.from_pretrained` in fp32 with the padding-free attention where the family has it.

    The config is copied: two models built from one config object would share its attention setting.
    bidirectional: let every token of a decoder see the whole text. It is written into the config, so that the saved model
    does so too, here and in transformers; False leaves the model as its config says.
    """
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
    # A head or pooler may be new; a hole in the encoder itself is a wrong folder, and training would hide it.
    inside = {k for k, _ in model.base_model.named_parameters()} - {"pooler.dense.weight", "pooler.dense.bias"}
    holes = [k for k in sorted(info["missing_keys"]) if k.removeprefix(model.base_model_prefix + ".") in inside]
    if holes or info["mismatched_keys"]:
        what = ", ".join(holes[:3]) or f"shapes of {sorted(info['mismatched_keys'])[:3]}"
        raise ValueError(f"{name_or_path} does not hold a whole {config.model_type} model: wrong or missing {what}")
    new = sorted({k.rsplit(".", 1)[0] for k in info["missing_keys"]})
    if new:
        logger.info("%s has no weights for %s: they start random", name_or_path, ", ".join(new))
    if attention == ATTENTION:
        use_fast_dropout(model)
    return model


def _restore_buffers(model: nn.Module) -> None:
    """Compute again, in fp32, what `from_pretrained` has computed in 16 bits: rotary frequencies, under ZeRO 3.

    DeepSpeed makes every number of 16 bits while it shards such a model, and transformers 5.17 leaves these so.
    """
    for module in model.modules():
        rounded = [name for name, x in module.named_buffers(recurse=False) if x.dtype in (torch.bfloat16, torch.float16)]
        for name in rounded:
            module._buffers[name] = torch.full_like(module._buffers[name], float("nan"), dtype=torch.float32)
        if rounded:  # transformers makes nothing anew that it has loaded
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
    """Asked of a model of a few numbers, because transformers says nowhere since when it does."""
    config = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.is_causal = False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = LlamaModel(config).eval()
        one, other = model(input_ids=torch.tensor([[1, 2], [1, 3]]), use_cache=False).last_hidden_state[:, 0]
    return not torch.equal(one, other)


@contextmanager
def _quiet_transformers():
    """Its loading report lists every head that a checkpoint has and a task has not; what matters is said by us."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def build_backbone(model_class, config: PretrainedConfig) -> nn.Module:
    """The same with random weights, from scratch."""
    attention = _attention_to_use(config, None)
    model = model_class.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)
    if attention == ATTENTION:
        use_fast_dropout(model)
    return model


def run_backbone(backbone: nn.Module, texts: PackedTexts, ids_T: torch.Tensor | None = None) -> torch.Tensor:
    """Last hidden states T x D of packed texts; `ids_T` replaces the texts' own ids (masked ones, say)."""
    ids_T = texts.ids_T if ids_T is None else ids_T
    config = backbone.config
    if config._attn_implementation != ATTENTION:
        return _run_padded(backbone, texts, ids_T)
    tokens, bucket = texts.tokens, getattr(backbone, "token_bucket", None)
    if bucket and backbone.training:
        texts, ids_T = pad_to_bucket(texts, ids_T, bucket)
    positions = position_ids(config, texts)[None]
    out = backbone(input_ids=ids_T[None], position_ids=positions, packed=texts, **_no_cache(backbone))
    return out.last_hidden_state[0, :tokens]


def _no_cache(backbone: nn.Module) -> dict[str, bool]:
    """Decoders would keep the keys and values of every layer for generating; not every encoder knows the argument."""
    return {"use_cache": False} if _knows_use_cache(type(backbone)) else {}


@cache
def _knows_use_cache(model_class: type) -> bool:
    return "use_cache" in inspect.signature(model_class.forward).parameters


def position_ids(config: PretrainedConfig, texts: PackedTexts) -> torch.Tensor:
    """What the model's position embedding is indexed with, int64 of T."""
    if _family(config).positions_after_padding:
        return texts.positions_T + config.pad_token_id + 1
    return texts.positions_T


def _run_padded(backbone: nn.Module, texts: PackedTexts, ids_T: torch.Tensor) -> torch.Tensor:
    lengths = texts.cu_seqlens.diff()
    text_T = torch.repeat_interleave(lengths, output_size=texts.tokens)
    shape = (texts.place_N.numel(), texts.max_length)
    padding = backbone.config.pad_token_id
    ids_NL = torch.full(shape, 0 if padding is None else padding, dtype=ids_T.dtype, device=ids_T.device)
    mask_NL = torch.zeros(shape, dtype=torch.int64, device=ids_T.device)
    ids_NL[text_T, texts.positions_T] = ids_T
    mask_NL[text_T, texts.positions_T] = 1
    out = backbone(input_ids=ids_NL, attention_mask=mask_NL, **_no_cache(backbone))
    return out.last_hidden_state[text_T, texts.positions_T]


def pool(hidden_TD: torch.Tensor, texts: PackedTexts, pooling: str) -> torch.Tensor:
    """One vector a text, N x D, in packed order; at least fp32, whatever the model computes in."""
    if pooling == "cls":
        return at_least_fp32(hidden_TD[texts.cu_seqlens[:-1].long()])
    if pooling == "last_token":
        return at_least_fp32(hidden_TD[texts.cu_seqlens[1:].long() - 1])
    return segment_mean(hidden_TD, texts.cu_seqlens, texts.runs)


class Encoder(nn.Module):
    """forward(texts) -> N x D fp32 vectors in the caller's order.

    backbone: a Hugging Face encoder or decoder. pooling: cls, mean or last_token. normalize: to unit length.
    """

    def __init__(self, backbone: nn.Module, pooling: str = "cls", normalize: bool = True):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
        if pooling == "cls" and sees_only_before(backbone.config):
            raise ValueError(
                f"pooling 'cls' of a causal {backbone.config.model_type}: the first token sees none of the text; use "
                "last_token or mean, or load it with bidirectional=True"
            )
        self.backbone, self.pooling, self.normalize = backbone, pooling, normalize
        # The pooler's output is never used: without this it would sit in the optimizer, decaying.
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler.requires_grad_(False)

    @classmethod
    def load(cls, name_or_path: str, pooling: str = "cls", normalize: bool = True, **options):
        """From a folder or hub name; options as for `load_backbone` (`attention="sdpa"`: the padded stock model)."""
        return cls(load_backbone(AutoModel, str(name_or_path), **options), pooling, normalize)

    def forward(self, texts: PackedTexts) -> torch.Tensor:
        vectors = pool(run_backbone(self.backbone, texts), texts, self.pooling)
        if self.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return vectors[texts.place_N]

    @torch.no_grad()  # not inference_mode: ZeRO-3 gathers weights in here that a later backward uses
    def encode_ids(self, ids: list, batch_tokens: int = 16384) -> torch.Tensor:
        """Vectors (len(ids) x D, fp32, on the CPU) of token id rows, at most batch_tokens tokens at a time."""
        training = self.training
        self.eval()
        device = next(self.parameters()).device
        texts, _ = pack(ids)
        pieces = split(texts, chunk_bounds(texts.runs, None, batch_tokens))
        vectors_ND = torch.cat([self(piece.to(device)) for piece in pieces])
        self.train(training)
        return vectors_ND.cpu()[texts.place_N]  # one copy: each would wait for the device


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def describe_execution(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """How the backbone runs, in words, for the summary."""
    if can_run_unpadded(config):
        facts = device.type, dtype, _head_dim(config)
        slow = why_slow(*facts)
        return f"without padding, {BACKENDS[attention_backend(*facts)]}" + (f" (slow on a GPU: {slow})" if slow else "")
    return f"padded ({config.model_type} is not one of the families that run without padding: {unpadded_families()})"


def read_pooling(folder: Path) -> tuple[str, bool] | None:
    """(pooling, normalise) of a sentence-transformers folder, or None where it has no such files."""
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
            names = {
                "pooling_mode_cls_token": "cls",
                "pooling_mode_mean_tokens": "mean",
                "pooling_mode_lasttoken": "last_token",
            }
            mode = next((name for key, name in names.items() if settings.get(key)), None)
        pooling = {"lasttoken": "last_token"}.get(mode, mode)
        if pooling not in POOLINGS:
            raise ValueError(f"{folder / entry['path'] / 'config.json'}: pooling {mode!r} is not one of {', '.join(POOLINGS)}")
    return pooling, "Normalize" in types
