"""The data side of bge_ds, measured part by part: `python benchmarks/own_data.py JSON`; prints one line of JSON.

`what` in the JSON text:
  lines    writes JSON lines of about `bytes`, the texts of a file over and over, each time with another number before it
  command  the preprocess command on one core, without the start of the interpreter
  bare     `tokenizers.encode_batch` on the same texts, on one core: what cannot be cut away
  link     a folder of shards that names one shard's file, linked, until it holds `bytes`
  open     opening a folder and reading its last row: seconds, and by how much the process grew
  export   the texts of groups as plain arrays, for the peers
  reads    random groups of 8 texts
  loader   batches without padding through the loader
  resume   the first batch of a run that goes on at a step
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import redirect_stdout
from itertools import count
from pathlib import Path

import numpy as np

from bge_ds import preprocess
from bge_ds.data import shards, writing

GROUP = 8


def write_lines(asked: dict) -> dict:
    from own_pretraining import different_texts

    texts = list(different_texts(Path(asked["source"])))
    size = 0
    with open(asked["target"], "w", encoding="utf-8") as out:
        for i in count():
            size += out.write(json.dumps({"text": f"{i} {texts[i % len(texts)]}"}) + "\n")
            if size >= asked["bytes"]:
                return {"lines": i + 1, "bytes": size}


# ------------------------------------------------------------------------------------------------ preprocessing


def time_command(asked: dict) -> dict:
    target = Path(asked["target"])
    shutil.rmtree(target, ignore_errors=True)
    argv = ["pretrain", "--input", asked["lines"], "--output", str(target), "--tokenizer", asked["model"], "--num_proc", "1"]
    began = time.perf_counter()
    with redirect_stdout(sys.stderr):
        failed = preprocess.main([*argv, "--max_seq_length", str(asked["max_seq_length"])], alone=True)
    seconds = time.perf_counter() - began
    if failed:
        raise SystemExit(f"preprocess ended with status {failed}")
    return {"seconds": seconds, "counts": shards.read_manifest(target)["counts"]}


def time_bare(asked: dict) -> dict:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(asked["model"]) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with open(asked["lines"], encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    began, tokens = time.perf_counter(), 0
    for first in range(0, len(texts), 1000):
        tokens += sum(map(len, tokenizer.encode_batch(texts[first : first + 1000])))
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


# ------------------------------------------------------------------------------------------------ opening


def link_shards(asked: dict) -> dict:
    """As if that much input had been preprocessed: every shard is whole, and its rows are read like any other's."""
    source, target = Path(asked["shards"]), Path(asked["target"])
    manifest = shards.read_manifest(source)
    entry, size = manifest["shards"][0], 0
    entries = []
    while size < asked["bytes"]:
        k = len(entries)
        entries.append(entry | {"file": f"texts-00000-{k:06d}.arrow", "source": 0, "segment": k})
        os.link(source / entry["file"], target / entries[-1]["file"])
        size += entry["bytes"]
    rows = entry["rows"] * len(entries)
    made = {key: value for key, value in manifest.items() if key not in ("schema_version", "fingerprint")}
    made |= {"shards": entries, "sources": [manifest["sources"][0] | {"rows": [0, rows]}]}
    writing.write_manifest(target, made | {"counts": manifest["counts"] | {"texts": rows}})
    return {"shards": len(entries), "bytes": size}


def time_open(asked: dict) -> dict:
    before = memory()
    began = time.perf_counter()
    data = shards.open_folder(asked["shards"])
    opened = time.perf_counter() - began
    tokens = len(data.ids(len(data) - 1))
    return {"seconds": opened, "with_a_row": time.perf_counter() - began, "grown": memory() - before, "tokens": tokens}


def memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


# ------------------------------------------------------------------------------------------------ reading


def full_groups(data: shards.FinetuneShards) -> list[int]:
    """The groups that have 8 texts: a positive and 7 negatives."""
    return [row for row in range(len(data)) if len(data.group(row).neg) >= GROUP - 1]


def passages_of(group: shards.Group) -> np.ndarray:
    return np.concatenate([group.pos[:1], group.neg[: GROUP - 1]])


def export(asked: dict) -> dict:
    data = shards.open_folder(asked["shards"])
    texts = [text for row in full_groups(data) for text in data.passages(passages_of(data.group(row)))]
    target = Path(asked["target"])
    np.save(target / "ids.npy", np.concatenate(texts))
    np.save(target / "lengths.npy", np.array([len(text) for text in texts]))
    return {"groups": len(texts) // GROUP}


def time_reads(asked: dict) -> dict:
    data = shards.open_folder(asked["shards"])
    rows = full_groups(data)
    chosen = np.array(rows)[np.random.default_rng(0).integers(0, len(rows), asked["reads"])].tolist()
    began, tokens = time.perf_counter(), 0
    for row in chosen:
        tokens += len(np.concatenate(data.passages(passages_of(data.group(row)))))
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


def time_loader(asked: dict) -> dict:
    from bge_ds.data import loader

    steps, warm = asked["steps"], asked["warm"]
    order, collate, options = plan(asked)
    found = iter(
        loader.steps(
            [Path(asked["shards"])], order, collate, first_step=0, end_step=steps + warm, accumulation=1, rank=0, world=1,
            workers=asked["workers"], pin_memory=False, **options,
        )
    )  # fmt: skip
    for _ in range(warm):
        next(found)
    began = time.perf_counter()
    tokens = sum(batch.texts.tokens for (batch,) in found)
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


def time_resume(asked: dict) -> dict:
    """The rows of the step, and the batch, of a process that has asked for no step before."""
    order, collate, options = plan(asked)
    data = shards.open_folder(asked["shards"])
    collate(data, *order.step_rows(0), **options)  # imports, and the map of a shard
    began = time.perf_counter()
    batch = collate(data, *order.step_rows(asked["step"]), **options)
    return {"seconds": time.perf_counter() - began, "tokens": batch.texts.tokens}


def plan(asked: dict):
    import torch

    from bge_ds.data import batches
    from bge_ds.data.order import Order

    torch.set_num_threads(1)
    data = shards.open_folder(asked["shards"])
    spans = tuple(tuple(source["rows"]) for source in data.manifest["sources"])
    order = Order(seed=42, spans=spans, global_batch=asked["batch"])
    if isinstance(data, shards.PretrainShards):
        return order, batches.collate_texts, {"seed": 42, "max_seq_length": data.manifest["max_seq_length"]}
    lengths = {name: data.manifest[name] for name in ("query_max_len", "passage_max_len")}
    return order, batches.collate_groups, {"seed": 42, "group_size": GROUP, **lengths}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    work = {
        "lines": write_lines, "command": time_command, "bare": time_bare, "link": link_shards, "open": time_open,
        "export": export, "reads": time_reads, "loader": time_loader, "resume": time_resume,
    }[asked["what"]]  # fmt: skip
    print(json.dumps(work(asked)), flush=True)
