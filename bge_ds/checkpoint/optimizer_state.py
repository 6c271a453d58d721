"""What a run has learned, in files that any ZeRO stage and any number of ranks reads back.

Every stage keeps the same things in other places: of each trained parameter an fp32 master copy, and of that copy what the
optimizer remembers (Adam's two moments, the number of its steps). A `Piece` says where a stretch of one parameter lies on
this rank; `pieces` finds them at each stage, and writing and reading know nothing else.

A folder has a file for each rank that wrote it, `rank-00000-of-00002.safetensors`, whose entries are `KEY:PARAMETER:START`: the
values of KEY ("master", "exp_avg" ...) for the elements of the flat parameter from START on, or, for a number such as "step",
a scalar. `engine.json` holds the parameters' shapes and what is one for all: counters, schedule, learning rates, loss scale.
Nothing in them is code: reading one executes nothing. Weights that do not train are not there.
"""

from __future__ import annotations

import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open

ENGINE = "engine.json"
MASTER = "master"
_COUNTERS = ("global_steps", "skipped_steps", "global_samples")
_GROUP = ("lr", "initial_lr", "betas", "momentum")  # what a schedule may change
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
           torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


class Piece(NamedTuple):
    """Elements [start, start + numel) of a flat trained parameter, as an optimizer of this rank keeps them.

    holder: the tensor that `optimizer` updates; the piece begins at its element `offset`. whole: every rank holds it all.
    """

    name: str
    start: int
    numel: int
    holder: torch.Tensor
    offset: int
    optimizer: torch.optim.Optimizer
    whole: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece of a tensor that is laid out as the holder is: a view, numel long."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    def part(self, first: int, end: int) -> Piece:
        return self._replace(start=self.start + first, numel=end - first, offset=self.offset + first)

    @property
    def remembered(self) -> dict:
        """What the optimizer remembers of the holder; empty before its first step."""
        return self.optimizer.state.get(self.holder, {})


def pieces(engine) -> Iterator[Piece]:
    """All that this rank's optimizer keeps, in the order of the parameters. Raises ValueError where it lies on a disk."""
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise ValueError(
            '--deepspeed offloads to NVMe, where checkpoints do not reach; offload to "cpu", or give --save_only_model'
        )
    inner, copies = innermost(optimizer), masters(optimizer)
    # ZeRO 1 and 2, and DeepSpeed's wrapper for 16-bit weights with fp32 gradients at stage 1.
    attributes = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    flats = next((getattr(optimizer, name) for name in attributes if hasattr(optimizer, name)), None)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            yield from _sharded(optimizer, inner, name, parameter)
        elif hasattr(parameter, "_hp_mapping"):
            if (mapping := parameter._hp_mapping) is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Piece(name, here.start, here.numel, flats[mapping.param_group_index], there.start, inner)
        else:
            holder, offset = copies.get(id(parameter), (parameter, 0))
            yield Piece(name, 0, parameter.numel(), holder, offset, inner, whole=True)


def _sharded(optimizer, inner, name: str, parameter) -> Iterator[Piece]:
    """ZeRO 3: equal shares, the last ones padded. Where a part of the states is offloaded, two optimizers have them."""
    group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = torch.distributed.get_rank(parameter.ds_process_group) * share
    numel = min(share, parameter.ds_numel - start)
    on_device = optimizer.offload_optimizer and optimizer.subgroup_to_device[group] != "cpu"
    if numel > 0:
        holder = optimizer.fp32_partitioned_groups_flat[group]
        yield Piece(name, start, numel, holder, offset, optimizer.backup_optimizer if on_device else inner)


def innermost(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def masters(optimizer) -> dict[int, tuple[torch.Tensor, int]]:
    """id of a 16-bit parameter -> (tensor that holds its fp32 master copy, where in it), at ZeRO 0.

    DeepSpeed's own accessor knows of none there.
    """
    found = {}
    if isinstance(wholes := getattr(optimizer, "fp32_groups", None), list):
        for halves, group in zip(optimizer.fp16_groups, wholes, strict=True):
            found |= {id(half): (whole, 0) for half, whole in zip(halves, group, strict=True)}
    elif isinstance(flats := getattr(optimizer, "fp32_groups_flat", None), list) and hasattr(optimizer, "fp16_groups"):
        for halves, flat in zip(optimizer.fp16_groups, flats, strict=True):
            offset = 0
            for half in halves:
                found[id(half)] = (flat, offset)
                offset += half.numel()
    return found


def share(found: Iterable[Piece], rank: int, world: int) -> list[Piece]:
    """The pieces that a rank writes: its own, and of what every rank holds the world-th part."""
    found = list(found)
    total = sum(piece.numel for piece in found if piece.whole)
    first, end = total * rank // world, total * (rank + 1) // world
    kept, at = [], 0
    for piece in found:
        if not piece.whole:
            kept.append(piece)
            continue
        begin, stop = max(first - at, 0), min(end - at, piece.numel)
        if begin < stop:
            kept.append(piece.part(begin, stop))
        at += piece.numel
    return kept


# ---------------------------------------------------------------------------------------------------------- writing


def entries(found: list[Piece]) -> dict[str, torch.Tensor]:
    """What a rank writes: views of its tensors, and numbers as float64 scalars."""
    content = {}
    for piece in found:
        content[f"{MASTER}:{piece.name}:{piece.start}"] = piece.of(piece.holder)
        for key, value in piece.remembered.items():
            if torch.is_tensor(value) and value.shape == piece.holder.shape:
                content[f"{key}:{piece.name}:{piece.start}"] = piece.of(value)
            elif isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1):
                content[f"{key}:{piece.name}:{piece.start}"] = torch.tensor(float(value), dtype=torch.float64)
            else:
                raise ValueError(f"the optimizer's {key!r} of {piece.name} is neither a number nor as large as the parameter")
    return content


def size_of(content: dict[str, torch.Tensor]) -> int:
    """Bytes of the file of these entries."""
    return len(_header(content)) + sum(tensor.nbytes for tensor in content.values())


def file_name(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def write(content: dict[str, torch.Tensor], path: Path) -> tuple[int, str]:
    """Write a safetensors file; its bytes and their xxh3_128. One tensor at a time is copied, not the whole state."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "wb") as file:
        for data in _bytes_of(content):
            file.write(data)
            digest.update(data)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _bytes_of(content: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield _header(content)
    for tensor in content.values():
        if tensor.numel():
            yield memoryview(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy())


def _header(content: dict[str, torch.Tensor]) -> bytes:
    at, described = 0, {}
    for key, tensor in content.items():
        span = [at, at := at + tensor.nbytes]
        described[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return struct.pack("<Q", len(text)) + text


def describe(engine) -> dict:
    """What is one for all ranks: plain numbers and lists."""
    scaler = _scaler(engine.optimizer)
    return {
        "optimizer": type(innermost(engine.optimizer)).__name__,
        "parameters": shapes(engine),
        "counters": {name: int(getattr(engine, name)) for name in _COUNTERS},
        "schedule": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
        "groups": [{key: group[key] for key in _GROUP if key in group} for group in engine.optimizer.param_groups],
        "scaler": {name: getattr(scaler, name) for name in _SCALER if getattr(scaler, name, None) is not None},
    }


def shapes(engine) -> dict[str, list[int]]:
    """The trained parameters, whole."""
    named = engine.module.named_parameters()
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in named if p.requires_grad}


def _scaler(optimizer):
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


# ---------------------------------------------------------------------------------------------------------- reading


class _Stretch(NamedTuple):
    start: int
    end: int
    file: int
    entry: str


class Files:
    """The entries of a folder's rank files, found by parameter and key; of a tensor, only the elements asked for are read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.open = []
        self.stretches: dict[str, dict[str, list[_Stretch]]] = defaultdict(dict)
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
                shape = file.get_slice(entry).get_shape()
                if shape:
                    stretch = _Stretch(int(start), int(start) + shape[0], len(self.open) - 1, entry)
                    self.stretches[name].setdefault(key, []).append(stretch)
                else:
                    # Parameters of one flat tensor are counted together; one that never had a gradient has no count.
                    known = self.numbers[name].get(key, 0.0)
                    self.numbers[name][key] = max(known, file.get_tensor(entry).item())
        for keys in self.stretches.values():
            for found in keys.values():
                found.sort()

    def read(self, key: str, name: str, start: int, target: torch.Tensor) -> None:
        """Elements [start, start + len(target)) of a parameter's `key` into the flat `target`."""
        at, end = start, start + target.numel()
        for stretch in self.stretches[name].get(key, ()):
            if stretch.end <= at:
                continue
            if stretch.start > at or at >= end:
                break
            stop = min(stretch.end, end)
            values = self.open[stretch.file].get_slice(stretch.entry)[at - stretch.start : stop - stretch.start]
            target[at - start : stop - start].copy_(values)
            at = stop
        if at < end:
            raise ValueError(f"{self.folder}: no {key} of {name} from element {at} on; the checkpoint is incomplete")


def check(engine, folder: Path, described: dict) -> None:
    """Refuse a folder of another model or optimizer, by the first parameter that differs."""
    here, there = shapes(engine), described["parameters"]
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ValueError(
                f"{folder} is of another model: the trained parameter {name} has the shape "
                f"{there.get(name, 'of nothing')} there and {here.get(name, 'of nothing')} now; "
                "give the same model and the same choice of what trains, or start a new run in another --output_dir"
            )
    kinds = [described["optimizer"], type(innermost(engine.optimizer)).__name__]
    if len({"Adam" if "adam" in kind.lower() else kind for kind in kinds}) > 1:
        raise ValueError(f"{folder} was written with the optimizer {kinds[0]}, and this run has {kinds[1]}; take the same")
    if len(described["groups"]) != len(engine.optimizer.param_groups):
        raise ValueError(f"{folder}: other parameters decay there than now; give the same --weight_decay and model")


@torch.no_grad()
def load(engine, folder: Path) -> None:
    """Read what `write` and `describe` wrote into a fresh engine of any stage and number of ranks. On every rank.

    Raises ValueError where the folder is of another model or lacks something.
    """
    described = json.loads((folder / ENGINE).read_text(encoding="utf-8"))
    check(engine, folder, described)
    files, found = Files(folder), list(pieces(engine))
    sharded = hasattr(engine.optimizer, "fp32_partitioned_groups_flat")
    if sharded:
        engine.optimizer.checkpoint_event_prologue()
    numbers: dict[int, tuple[Piece, dict[str, float]]] = {}
    for piece in found:
        for key in {MASTER, *files.stretches[piece.name]}:
            tensor = piece.holder if key == MASTER else _state_tensor(piece, key)
            files.read(key, piece.name, piece.start, piece.of(tensor))
        # One holder may have many parameters, of which some never had a gradient.
        _, counted = numbers.setdefault(id(piece.holder), (piece, {}))
        for key, value in files.numbers[piece.name].items():
            counted[key] = max(value, counted.get(key, value))
    for piece, counted in numbers.values():
        for key, value in counted.items():
            piece.optimizer.state[piece.holder][key] = _number(piece, value)
    _compute_from_masters(engine, found)
    if sharded:
        engine.optimizer.checkpoint_event_epilogue()
    for name, value in described["counters"].items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if engine.lr_scheduler is not None and described["schedule"] is not None:
        engine.lr_scheduler.load_state_dict(described["schedule"])
    for group, saved in zip(engine.optimizer.param_groups, described["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    scaler = _scaler(engine.optimizer)
    for name, value in described["scaler"].items():
        if getattr(scaler, name, None) is not None:
            setattr(scaler, name, value)


def _state_tensor(piece: Piece, key: str) -> torch.Tensor:
    """The optimizer's tensor `key` of a holder: made here, as its first step would make it, where there was none yet."""
    state = piece.optimizer.state[piece.holder]
    if key not in state:
        wide = getattr(piece.optimizer, "fp32_optimizer_states", False)  # DeepSpeed's CPUAdam
        state[key] = torch.zeros_like(piece.holder, dtype=torch.float32 if wide else None, requires_grad=False)
    return state[key]


def _number(piece: Piece, value: float) -> torch.Tensor | int:
    """A count in the type of this optimizer: torch's own keep it in a tensor, DeepSpeed's as an integer."""
    if not type(piece.optimizer).__module__.startswith("torch."):
        return int(value)
    on_device = any(piece.optimizer.defaults.get(name) for name in ("fused", "capturable"))
    return torch.tensor(value, dtype=torch.float32, device=piece.holder.device if on_device else "cpu")


def _compute_from_masters(engine, found: list[Piece]) -> None:
    """The weights that are computed with, from their fp32 masters."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            if master.numel():
                optimizer.fp16_partitioned_groups_flat[number].data.copy_(master.data)
            optimizer._unflatten_partitioned_parameters(number)
        # Small ones are kept whole on every rank: given up here, they are gathered again by the epilogue.
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    else:
        named = dict(engine.module.named_parameters())
        for piece in found:
            if piece.holder is not named[piece.name]:
                named[piece.name].data.view(-1).copy_(piece.of(piece.holder))
