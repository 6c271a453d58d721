"""`state.json` of a checkpoint: typed, and checked against its types and its checksum when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import xxhash

from bge_ds.checkpoint import filesystem

STATE = "state.json"
FORMAT = 2  # of state.json and resume/; 1 was DeepSpeed's own

Count = Annotated[int, msgspec.Meta(ge=0)]


class Best(TypedDict):
    """The best checkpoint so far."""

    step: Count
    metric: str
    value: float


class MeterEntry(TypedDict):
    """What one rank had added up since its last line of the log. sums: (total, number of values) by name."""

    steps: Count
    seconds: float
    sums: dict[str, tuple[float, float]]
    skipped: tuple[Count, Count]  # not finite: in a row, since the last line


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What a run needs to know of its checkpoint. The learned values themselves are in `resume/`."""

    format: int = FORMAT
    step: Count
    tokens_seen: Count  # by all ranks
    best: Best | None
    ranks: Annotated[int, msgspec.Meta(ge=1)]
    zero_stage: Count
    asked: dict[str, int]  # the batch's flags as the command gave them
    agreement: dict[str, Any]  # what a resumed run must share
    files: dict[str, tuple[Count, str]]  # path within the checkpoint -> bytes, xxh3_128
    meters: list[MeterEntry | None]  # of each rank


class Damaged(ValueError):
    """A state file that is not as it was written; the message names it, and the field where that is known."""


def write(folder: Path, state: State) -> None:
    content = json.loads(json.dumps(msgspec.to_builtins(state)))  # as it will be read
    filesystem.write_json(folder / STATE, content | {"checksum": _checksum(content)})


def read(folder: Path) -> State:
    """The state of a checkpoint. Raises Damaged, and ValueError for an undamaged one of another version."""
    file = folder / STATE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))  # msgspec's own reader refuses NaN, which meters may hold
    except OSError as error:
        raise Damaged(f"{file} cannot be read ({error})") from error
    except ValueError as error:
        raise Damaged(f"{file} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise Damaged(f"{file} holds no object")
    intact = content.get("checksum") == _checksum(content)
    version = content.get("format", 1)
    if version != FORMAT and (intact or not content.keys() & {"checksum", "format"}):  # format 1 had neither
        raise ValueError(
            f"{folder} was written by another version of bge_ds (format {version}, this one reads {FORMAT}); use "
            "that version, or start a new run from its model"
        )
    try:
        state = msgspec.convert(content, State)
    except msgspec.ValidationError as error:
        raise Damaged(f"{file}: {error}") from None
    if not intact:
        raise Damaged(f"{file} does not have its checksum")
    return state


def _checksum(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())
