"""RetroMAE and DupMAE: an encoder that must put a text into its vectors, because weak decoders rebuild it from them.

Shapes: T tokens of N texts in one row, D features, H heads, E features a head, M predicted tokens, V vocabulary.

Encoder (all objectives): masked language modelling on 30 % of the words; h is the last hidden state of a text's first token.
RetroMAE (arXiv 2205.12035): a decoder of one transformer layer. Its query at every position is h (plus the position); its
keys are h at position 0 and the embeddings of the unmasked text after it; each query sees its own random half of the
words and never itself. DupMAE (arXiv 2211.08769) adds that the other tokens' vectors must hold the text's words: the
largest vocabulary logit of each word over the text's tokens, as a distribution, against the set of its words.

All predict through the encoder's own vocabulary head, on the positions that are predicted and no others: full-size logits
never exist. The decoder's rows for the first and last token are not predicted by the objective, so they are not computed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from bge_ds.kernels import masks
from bge_ds.kernels.cpu.dropout import Dropout
from bge_ds.kernels.decoder_attention import decoder_attention
from bge_ds.kernels.packed import LengthRun, PackedTexts, spans
from bge_ds.kernels.segment_mean import segment_expand
from bge_ds.modeling.encoder import position_ids, run_backbone
from bge_ds.modeling.flops import attention_flops, backbone_flops, linear_flops
from bge_ds.modeling.vocabulary import Rotation, VocabularyHead, add_position, check_can_pretrain, embed, rotate, rotation

if TYPE_CHECKING:
    from bge_ds.data.collate import PretrainBatch

LOSSES = ("encoder", "decoder", "bow")
DECODER_FILES = ("decoder.safetensors", "decoder.json")
_SAMPLED_ROWS = 64


def _setting(config: PretrainedConfig, *names: str, default=None):
    """The first of the names that the config has: model types call the same thing differently."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)


class EnhancedDecoder(nn.Module):
    """One post-norm transformer layer whose residual goes to the query stream, of the encoder's own dimensions.

    kernels: of its attention, "auto", "torch" or "fused" (`kernels.decoder_attention`).
    """

    def __init__(self, config: PretrainedConfig, kernels: str = "auto"):
        super().__init__()
        width, inner = config.hidden_size, _setting(config, "intermediate_size", "hidden_dim")
        eps = _setting(config, "layer_norm_eps", "norm_eps", default=1e-12)
        self.heads, self.kernels = config.num_attention_heads, kernels
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.output_norm = nn.LayerNorm(width, eps=eps)
        self.activation = ACT2FN[_setting(config, "hidden_act", "hidden_activation", "activation")]
        self.dropout = Dropout(_setting(config, "hidden_dropout_prob", "mlp_dropout", "dropout", default=0.0))
        self.attention_dropout = _setting(config, "attention_probs_dropout_prob", "attention_dropout", default=0.0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_setting(config, "initializer_range", default=0.02))
                nn.init.zeros_(module.bias)

    def forward(
        self, query_MD, keys_TD, words_T, key_N, cu_seqlens, runs: list[LengthRun], share: float,
        turn_M: Rotation | None = None, turn_T: Rotation | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """States M x D of the M inner tokens (first and last of each text left out), in row order.

        query_MD: their query stream. keys_TD: h at each text's first token, embeddings after it. turn_M, turn_T: (cos,
        sin) of their positions, where those are rotations.
        """
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (self.query(query_MD), self.key(keys_TD), self.value(keys_TD)))
        seen_MHE = decoder_attention(
            rotate(q, turn_M), rotate(k, turn_T), v, words_T, key_N, cu_seqlens, runs, share=share,
            dropout=self.attention_dropout if self.training else 0.0, kernels=self.kernels,
        )  # fmt: skip
        x = self.attention_norm(query_MD + self.dropout(self.attention_out(seen_MHE.flatten(-2))))
        return self.output_norm(x + self.dropout(self.down(self.activation(self.up(x)))))


@dataclass
class RetroMAESettings:
    """encoder_share, decoder_share: probability of a word to be masked, to be hidden from a decoder row.

    objective: "retromae", "dupmae" (and the bag of words) or "mlm" (the encoder alone). decoder_query: "embeddings" sends h
    through the embedding module (type, position, norm, dropout), "raw" adds the position to it (paper). mask_id: of the
    tokenizer.
    """

    mask_id: int
    encoder_share: float = 0.3
    decoder_share: float = 0.5
    decoder_query: str = "embeddings"
    objective: str = "retromae"


@dataclass
class _Prepared:
    """What several parts of a forward pass need of a batch.

    inner_M: the row's inner tokens, rising. inner_N: how many each text has. positions_T: as the model counts them.
    """

    inner_M: torch.Tensor
    inner_N: torch.Tensor
    positions_T: torch.Tensor
    hidden_TD: torch.Tensor


class RetroMAE(nn.Module):
    """forward(batch) -> fp32 tensor of 5: sums of the losses of LOSSES, correct predictions of encoder and decoder.

    Sums, not means: the loop divides by the counts of the whole step, over ranks and accumulation. What the objective has
    not is 0.
    """

    def __init__(self, model: nn.Module, settings: RetroMAESettings, kernels: str = "auto"):
        super().__init__()
        check_can_pretrain(model.config)
        self.model, self.settings = model, settings
        if getattr(model.base_model, "pooler", None) is not None:
            model.base_model.pooler.requires_grad_(False)
        self.decoder = None if settings.objective == "mlm" else EnhancedDecoder(model.config, kernels)
        self.head = VocabularyHead(model)

    def flops(self, runs: list[LengthRun]) -> float:
        """Of forward and backward over texts, without what `flops_a_prediction` counts."""
        tokens, inner = sum(n * length for n, length in runs), sum(n * max(0, length - 2) for n, length in runs)
        total = backbone_flops(self.model.base_model, runs)
        if self.decoder is not None:
            of_keys = linear_flops(self.decoder.key, tokens) + linear_flops(self.decoder.value, tokens)
            both = linear_flops(self.decoder.key, inner) + linear_flops(self.decoder.value, inner)
            pairs = sum(n * max(0, length - 2) * length for n, length in runs)
            total += linear_flops(self.decoder, inner) - both + of_keys + attention_flops(self.model.config.hidden_size, pairs)
        return total + (self.flops_a_prediction * tokens if self.settings.objective == "dupmae" else 0.0)

    @cached_property
    def flops_a_prediction(self) -> float:
        """Of the vocabulary head, for each token that encoder or decoder predict."""
        return linear_flops(self.head.transform, 1) + linear_flops(self.model.get_output_embeddings(), 1)

    def hidden_share(self, batch: PretrainBatch) -> float:
        """The share of tokens hidden from a decoder row, by some rows of the batch's longest text: its own is one of them."""
        length = batch.texts.max_length
        words_NL = batch.words_T[-length:][None]
        last = max(2, min(length - 1, 1 + _SAMPLED_ROWS))
        visible = masks.decoder_visible(batch.keys_N[-1:], words_NL, self.settings.decoder_share, 1, last)
        return 1 - visible.float().mean().item()

    def _key_T(self, batch: PretrainBatch) -> torch.Tensor:
        return batch.keys_N.repeat_interleave(batch.texts.cu_seqlens.diff(), output_size=batch.texts.tokens)

    def forward(self, batch: PretrainBatch) -> torch.Tensor:
        texts, settings, masked_M = batch.texts, self.settings, batch.masked_M
        corrupted_M = masks.corrupt(
            texts.ids_T[masked_M], self._key_T(batch)[masked_M], texts.positions_T[masked_M],
            mask_id=settings.mask_id, vocab_size=self.model.config.vocab_size,
        )  # fmt: skip
        inputs_T = texts.ids_T.index_copy(0, masked_M, corrupted_M)
        hidden_TD = run_backbone(self.model.base_model, texts, inputs_T)
        encoder_loss, encoder_correct = self.head(hidden_TD.index_select(0, masked_M), texts.ids_T[masked_M])
        prepared = _Prepared(*_inner_tokens(texts), position_ids(self.model.config, texts), hidden_TD)
        nothing = torch.zeros((), device=hidden_TD.device)
        decoder_loss, decoder_correct = (nothing, nothing) if self.decoder is None else self._decode(batch, prepared)
        bow_loss = self._bag_of_words(batch, prepared) if settings.objective == "dupmae" else nothing
        losses = (encoder_loss, decoder_loss, bow_loss.float(), encoder_correct.float(), decoder_correct.float())
        return torch.stack(losses)

    def _decode(self, batch: PretrainBatch, prepared: _Prepared) -> tuple[torch.Tensor, torch.Tensor]:
        texts, model = batch.texts, self.model
        inner_M, positions_T = prepared.inner_M, prepared.positions_T
        first = texts.cu_seqlens[:-1].long()
        h_ND = prepared.hidden_TD[first]
        embedded_TD = embed(model, positions_T, ids_T=texts.ids_T)
        keys_TD = embedded_TD.index_copy(0, first, h_ND.to(embedded_TD.dtype))
        h_MD = segment_expand(h_ND, F.pad(prepared.inner_N.cumsum(0), (1, 0)), inner_M.numel())
        if self.settings.decoder_query == "raw":
            query_MD = add_position(model, h_MD, positions_T[inner_M])
        else:
            query_MD = embed(model, positions_T[inner_M], vectors_TD=h_MD)
        turn_T = rotation(model, keys_TD, positions_T)
        turn_M = None if turn_T is None else tuple(part[inner_M] for part in turn_T)
        states_MD = self.decoder(
            query_MD, keys_TD, batch.words_T, batch.keys_N, texts.cu_seqlens, texts.runs, self.settings.decoder_share, turn_M,
            turn_T,
        )  # fmt: skip
        return self.head(states_MD, texts.ids_T[inner_M])

    def _bag_of_words(self, batch: PretrainBatch, prepared: _Prepared) -> torch.Tensor:
        """Sum over texts: the mean, over a text's inner tokens, of -log softmax(maxima)[word], each word once.

        (As DupMAE's authors have it: the words of the set weigh 1 / tokens each, so their weights need not add up to 1.)
        """
        texts, inner_M, inner_N = batch.texts, prepared.inner_M, prepared.inner_N
        lengths_N = texts.cu_seqlens.diff()
        # A text of one token keeps it: it has no words to predict, and no maxima without a token.
        kept_N = (lengths_N - 1).clamp_min(1)
        runs = [LengthRun(n, max(1, length - 1)) for n, length in texts.runs]
        after_first = spans(texts.cu_seqlens[1:].long() - kept_N, kept_N, sum(n * length for n, length in runs))
        shorter = F.pad(kept_N.cumsum(0, dtype=torch.int32), (1, 0)), runs
        best_NV = self.head(prepared.hidden_TD.index_select(0, after_first), texts=shorter)
        text_M = torch.repeat_interleave(inner_N, output_size=inner_M.numel())
        held_NV = torch.zeros_like(best_NV, dtype=torch.bool)
        held_NV[text_M, texts.ids_T[inner_M]] = True
        log_share_N = held_NV.sum(-1) * best_NV.logsumexp(-1) - best_NV.masked_fill(~held_NV, 0.0).sum(-1)
        return (log_share_N / (lengths_N - 2).clamp_min(1)).sum()


def _inner_tokens(texts: PackedTexts) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 M, the row's tokens that are neither first nor last of their text; how many each of the N texts has)."""
    inner_N = (texts.cu_seqlens.diff() - 2).clamp_min(0)
    total = sum(n * max(0, length - 2) for n, length in texts.runs)
    return spans(texts.cu_seqlens[:-1].long() + 1, inner_N, total), inner_N


def save_decoder(decoder_state: dict[str, torch.Tensor], settings: RetroMAESettings, folder: Path) -> None:
    """The decoder's weights and settings, beside the encoder; with the objective mlm there is none."""
    if not decoder_state:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in decoder_state.items()}, folder / DECODER_FILES[0])
    (folder / DECODER_FILES[1]).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def load_decoder(decoder: EnhancedDecoder, folder: Path) -> None:
    """The weights saved beside an encoder; ValueError where they are another shape's."""
    path, wanted = folder / DECODER_FILES[0], {k: list(v.shape) for k, v in decoder.state_dict().items()}
    with safe_open(path, "pt") as file:
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{path} is no decoder of this encoder: {wrong[0]} is {found.get(wrong[0], 'missing')}, "
            f"{wanted.get(wrong[0], 'nothing')} is needed; move the file away to start with a new decoder"
        )
    decoder.load_state_dict(load_file(path))
