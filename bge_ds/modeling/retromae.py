"""RetroMAE and DupMAE: pre-training that forces a text into its vectors, because weak decoders must rebuild it from them.

Shapes: T tokens of N texts in one row, D features, H heads, E features a head, M predicted tokens, V vocabulary.

Encoder (all objectives): masked language modelling on 30 % of the words; h is the last hidden state of a text's first token.
RetroMAE (arXiv:2205.12035): a decoder of one transformer layer. Its query at every position is h (plus the position). Its keys
are h at position 0 and the embeddings of the unmasked text after it. Each query sees its own random half of the words and never
itself. DupMAE (arXiv:2211.08769) adds a bag-of-words loss on the other tokens' vectors: each word's largest vocabulary logit
over the text's tokens, as a distribution, against the set of the text's words.

All losses go through the encoder's own vocabulary head, on predicted positions only: full-size logits never exist. The
objective does not predict the first and last token, so the decoder's rows for them are not computed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

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

LOSSES = ("encoder", "decoder", "bow")
DECODER_FILES = ("decoder.safetensors", "decoder.json")
OBJECTIVE_FILE = "pretraining.json"  # in the encoder's folder
_SAMPLED_ROWS = 64


class PretrainBatch(Protocol):
    """What RetroMAE reads of a batch (`data.collate.PretrainBatch`).

    words_T: int64, word number of each token in its text. keys_N: int64, the key that a text's masks are hashed from, in
    packed order. masked_M: int64, rising, the tokens of the row that the encoder must predict.
    """

    texts: PackedTexts
    words_T: torch.Tensor
    keys_N: torch.Tensor
    masked_M: torch.Tensor


def _setting(config: PretrainedConfig, *names: str, default=None):
    """The first of these names that the config has: model types name the same setting differently."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)


class EnhancedDecoder(nn.Module):
    """One post-norm transformer layer of the encoder's dimensions, with the residual on the query stream.

    kernels: "auto", "torch" or "fused", for its attention (`kernels.decoder_attention`).
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
        rotary_M: Rotation | None = None, rotary_T: Rotation | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """States M x D of the M inner tokens (all but the first and last of each text), in row order.

        query_MD: their query stream. keys_TD: h at each text's first token, embeddings after it. rotary_M, rotary_T: (cos,
        sin) of their positions, for rotary positions.
        """
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (self.query(query_MD), self.key(keys_TD), self.value(keys_TD)))
        seen_MHE = decoder_attention(
            rotate(q, rotary_M), rotate(k, rotary_T), v, words_T, key_N, cu_seqlens, runs, share=share,
            dropout=self.attention_dropout if self.training else 0.0, kernels=self.kernels,
        )  # fmt: skip
        x = self.attention_norm(query_MD + self.dropout(self.attention_out(seen_MHE.flatten(-2))))
        return self.output_norm(x + self.dropout(self.down(self.activation(self.up(x)))))


@dataclass
class RetroMAESettings:
    """encoder_share: probability that a word is masked. decoder_share: that it is hidden from a decoder row.

    objective: "retromae", "dupmae" (adds the bag-of-words loss) or "mlm" (the encoder alone). decoder_query: "embeddings" sends
    h through the embedding module (type, position, norm, dropout); "raw" adds the position only, as in the paper. mask_id: of
    the tokenizer.
    """

    mask_id: int
    encoder_share: float = 0.3
    decoder_share: float = 0.5
    decoder_query: str = "embeddings"
    objective: str = "retromae"


@dataclass
class _Encoded:
    """The encoder's output, shared by the decoders.

    inner_M: the row's inner tokens, rising. inner_N: their number in each text. positions_T: the model's position ids.
    """

    inner_M: torch.Tensor
    inner_N: torch.Tensor
    positions_T: torch.Tensor
    hidden_TD: torch.Tensor


class RetroMAE(nn.Module):
    """forward(batch) -> fp32 tensor of 5: sums of the losses of LOSSES, correct predictions of encoder and decoder.

    Sums, not means: the training loop divides by the counts of the whole step, over ranks and gradient accumulation. Losses
    that the objective does not use are 0.
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
        """Of forward and backward over texts, without the predictions of `flops_a_prediction`."""
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
        """Of the vocabulary head, for each token that encoder or decoder predicts."""
        return linear_flops(self.head.transform, 1) + linear_flops(self.model.get_output_embeddings(), 1)

    def hidden_share(self, batch: PretrainBatch) -> float:
        """Share of tokens hidden from a decoder row (its own included), sampled on rows of the batch's longest text."""
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
        encoded = _Encoded(*_inner_tokens(texts), position_ids(self.model.config, texts), hidden_TD)
        nothing = torch.zeros((), device=hidden_TD.device)
        decoder_loss, decoder_correct = (nothing, nothing) if self.decoder is None else self._decode(batch, encoded)
        bow_loss = self._bag_of_words(batch, encoded) if settings.objective == "dupmae" else nothing
        losses = (encoder_loss, decoder_loss, bow_loss.float(), encoder_correct.float(), decoder_correct.float())
        return torch.stack(losses)

    def _decode(self, batch: PretrainBatch, encoded: _Encoded) -> tuple[torch.Tensor, torch.Tensor]:
        texts, model = batch.texts, self.model
        inner_M, positions_T = encoded.inner_M, encoded.positions_T
        first = texts.cu_seqlens[:-1].long()
        h_ND = encoded.hidden_TD[first]
        embedded_TD = embed(model, positions_T, ids_T=texts.ids_T)
        keys_TD = embedded_TD.index_copy(0, first, h_ND.to(embedded_TD.dtype))
        h_MD = segment_expand(h_ND, F.pad(encoded.inner_N.cumsum(0), (1, 0)), inner_M.numel())
        if self.settings.decoder_query == "raw":
            query_MD = add_position(model, h_MD, positions_T[inner_M])
        else:
            query_MD = embed(model, positions_T[inner_M], vectors_TD=h_MD)
        rotary_T = rotation(model, keys_TD, positions_T)
        rotary_M = None if rotary_T is None else tuple(part[inner_M] for part in rotary_T)
        states_MD = self.decoder(
            query_MD, keys_TD, batch.words_T, batch.keys_N, texts.cu_seqlens, texts.runs, self.settings.decoder_share, rotary_M,
            rotary_T,
        )  # fmt: skip
        return self.head(states_MD, texts.ids_T[inner_M])

    def _bag_of_words(self, batch: PretrainBatch, encoded: _Encoded) -> torch.Tensor:
        """Sum over texts of sum_{w in words} -log softmax(maxima)[w] / inner tokens, each distinct word once.

        As in DupMAE's code, the weights of a text's words need not add up to 1: repeated words count once.
        """
        texts, inner_M, inner_N = batch.texts, encoded.inner_M, encoded.inner_N
        lengths_N = texts.cu_seqlens.diff()
        # A text of one token keeps it: it has no words to predict, but maxima need at least one token.
        kept_N = (lengths_N - 1).clamp_min(1)
        runs = [LengthRun(n, max(1, length - 1)) for n, length in texts.runs]
        after_first = spans(texts.cu_seqlens[1:].long() - kept_N, kept_N, sum(n * length for n, length in runs))
        shorter = F.pad(kept_N.cumsum(0, dtype=torch.int32), (1, 0)), runs
        best_NV = self.head(encoded.hidden_TD.index_select(0, after_first), texts=shorter)
        text_M = torch.repeat_interleave(inner_N, output_size=inner_M.numel())
        held_NV = torch.zeros_like(best_NV, dtype=torch.bool)
        held_NV[text_M, texts.ids_T[inner_M]] = True
        log_share_N = held_NV.sum(-1) * best_NV.logsumexp(-1) - best_NV.masked_fill(~held_NV, 0.0).sum(-1)
        return (log_share_N / (lengths_N - 2).clamp_min(1)).sum()


def _inner_tokens(texts: PackedTexts) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 M, the row's tokens that are neither first nor last of their text; int64 N, their number in each text)."""
    inner_N = (texts.cu_seqlens.diff() - 2).clamp_min(0)
    total = sum(n * max(0, length - 2) for n, length in texts.runs)
    return spans(texts.cu_seqlens[:-1].long() + 1, inner_N, total), inner_N


def save_objective(objective: str, folder: Path) -> None:
    """Note in an encoder's folder what it was pre-trained by; fine-tuning reads it to warn of another pooling."""
    (folder / OBJECTIVE_FILE).write_text(json.dumps({"objective": objective}) + "\n", encoding="utf-8")


def read_objective(folder: Path) -> str | None:
    """What an encoder's folder says that it was pre-trained by; None where it says nothing that can be read."""
    try:
        return json.loads((folder / OBJECTIVE_FILE).read_bytes()).get("objective")
    except (OSError, ValueError, AttributeError):
        return None


def save_decoder(decoder_state: dict[str, torch.Tensor], settings: RetroMAESettings, folder: Path) -> None:
    """Write the decoder's weights and settings beside the encoder; nothing for objective mlm, which has no decoder."""
    if not decoder_state:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in decoder_state.items()}, folder / DECODER_FILES[0])
    (folder / DECODER_FILES[1]).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def load_decoder(decoder: EnhancedDecoder, folder: Path) -> None:
    """Load the weights saved beside an encoder; ValueError where their shapes differ."""
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
