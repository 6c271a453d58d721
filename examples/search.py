"""Searches a corpus with a trained model: the best passages of each query, with their scores.

    python examples/search.py quickstart/model "how do I parse json"

The corpus is `--corpus`, by default the docstrings that the quickstart held out (`data/test` beside the model's folder). Its
vectors are kept in the model's folder and computed again when the corpus or the model has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

from bge_ds import api
from bge_ds.data.beir import read_folder
from bge_ds.evaluation.retrieval import search


def texts_of(corpus: Path) -> list[str]:
    """The passages of a folder in BEIR's form, or the lines of a text file."""
    if corpus.is_dir():
        return list(read_folder(corpus).passages())
    return [line for line in corpus.read_text(encoding="utf-8").splitlines() if line.strip()]


def vectors_of(texts: list[str], embedder, model: Path) -> torch.Tensor:
    """texts x features, fp32: from the file that the same model wrote for the same texts, else computed."""
    weights = (model / "model.safetensors").stat()
    key = hashlib.blake2b("\0".join([str(weights.st_mtime_ns), embedder.describe(), *texts]).encode(), digest_size=8)
    file = model / "search" / f"{key.hexdigest()}.npy"
    if not file.is_file():
        print(f"encoding {len(texts)} passages (once)", file=sys.stderr)
        vectors = embedder(texts, "passage").float().cpu().numpy()
        file.parent.mkdir(exist_ok=True)
        np.save(file, vectors)
    return torch.from_numpy(np.load(file))


def main() -> None:
    parser = argparse.ArgumentParser(description="Searches a corpus with a trained model.")
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("query", nargs="+", help="one query, or several in quotes")
    parser.add_argument("--corpus", type=Path, help="folder in BEIR's form, or a text file with a passage a line")
    parser.add_argument("--top", type=int, default=5, help="passages shown for each query (5)")
    args = parser.parse_args()
    try:
        if not (args.model / "model.safetensors").is_file():
            raise ValueError(f"{args.model} holds no trained model; ./launch/quickstart.sh makes quickstart/model")
        texts = texts_of(args.corpus or args.model.parent / "data/test")
        if not texts:
            raise ValueError(f"{args.corpus} holds no passages")
        embedder = api.load(args.model)
        passages_PD = vectors_of(texts, embedder, args.model)
        queries_QD = embedder(args.query, "query").float().cpu()
        scores_QK, rows_QK = search(queries_QD, [passages_PD], args.top)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for query, scores, rows in zip(args.query, scores_QK.tolist(), rows_QK.tolist(), strict=True):
        print(f"\n{query}")
        for place, (score, row) in enumerate(zip(scores, rows, strict=True), 1):
            print(f"{place}. {score:.3f}  {textwrap.shorten(texts[row], 150, placeholder=' ...')}")


if __name__ == "__main__":
    main()
