"""What pre-training needs to know of a model type: its embedding module, its position encoding, its vocabulary head.

Shapes: T tokens of texts in one row, M predicted positions, N texts, D features, V vocabulary.

A type is supported when one module embeds token ids or given vectors, and words are predicted by a transform and one (tied)
matrix. Positions are encoded in one of two ways. Most types add a position embedding. ModernBERT and NomicBERT rotate queries
and keys (RoPE, arXiv:2104.09864); for them the decoder rotates its own queries and keys by the encoder's angles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from bge_ds.kernels.linear_cross_entropy import linear_cross_entropy
from bge_ds.kernels.max_logits import max_logits
from bge_ds.kernels.packed import LengthRun

Rotation = tuple[torch.Tensor, torch.Tensor]


class _Transform(nn.Module):
    """Dense, activation, norm: the transform before the vocabulary matrix, for models without a module of their own for it."""

    def __init__(self, dense: nn.Module, norm: nn.Module, activation: str):
        super().__init__()
        self.dense, self.norm, self.activation = dense, norm, ACT2FN[activation]

    def forward(self, x):
        return self.norm(self.activation(self.dense(x)))


class PretrainFamily(NamedTuple):
    """transform: masked language model -> the module between last hidden states and the vocabulary matrix.

    rotation: (base model, states, positions) -> (cos, sin), for types without position embeddings.
    """

    transform: Callable[[nn.Module], nn.Module]
    rotation: Callable | None = None


_BERT = PretrainFamily(lambda model: model.cls.predictions.transform)
_ROBERTA = PretrainFamily(lambda model: _Transform(model.lm_head.dense, model.lm_head.layer_norm, "gelu"))
# A type may be added if test_retromae.py passes for it unchanged.
PRETRAIN_FAMILIES = {
    "bert": _BERT,
    "camembert": _ROBERTA,
    "distilbert": PretrainFamily(lambda m: _Transform(m.vocab_transform, m.vocab_layer_norm, m.config.activation)),
    "ernie": _BERT,
    "modernbert": PretrainFamily(lambda m: m.head, lambda base, x, positions: base.rotary_emb(x, positions, "full_attention")),
    "nomic_bert": _BERT._replace(rotation=lambda base, x, positions: base.rotary_emb(x, positions)),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
}


def check_can_pretrain(config: PretrainedConfig) -> None:
    if config.model_type not in PRETRAIN_FAMILIES:
        raise ValueError(
            f"pre-training does not know {config.model_type!r} models; it knows {', '.join(PRETRAIN_FAMILIES)}; "
            "fine-tuning takes any encoder"
        )


def embed(model: nn.Module, positions_T: torch.Tensor, *, ids_T=None, vectors_TD=None) -> torch.Tensor:
    """T x D from the model's own embedding module: word embedding or given vector, type, position, norm, dropout."""
    where = {} if PRETRAIN_FAMILIES[model.config.model_type].rotation else {"position_ids": positions_T[None]}
    what = {"input_ids": ids_T, "inputs_embeds": vectors_TD}
    return model.base_model.embeddings(**{k: v if v is None else v[None] for k, v in what.items()}, **where)[0]


def add_position(model: nn.Module, vectors_TD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """The vectors plus their position embeddings; unchanged where positions are rotations."""
    if PRETRAIN_FAMILIES[model.config.model_type].rotation:
        return vectors_TD
    return vectors_TD + model.base_model.embeddings.position_embeddings(positions_T)


def rotation(model: nn.Module, states_TD: torch.Tensor, positions_T: torch.Tensor) -> Rotation | None:
    """(cos, sin), T x E each, of the rotary embedding; None where positions are embedded."""
    of_family = PRETRAIN_FAMILIES[model.config.model_type].rotation
    if of_family is None:
        return None
    cos, sin = of_family(model.base_model, states_TD[None], positions_T[None])
    return cos[0], sin[0]


def rotate(x_THE: torch.Tensor, by: Rotation | None) -> torch.Tensor:
    """Rotary embedding: each pair (e, e + E/2) of a head's features is rotated by its token's angle."""
    if by is None:
        return x_THE
    cos, sin = (part[:, None] for part in by)
    left, right = x_THE.chunk(2, -1)
    return x_THE * cos + torch.cat([-right, left], -1) * sin


class VocabularyHead(nn.Module):
    """The encoder's own MLM head, as a loss. Shares the model's parameters.

    The (tied) output matrix is registered as a parameter of this module too: ZeRO-3 gathers a module's own parameters around
    its forward and backward, so the matrix is whole here.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.transform = PRETRAIN_FAMILIES[model.config.model_type].transform(model)
        output = model.get_output_embeddings()
        self.weight, self.bias = output.weight, output.bias

    def forward(
        self, hidden_MD: torch.Tensor, target_M: torch.Tensor | None = None,
        texts: tuple[torch.Tensor, list[LengthRun]] | None = None,
    ):  # fmt: skip
        """With targets: (sum of cross entropies, number of correct predictions) over the M positions.

        With texts (cu_seqlens, runs), which together are the M positions: N x V, each text's largest logit of every word.
        """
        states_MD = self.transform(hidden_MD)
        if texts is not None:
            return max_logits(states_MD, self.weight, self.bias, *texts)
        return linear_cross_entropy(states_MD, self.weight, target_M, self.bias)


def embed_new_tokens(model: nn.Module, tokens: int, seed: int) -> None:
    """Enlarge a model's embeddings to those of a tokenizer of so many tokens; nothing where they suffice.

    New rows are drawn feature by feature with the mean and deviation of the others, alike on every rank. Under ZeRO 3, to be
    called within `sharded_loading`: the enlarged weight is whole on each rank until the engine shards it.
    """
    known = model.config.vocab_size
    if tokens <= known:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    weight_VD = model.get_input_embeddings().weight
    with torch.no_grad():
        old_VD = weight_VD[:known].float()
        noise = torch.randn(tokens - known, old_VD.shape[1], generator=torch.Generator().manual_seed(seed))
        weight_VD[known:] = (old_VD.mean(0) + noise.to(old_VD.device) * old_VD.std(0)).to(weight_VD.dtype)
