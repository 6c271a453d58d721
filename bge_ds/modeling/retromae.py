"""RetroMAE (arXiv 2205.12035): an encoder that must put a text into one vector, because a weak decoder rebuilds from it.

Shapes: T tokens of N texts in one row, L tokens of a text, D features, M predicted tokens, V vocabulary.

Encoder: masked language modelling on 30 % of the words; h is the last hidden state of a text's first token.
Decoder: one transformer layer. Its query at every position is h (plus the position); its keys are h at position 0 and
the embeddings of the unmasked text after it; each query sees its own random half of the words and never itself.
Both predict through the encoder's own vocabulary head, on the positions that are predicted and no others, through
`linear_cross_entropy`: full-size logits never exist. The decoder's rows for the first and last token are not
predicted by the objective, so they are not computed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from bge_ds.data.batches import PretrainBatch
from bge_ds.kernels import masks
from bge_ds.kernels.decoder_attention import decoder_attention
from bge_ds.kernels.linear_cross_entropy import linear_cross_entropy
from bge_ds.modeling.encoder import position_ids, run_backbone

# How the states before the vocabulary's matrix are made, by family: the only part of a head that differs.
_HEAD_TRANSFORMS = {
    "bert": lambda model: model.cls.predictions.transform,
    "roberta": lambda model: _RobertaTransform(model.lm_head),
    "xlm-roberta": lambda model: _RobertaTransform(model.lm_head),
    "camembert": lambda model: _RobertaTransform(model.lm_head),
}
DECODER_FILES = ("decoder.safetensors", "decoder.json")


class _RobertaTransform(nn.Module):
    def __init__(self, head: nn.Module):
        super().__init__()
        self.dense, self.layer_norm = head.dense, head.layer_norm

    def forward(self, x):
        return self.layer_norm(F.gelu(self.dense(x)))


class VocabularyHead(nn.Module):
    """The encoder's own MLM head, as a loss. Holds the model's parameters, not copies.

    The (tied) output matrix is a parameter of this module too, so that ZeRO-3, which gathers each module's own
    parameters around its forward and backward, has it whole here.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.transform = _HEAD_TRANSFORMS[model.config.model_type](model)
        output = model.get_output_embeddings()
        self.weight, self.bias = output.weight, output.bias

    def forward(self, hidden_MD: torch.Tensor, target_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of cross entropies, correct predictions) over M positions."""
        return linear_cross_entropy(self.transform(hidden_MD), self.weight, target_M, self.bias)


class EnhancedDecoder(nn.Module):
    """One post-norm transformer layer whose residual goes to the query stream, of the encoder's own dimensions."""

    def __init__(self, config: PretrainedConfig, kernels: str = "auto"):
        super().__init__()
        width = config.hidden_size
        self.kernels = kernels  # of `decoder_attention`
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up, self.down = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)
        self.output_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_dropout = config.attention_probs_dropout_prob
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)

    def forward(self, query_MD, keys_TD, words_T, key_N, cu_seqlens, runs, share: float) -> torch.Tensor:
        """States M x D of the M inner tokens (first and last of each text left out), in row order.

        query_MD: their query stream. keys_TD: h at each text's first token, embeddings after it.
        """
        q, k, v = self.query(query_MD), self.key(keys_TD), self.value(keys_TD)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        dropout = self.attention_dropout if self.training else 0.0
        seen = decoder_attention(
            q, k, v, words_T, key_N, cu_seqlens, runs, share=share, dropout=dropout, kernels=self.kernels
        ).flatten(-2)
        x = self.attention_norm(query_MD + self.dropout(self.attention_out(seen)))
        return self.output_norm(x + self.dropout(self.down(self.activation(self.up(x)))))


@dataclass
class RetroMAESettings:
    """encoder_share, decoder_share: probability of a word to be masked, to be hidden from a decoder row.

    decoder_query: "embeddings" sends h through the embedding module (type, position, norm, dropout), "raw" adds the
    position to it (paper). mask_id, special_ids: of the tokenizer.
    """

    mask_id: int
    encoder_share: float = 0.3
    decoder_share: float = 0.5
    decoder_query: str = "embeddings"


class RetroMAE(nn.Module):
    """forward(batch) -> fp32 tensor of 4: sums of the encoder's and decoder's cross entropies, correct predictions.

    Sums, not means: the loop divides by the tokens of the whole step, over ranks and accumulation.
    """

    def __init__(self, model: nn.Module, settings: RetroMAESettings):
        super().__init__()
        check_family(model.config)
        self.model, self.settings = model, settings
        if getattr(model.base_model, "pooler", None) is not None:
            model.base_model.pooler.requires_grad_(False)
        self.decoder = EnhancedDecoder(model.config)
        self.head = VocabularyHead(model)

    def masked(self, batch: PretrainBatch) -> torch.Tensor:
        """bool T: the tokens the encoder must predict. Cheap: the loop counts them before any forward pass."""
        return masks.encoder_masked(self._key_T(batch), batch.words_T, self._inner(batch), self.settings.encoder_share)

    def _key_T(self, batch: PretrainBatch) -> torch.Tensor:
        return batch.keys_N.repeat_interleave(batch.texts.cu_seqlens.diff(), output_size=batch.texts.tokens)

    def _inner(self, batch: PretrainBatch) -> torch.Tensor:
        inner = torch.ones_like(batch.texts.ids_T, dtype=torch.bool)
        ends = batch.texts.cu_seqlens.long()
        inner[ends[:-1]] = False
        inner[ends[1:] - 1] = False
        return inner

    def forward(self, batch: PretrainBatch) -> torch.Tensor:
        texts, settings = batch.texts, self.settings
        embeddings = self.model.base_model.embeddings
        masked_T = self.masked(batch)
        inner_T = self._inner(batch)
        inputs_T = masks.corrupt(
            texts.ids_T, self._key_T(batch), texts.positions_T, masked_T,
            mask_id=settings.mask_id, vocab_size=self.model.config.vocab_size,
        )  # fmt: skip
        hidden_TD = run_backbone(self.model.base_model, texts, inputs_T)
        encoder_loss, encoder_correct = self.head(hidden_TD[masked_T], texts.ids_T[masked_T])

        first = texts.cu_seqlens[:-1].long()
        h_ND = hidden_TD[first]
        positions_T = position_ids(self.model.config, texts)
        embedded_TD = embeddings(input_ids=texts.ids_T[None], position_ids=positions_T[None])[0]
        keys_TD = embedded_TD.index_copy(0, first, h_ND.to(embedded_TD.dtype))
        h_TD = h_ND.repeat_interleave(texts.cu_seqlens.diff(), dim=0, output_size=texts.tokens)[inner_T]
        if settings.decoder_query == "raw":
            query_MD = h_TD + embeddings.position_embeddings(positions_T[inner_T])
        else:
            query_MD = embeddings(inputs_embeds=h_TD[None], position_ids=positions_T[inner_T][None])[0]
        states_MD = self.decoder(
            query_MD, keys_TD, batch.words_T, batch.keys_N, texts.cu_seqlens, texts.runs, settings.decoder_share
        )
        decoder_loss, decoder_correct = self.head(states_MD, texts.ids_T[inner_T])
        return torch.stack([encoder_loss, decoder_loss, encoder_correct.float(), decoder_correct.float()])


def check_family(config: PretrainedConfig) -> None:
    if config.model_type not in _HEAD_TRANSFORMS:
        raise ValueError(
            f"RetroMAE pre-training does not know {config.model_type!r} models; it knows {', '.join(_HEAD_TRANSFORMS)}"
        )


def save_decoder(decoder_state: dict[str, torch.Tensor], settings: RetroMAESettings, folder: Path) -> None:
    """The decoder's weights and settings, beside the encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in decoder_state.items()}, folder / DECODER_FILES[0])
    (folder / DECODER_FILES[1]).write_text(json.dumps(vars(settings), indent=2) + "\n", encoding="utf-8")


def load_decoder(decoder: EnhancedDecoder, folder: Path) -> None:
    decoder.load_state_dict(load_file(folder / DECODER_FILES[0]))
