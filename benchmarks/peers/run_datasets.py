"""Hugging Face `datasets` on the jobs of own_data.py: `python run_datasets.py JSON`; prints one line of JSON.

`what`: `map` tokenises JSON lines in `num_proc` processes; `reads` takes random groups of 8 texts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

GROUP = 8


def tokenise(asked: dict) -> dict:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])

    def work(rows: dict) -> dict:
        return tokenizer(
            rows["text"], truncation=True, max_length=asked["max_seq_length"], return_attention_mask=False,
            return_token_type_ids=False,
        )  # fmt: skip

    began = time.perf_counter()
    lines = datasets.load_dataset("json", data_files=asked["lines"], split="train", cache_dir=asked["output"])
    made = lines.map(work, batched=True, num_proc=asked["num_proc"], remove_columns=["text"])
    return {"seconds": time.perf_counter() - began, "rows": len(made)}


def groups_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "lengths.npy")


def time_reads(asked: dict) -> dict:
    """A row is a group: a list of 8 lists of ids. `way`: as Python lists, as numpy arrays, or as the Arrow table beneath."""
    import datasets
    import pyarrow as pa

    ids, lengths = groups_of(Path(asked["texts"]))
    texts = pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32)), pa.array(ids))
    bounds = np.arange(0, len(lengths) + 1, GROUP).astype(np.int32)
    table = pa.table({"texts": pa.ListArray.from_arrays(pa.array(bounds), texts)})
    datasets.Dataset(table).save_to_disk(asked["output"])
    data = datasets.load_from_disk(asked["output"])
    chosen = np.random.default_rng(0).integers(0, len(data), asked["reads"]).tolist()
    view, texts_of = {
        "lists": (data, lambda groups: [np.array(text, ids.dtype) for group in groups for text in group]),
        "numpy": (data.with_format("numpy"), lambda groups: [text for group in groups for text in group]),
        "arrow": (data.with_format("arrow"), lambda column: [column.combine_chunks().flatten().flatten().to_numpy()]),
    }[asked["way"]]
    texts_of(view[chosen[: asked["batch"]]]["texts"])  # imports
    began, tokens = time.perf_counter(), 0
    for first in range(0, len(chosen), asked["batch"]):
        tokens += len(np.concatenate(texts_of(view[chosen[first : first + asked["batch"]]]["texts"])))
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    work = {"map": tokenise, "reads": time_reads}[asked["what"]]
    print(json.dumps(work(asked)), flush=True)
