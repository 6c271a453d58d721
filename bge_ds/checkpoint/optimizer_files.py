"""Masters and optimizer state in files that any ZeRO stage and any number of ranks reads back.

A folder has a file for each rank that wrote it, `rank-00000-of-00002.safetensors`, whose entries are `KEY:PARAMETER:START`: the
values of KEY ("master", "exp_avg" ...) for the elements of the flat parameter from START on, or, for a number such as "step",
a scalar. `engine.json` holds the parameters' shapes and what is one for all: counters, schedule, learning rates, loss scale.
Nothing in them is code: reading one executes nothing. Weights that do not train are not there.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from bge_ds.deepspeed_engine import optimizer_state
from bge_ds.deepspeed_engine.optimizer_state import Fragment

ENGINE = "engine.json"
MASTER = "master"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
           torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


def share(fragments: Iterable[Fragment], rank: int, world: int) -> list[Fragment]:
    """What a rank writes: its own fragments, and of the replicated ones its part of `world` equal parts."""
    fragments = list(fragments)
    total = sum(fragment.numel for fragment in fragments if fragment.replicated)
    first, end = total * rank // world, total * (rank + 1) // world
    kept, at = [], 0
    for fragment in fragments:
        if not fragment.replicated:
            kept.append(fragment)
            continue
        skip, stop = max(first - at, 0), min(end - at, fragment.numel)
        if skip < stop:
            kept.append(fragment._replace(start=fragment.start + skip, numel=stop - skip, offset=fragment.offset + skip))
        at += fragment.numel
    return kept


def entries(fragments: list[Fragment]) -> dict[str, torch.Tensor]:
    """What a rank writes: views of its tensors, and numbers as float64 scalars."""
    content = {}
    for fragment in fragments:
        name = fragment.name
        content[f"{MASTER}:{name}:{fragment.start}"] = fragment.view(fragment.master)
        for key, value in fragment.optimizer.state.get(fragment.master, {}).items():
            if torch.is_tensor(value) and value.shape == fragment.master.shape:
                entry = fragment.view(value)
            elif isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1):
                entry = torch.tensor(float(value), dtype=torch.float64)
            else:
                raise ValueError(f"the optimizer's {key!r} of {name} is neither a number nor as large as the parameter")
            content[f"{key}:{name}:{fragment.start}"] = entry
    return content


def size_of(content: dict[str, torch.Tensor]) -> int:
    """Bytes of the file of these entries."""
    return len(_header(content)) + sum(tensor.nbytes for tensor in content.values())


def file_name(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def write(content: dict[str, torch.Tensor], path: Path) -> tuple[int, str]:
    """Write a safetensors file; its bytes and their xxh3_128. One tensor at a time is copied, not the whole state."""
    digest, size = xxhash.xxh3_128(), 0
    tensors = (tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy() for tensor in content.values() if tensor.numel())
    with open(path, "wb") as file:
        for data in map(memoryview, itertools.chain([_header(content)], tensors)):
            file.write(data)
            digest.update(data)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _header(content: dict[str, torch.Tensor]) -> bytes:
    at, described = 0, {}
    for key, tensor in content.items():
        span = [at, at := at + tensor.nbytes]
        described[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return struct.pack("<Q", len(text)) + text


class _Span(NamedTuple):
    """Elements [start, end) of a flat parameter, in one entry of an open file."""

    start: int
    end: int
    file: int
    entry: str


class StateFiles:
    """The entries of a folder's rank files, found by parameter and key; of a tensor, only the elements asked for are read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.open = []
        self.spans: dict[str, dict[str, list[_Span]]] = defaultdict(lambda: defaultdict(list))
        self.numbers: dict[str, dict[str, float]] = defaultdict(dict)
        for path in sorted(folder.glob("rank-*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: damaged ({error}); resume from another checkpoint") from error
            self.open.append(file)
            for entry in file.keys():  # noqa: SIM118, it is no dictionary
                key, rest = entry.split(":", 1)
                name, start = rest.rsplit(":", 1)
                if shape := file.get_slice(entry).get_shape():
                    self.spans[name][key].append(_Span(int(start), int(start) + shape[0], len(self.open) - 1, entry))
                else:
                    # Parameters of one flat tensor are counted together; one that never had a gradient has no count.
                    self.numbers[name][key] = max(self.numbers[name].get(key, 0.0), file.get_tensor(entry).item())
        for keys in self.spans.values():
            for spans in keys.values():
                spans.sort()

    def read(self, key: str, name: str, start: int, target: torch.Tensor) -> None:
        """Elements [start, start + len(target)) of a parameter's `key` into the flat `target`."""
        at, end = start, start + target.numel()
        for span in self.spans[name][key]:
            if span.end <= at:
                continue
            if span.start > at or at >= end:
                break
            stop = min(span.end, end)
            values = self.open[span.file].get_slice(span.entry)[at - span.start : stop - span.start]
            target[at - start : stop - start].copy_(values)
            at = stop
        if at < end:
            raise ValueError(f"{self.folder}: no {key} of {name} from element {at} on; the checkpoint is incomplete")


def check(engine, folder: Path, described: dict) -> None:
    """Refuse a folder of another model or optimizer, by the first parameter that differs."""
    here, there = optimizer_state.trained_shapes(engine), described["parameters"]
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ValueError(
                f"{folder} is of another model: the trained parameter {name} has the shape "
                f"{there.get(name, 'of nothing')} there and {here.get(name, 'of nothing')} now; "
                "give the same model and the same choice of what trains, or start a new run in another --output_dir"
            )
    kinds = [described["optimizer"], type(optimizer_state.base_optimizer(engine.optimizer)).__name__]
    if len({"Adam" if "adam" in kind.lower() else kind for kind in kinds}) > 1:
        raise ValueError(f"{folder} was written with the optimizer {kinds[0]}, and this run has {kinds[1]}; take the same")
    if len(described["groups"]) != len(engine.optimizer.param_groups):
        raise ValueError(f"{folder}: other parameters decay there than now; give the same --weight_decay and model")


@torch.no_grad()
def load(engine, folder: Path) -> None:
    """Read a folder into a fresh engine of any stage and number of ranks. On every rank.

    Raises ValueError where the folder is of another model or lacks something.
    """
    described = json.loads((folder / ENGINE).read_text(encoding="utf-8"))
    check(engine, folder, described)
    files = StateFiles(folder)
    counts: dict[tuple[int, str], float] = {}
    with optimizer_state.overwriting(engine) as fragments:
        for fragment in fragments:
            for key in sorted({MASTER, *files.spans[fragment.name]}):
                tensor = fragment.master if key == MASTER else fragment.state_tensor(key)
                files.read(key, fragment.name, fragment.start, fragment.view(tensor))
            # One master may be of many parameters, some of which never had a gradient.
            for key, value in files.numbers[fragment.name].items():
                at = id(fragment.master), key
                counts[at] = max(value, counts.get(at, value))
                fragment.set_number(key, counts[at])
    optimizer_state.restore_described(engine, described)
