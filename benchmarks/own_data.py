"""The data side of bge_ds, measured part by part: `python benchmarks/own_data.py JSON`; prints one line of JSON.

`what` in the JSON text:
  lines    writes JSON lines of about `bytes`, the texts of a file over and over, each time with another number before it
  groups   writes groups of 8 passages until there are `bytes`, no text twice, holding one line at a time
  command  the preprocess command on one core, without the start of the interpreter
  bare     `tokenizers.encode_batch` on the same texts, on one core: what cannot be cut away
  link     a folder of shards that names one shard's file, linked, until it holds `bytes`
  open     opening a folder and reading its last row: seconds, by how much the process grew, shards mapped
  export   the texts of groups as plain arrays, for the peers
  reads    random groups of 8 texts
  loader   batches without padding through the loader
  resume   the first batch of a run that goes on at a step
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
from sides import different_texts, open_lines

from bge_ds import preprocess
from bge_ds.data.preprocess import validate
from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.shards import manifest_file, shard_reader

GROUP = 8


def write_lines(asked: dict) -> dict:
    texts = list(different_texts(Path(asked["source"])))
    size = 0
    with open(asked["target"], "w", encoding="utf-8") as out:
        for i in count():
            size += out.write(json.dumps({"text": f"{i} {texts[i % len(texts)]}"}) + "\n")
            if size >= asked["bytes"]:
                return {"lines": i + 1, "bytes": size}


def write_groups(asked: dict) -> dict:
    source, size, number, passes = Path(asked["source"]), 0, 0, 0
    with open(asked["target"], "w", encoding="utf-8") as out:
        while size < asked["bytes"]:
            if passes and not number:
                raise SystemExit(f"{source}: no group has {GROUP - 1} negatives")
            passes += 1
            with open_lines(source) as lines:
                for row in map(json.loads, lines):
                    if len(row["neg"]) < GROUP - 1:
                        continue
                    texts = [row["query"], row["pos"][0], *row["neg"][: GROUP - 1]]
                    query, pos, *neg = (f"{i} {text}" for i, text in enumerate(texts, number))
                    number += len(texts)
                    size += out.write(json.dumps({"query": query, "pos": [pos], "neg": neg}) + "\n")
                    if size >= asked["bytes"]:
                        break
    return {"texts": number, "bytes": size}


# ------------------------------------------------------------------------------------------------ preprocessing


def on_one_core() -> None:
    """Threads of Arrow or of the tokenizer must not count as speed of one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def time_command(asked: dict) -> dict:
    on_one_core()
    target = Path(asked["target"])
    shutil.rmtree(target, ignore_errors=True)
    argv = ["pretrain", "--input", asked["lines"], "--output", str(target), "--tokenizer", asked["model"], "--num_proc", "1"]
    validate.load_tokenizer(asked["model"])  # imports: the bare tokenizer's are not timed either
    began = time.perf_counter()
    with redirect_stdout(sys.stderr):
        failed = preprocess.main([*argv, "--max_seq_length", str(asked["max_seq_length"])], alone=True)
    seconds = time.perf_counter() - began
    if failed:
        raise SystemExit(f"preprocess ended with status {failed}")
    return {"seconds": seconds, "counts": manifest_file.read_manifest(target).counts}


def time_bare(asked: dict) -> dict:
    from tokenizers import Tokenizer

    on_one_core()
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
    manifest = manifest_file.read_manifest(source)
    entry, size = manifest.shards[0], 0
    entries = []
    while size < asked["bytes"]:
        k = len(entries)
        entries.append(msgspec.structs.replace(entry, file=f"texts-00000-{k:06d}.arrow", source=0, segment=k))
        os.link(source / entry.file, target / entries[-1].file)
        size += entry.bytes
    rows = entry.rows * len(entries)
    made = {key: value for key, value in msgspec.to_builtins(manifest).items() if key not in ("schema_version", "fingerprint")}
    made |= {"shards": entries, "sources": [msgspec.structs.replace(manifest.sources[0], rows=(0, rows))]}
    manifest_file.write_manifest(target, made | {"counts": manifest.counts | {"texts": rows}})
    return {"shards": len(entries), "bytes": size}


def time_open(asked: dict) -> dict:
    before = memory()
    began = time.perf_counter()
    data = shard_reader.open_folder(asked["shards"])
    opened = time.perf_counter() - began
    first = mapped_shards(data)
    began = time.perf_counter()
    tokens = len(data.ids(len(data) - 1))
    row = time.perf_counter() - began
    grown, mapped = memory() - before, [first, mapped_shards(data)]
    return {"seconds": opened, "with_a_row": opened + row, "grown": grown, "mapped": mapped, "tokens": tokens}


def mapped_shards(data: shard_reader.PretrainShards) -> int:
    """Shards of a folder of which a part is mapped into this process."""
    folder = re.escape(str(data.folders[0].resolve()))
    return len(set(re.findall(rf" ({folder}/.+\.arrow)$", Path("/proc/self/maps").read_text("utf-8"), re.MULTILINE)))


def memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


# ------------------------------------------------------------------------------------------------ reading


def full_groups(data: shard_reader.FinetuneShards) -> np.ndarray:
    """The groups that have 8 texts: a positive and 7 negatives."""
    return np.flatnonzero(data.passage_rows(np.arange(len(data)))[1].lengths >= GROUP - 1)


def export(asked: dict) -> dict:
    data = shard_reader.open_folder(asked["shards"])
    texts = texts_of(data, full_groups(data))
    target = Path(asked["target"])
    np.save(target / "ids.npy", texts.values)
    np.save(target / "lengths.npy", texts.lengths)
    return {"groups": len(texts.lengths) // GROUP}


def time_reads(asked: dict) -> dict:
    """As many groups at a time as a batch asks for."""
    data = shard_reader.open_folder(asked["shards"])
    rows = full_groups(data)
    chosen = rows[np.random.default_rng(0).integers(0, len(rows), asked["reads"])]
    texts_of(data, chosen[: asked["batch"]])  # the maps
    began, tokens = time.perf_counter(), 0
    for first in range(0, len(chosen), asked["batch"]):
        tokens += len(texts_of(data, chosen[first : first + asked["batch"]]).values)
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


def texts_of(data: shard_reader.FinetuneShards, rows: np.ndarray) -> RaggedArrays:
    """The first positive and 7 negatives of each group."""
    pos, neg = data.passage_rows(rows)
    passages = np.empty((len(rows), GROUP), np.int64)
    passages[:, 0] = pos.values[pos.starts]
    passages[:, 1:] = neg.values[neg.starts[:, None] + np.arange(GROUP - 1)]
    return data.passages(passages.ravel())


def time_loader(asked: dict) -> dict:
    from bge_ds.data import dataloader

    steps, warm = asked["steps"], asked["warm"]
    order, collate, options = plan(asked)
    found = iter(
        dataloader.steps(
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
    data = shard_reader.open_folder(asked["shards"])
    collate(data, *replace(order, seed=7).step_rows(0), **options)  # imports and maps; another line, which leaves none cached
    began = time.perf_counter()
    batch = collate(data, *order.step_rows(asked["step"]), **options)
    return {"seconds": time.perf_counter() - began, "tokens": batch.texts.tokens}


def plan(asked: dict):
    import torch

    from bge_ds.data import collate
    from bge_ds.data.sampling.sampler import EpochSampler

    torch.set_num_threads(1)
    data = shard_reader.open_folder(asked["shards"])
    spans = tuple(source.rows for source in data.manifest.sources)
    order = EpochSampler(seed=42, spans=spans, global_batch=asked["batch"])
    if isinstance(data, shard_reader.PretrainShards):
        options = {"seed": 42, "encoder_share": 0.3, "max_seq_length": data.manifest.max_seq_length}
        return order, collate.collate_texts, options
    lengths = {name: getattr(data.manifest, name) for name in ("query_max_len", "passage_max_len")}
    return order, collate.collate_groups, {"seed": 42, "group_size": GROUP, **lengths}


def work(asked: dict) -> dict:
    return {
        "lines": write_lines, "groups": write_groups, "command": time_command, "bare": time_bare, "link": link_shards,
        "open": time_open, "export": export, "reads": time_reads, "loader": time_loader, "resume": time_resume,
    }[asked["what"]](asked)  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))), flush=True)
