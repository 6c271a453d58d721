"""An encoder as an ONNX graph that takes padded batches, with pooling and normalisation; and its check in onnxruntime.

Shapes: N texts, L tokens of the longest with padding, D features.

The exporter is torch's own (`torch.onnx.export`, over `torch.export`): it serves every torch and transformers that this package
does. optimum-onnx 0.1 stops at transformers 4.57, and transformers' exporters come with its newest versions only.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from bge_ds.modeling.encoder import ATTENTION, Encoder, no_cache

FILE, WEIGHTS = "model.onnx", "model.onnx.data"
OUTPUTS = ("last_hidden_state", "sentence_embedding")
TOLERANCE = 1e-4  # of a feature, relative to the vector's length
_ONE_FILE = (2 << 30) - (64 << 20)  # bytes of weights that fit into one protobuf file, beside the graph


class PaddedEncoder(nn.Module):
    """forward(input_ids, attention_mask[, token_type_ids]), int64 N x L -> (N x L x D, N x D), fp32: `OUTPUTS`.

    A text's first and last token are found by the mask, so that padding may stand on either side.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        if encoder.backbone.config._attn_implementation == ATTENTION:  # which has no padding
            encoder.backbone.set_attn_implementation("sdpa")
        self.backbone, self.pooling, self.normalize = encoder.backbone, encoder.pooling, encoder.normalize

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        options = no_cache(self.backbone) | ({} if token_type_ids is None else {"token_type_ids": token_type_ids})
        hidden_NLD = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        vectors_ND = pool_padded(hidden_NLD, attention_mask, self.pooling)
        return hidden_NLD, F.normalize(vectors_ND, dim=-1) if self.normalize else vectors_ND


def pool_padded(hidden_NLD: torch.Tensor, mask_NL: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a text, N x D. pooling: as for `Encoder`."""
    if pooling == "mean":
        mask_NL1 = mask_NL[..., None]
        # Not a product: what a decoder computes for padding before a text may be NaN.
        return hidden_NLD.masked_fill(mask_NL1 == 0, 0).sum(1) / mask_NL1.sum(1)
    places_L = torch.arange(mask_NL.shape[1], device=mask_NL.device)
    taken_N = (mask_NL * (places_L + 1)).argmax(1) if pooling == "last_token" else mask_NL.argmax(1)
    return hidden_NLD.gather(1, taken_N[:, None, None].expand(-1, 1, hidden_NLD.shape[2])).squeeze(1)


def input_names(backbone: nn.Module, of_tokenizer: list[str]) -> list[str]:
    """What the graph takes: all that the tokenizer gives and the model knows, so that it can be passed on as it is."""
    known = inspect.signature(backbone.forward).parameters
    return [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in known and name in of_tokenizer]


def write(model: PaddedEncoder, names: list[str], folder: Path) -> None:
    """Writes FILE, and WEIGHTS beside it where the weights exceed 2 GiB, into an existing folder.

    names: of `input_names`. Raises ValueError where torch cannot export the model.
    """
    example = {name: torch.zeros(2, 8, dtype=torch.int64) for name in names}
    example["input_ids"] += torch.arange(8)
    example["attention_mask"][0] = example["attention_mask"][1, :5] = 1
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    try:
        with _quietly():
            torch.onnx.export(
                model.eval(), (), folder / FILE, kwargs=example, input_names=names, output_names=list(OUTPUTS), dynamo=True,
                dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in names}, external_data=weights > _ONE_FILE,
                verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        kind = model.backbone.config.model_type
        raise ValueError(f"torch {torch.__version__} cannot export a {kind}: {str(error).strip().splitlines()[0]}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's remarks on packages that are missing and axes that share a name: the check decides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def check(path: Path, model: PaddedEncoder, names: list[str], ids: list[list[int]], wanted_ND: torch.Tensor) -> float:
    """Runs the file in onnxruntime; the largest difference of a feature from the model's, relative to the vector's length.

    ids, wanted_ND: texts of different lengths and the vectors that bge_ds gives them. All of them padded on the right, and each
    alone, are compared with these; padded on the left, with the stock model, for which a position may differ there.
    Raises ValueError where the difference exceeds TOLERANCE.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    padding = model.backbone.config.pad_token_id or 0
    batches = [(padded(names, ids, padding), wanted_ND)]
    batches += [(padded(names, [text], padding), vector_D[None]) for text, vector_D in zip(ids, wanted_ND, strict=True)]
    left = padded(names, ids, padding, left=True)
    with torch.no_grad():
        batches.append((left, model(**{name: torch.from_numpy(array) for name, array in left.items()})[1]))
    differences = []
    for inputs, expected_ND in batches:
        found_ND = torch.from_numpy(session.run([OUTPUTS[1]], inputs)[0])
        scale_N1 = expected_ND.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        differences.append(((found_ND - expected_ND).abs() / scale_N1).max())
    difference = torch.stack(differences).max().item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} does not give the model's vectors: they differ by {difference:.2e} "
            f"({TOLERANCE:g} is allowed), so nothing was written; please report this with the versions of torch "
            f"({torch.__version__}), transformers ({transformers.__version__}) and onnxscript"
        )
    return difference


def padded(names: list[str], ids: list[list[int]], padding: int, left: bool = False) -> dict[str, np.ndarray]:
    """A batch as the graph takes it: int64 N x L by name, padded on the right, or on the left."""
    inputs = {name: np.zeros((len(ids), max(map(len, ids))), np.int64) for name in names}
    inputs["input_ids"] += padding
    for row, text in enumerate(ids):
        places = slice(-len(text), None) if left else slice(len(text))
        inputs["input_ids"][row, places], inputs["attention_mask"][row, places] = text, 1
    return inputs
