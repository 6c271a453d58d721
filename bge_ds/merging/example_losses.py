"""Weights from examples (LM-Cocktail, arXiv:2311.13534): the softmax of minus each model's loss over a temperature.

Shapes: B queries, G passages of the largest group, P passages, K positives of a query, D features.

The loss is the one of fine-tuning: InfoNCE of a query against the passages of all examples, its other positives left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from bge_ds.data.preprocess import input_files, validate
from bge_ds.evaluation.embedder import Embedder
from bge_ds.losses import contrastive

Group = dict[str, Any]  # a checked line: `query`, `pos`, `neg`


def read_groups(path: Path) -> list[Group]:
    """The groups of a file of JSON lines. Raises ValueError with file and line, or where a loss would say nothing."""
    if not path.is_file():
        raise ValueError(f"--examples {path}: no such file; give JSON lines with query, pos and neg, as for bge_ds.finetune")
    groups = []
    for place, line in input_files.read_lines(path):
        try:
            groups.append(validate.parse_line(line, "finetune"))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not groups:
        raise ValueError(f"--examples {path} holds no line; give a few groups")
    if len(groups) == 1 and not groups[0]["neg"]:
        raise ValueError(f"--examples {path}: one query without negatives has nothing to be compared with; give more groups")
    return groups


def loss_of(embedder: Embedder, groups: list[Group], temperature: float) -> float:
    """The mean contrastive loss of all groups in one batch. temperature: of the similarities of unit vectors."""
    q_BD = embedder([group["query"] for group in groups], "query")
    texts = [text for group in groups for text in (group["pos"][0], *group["neg"])]
    p_PD = embedder(texts, "passage")
    found = contrastive.Candidates(p_PD=p_PD, **_places(groups, texts, p_PD.device))
    normalize = embedder.settings.normalize
    settings = contrastive.ContrastiveSettings(normalize=normalize)
    with torch.no_grad():
        return float(contrastive.loss(q_BD, 1 / temperature if normalize else 1.0, found, settings).loss)


def _places(groups: list[Group], texts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
    """The fields of Candidates that do not depend on the model: groups' places, hashes, positives."""
    counts_B = np.array([1 + len(group["neg"]) for group in groups])
    own_BG = (np.cumsum(counts_B) - counts_B)[:, None] + np.arange(counts_B.max())
    own_BG[np.arange(counts_B.max()) >= counts_B[:, None]] = -1
    known = [[_hash(text) for text in group["pos"]] for group in groups]
    longest = max(map(len, known))
    known_BK = [row + row[-1:] * (longest - len(row)) for row in known]
    fields = {
        "hashes_P": torch.tensor([_hash(text) for text in texts]),
        "own_BG": torch.from_numpy(own_BG),
        "known_BK": torch.tensor(known_BK),
        "own_only_B": torch.zeros(len(groups), dtype=torch.bool),
    }
    return {name: field.to(device) for name, field in fields.items()}


def _hash(text: str) -> int:
    return int(np.uint64(xxhash.xxh3_64_intdigest(text.encode())).view(np.int64))


def weights_of(losses: list[float], temperature: float) -> list[float]:
    """The softmax of -loss / temperature, which sums to 1."""
    return torch.tensor(losses, dtype=torch.float64).div(-temperature).softmax(0).tolist()
