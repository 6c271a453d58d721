"""The work folder of a mining: shared by any number of ranks, which need not talk to each other, and found again after kills.

    job.json           what is mined, with which model; the files of the plan (`plan.py`) are whole where it is
    queries, passages  folders of vectors, as `bge_ds.encode` writes them
    mined-KEY          finished blocks of groups; the key is a hash of all that decides the output
    in-use             each rank that is at work holds a shared lock of it, which ends with the process

The plan is written by the rank that comes first, the output and its report by the one that finishes last, both under a lock
beside the folder. Then the last rank to leave removes the folder, unless it is to be kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import orjson
import xxhash

from bge_ds import __version__
from bge_ds.data.files import PARTIAL, write_whole
from bge_ds.encoding.manifest import JOB, Settings
from bge_ds.encoding.output import locked
from bge_ds.mining.plan import PASSAGES, QUERIES, Input, Plan
from bge_ds.mining.selection import REASONS, Rules

BLOCKS = 64  # wanted, so that the ranks' shares differ little
SMALLEST, LARGEST = 512, 16384  # groups of a block
INDEX = "faiss"
_IN_USE, _MINED = "in-use", "mined-"
_OURS = re.compile(rf"{JOB}|{_IN_USE}|{_MINED}\w+|{INDEX}.*|\.?({QUERIES}|{PASSAGES})\b.*|\w+\.npy|.*\{PARTIAL}")
_WRITER = f".{socket.gethostname()}-{os.getpid()}"


class Mined(NamedTuple):
    """A block of G groups. rows: G x N negatives, -1 behind the last. filled: G, how many are random. dropped: by REASONS."""

    rows: np.ndarray
    filled: np.ndarray
    dropped: np.ndarray


class Report(msgspec.Struct, frozen=True):
    """What became of a mining. job: its key. output_hash: xxh3_128 of the output. recall: of an approximate index."""

    job: str
    output_hash: str
    counts: dict[str, int]
    dropped: dict[str, int]
    recall: float | None = None


@dataclass(frozen=True)
class Task:
    """What is mined. search: what decides the ranking."""

    input: Input
    settings: dict[str, Settings]  # of encoding, by side
    rules: Rules
    search: dict[str, Any]

    def parts(self) -> dict[str, Any]:
        """All that decides the plan and the vectors."""
        found = self.input.identity()
        for side, settings in self.settings.items():
            found |= {f"{side} {name}": value for name, value in msgspec.to_builtins(settings).items() if name != "model"}
        return found

    def key(self, parts: dict[str, Any]) -> str:
        content = [parts, asdict(self.rules), self.search]
        return xxhash.xxh3_64_hexdigest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


class Work:
    """A mining as one rank sees it."""

    def __init__(self, folder: Path, output: Path, task: Task, *, keep: bool = False, overwrite: bool = False) -> None:
        self.folder, self.output, self.task, self.keep, self.overwrite = folder, output, task, keep, overwrite
        self.parts = task.parts()
        self.key = task.key(self.parts)
        self.mined = folder / f"{_MINED}{self.key}"
        self.report_path = output.with_name(f".{output.name}.report.json")

    @contextlib.contextmanager
    def joined(self) -> Iterator[Plan | None]:
        """While this rank is at work: the plan, written by whoever comes first; None where the output is there already.

        Raises ValueError for a bad line of the input, an output that is not to be replaced, and a folder that holds something
        else or the work of another job.
        """
        with contextlib.ExitStack() as stay:
            with locked(self.folder):
                made = None if self.report() else self._take_up()
                if made is not None:
                    self.mined.mkdir(exist_ok=True)
                    in_use = stay.enter_context(open(self.folder / _IN_USE, "a"))
                    fcntl.flock(in_use, fcntl.LOCK_SH)
            yield made
        with locked(self.folder):
            if self.report() and not self.keep and self._is_alone():
                shutil.rmtree(self.folder, ignore_errors=True)

    def report(self) -> Report | None:
        """That of an output which is as it was written, by just this job."""
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            report = msgspec.json.decode(self.report_path.read_bytes(), type=Report)
            if report.job == self.key and self.task.input.hash_of(self.output) == report.output_hash:
                return report
        return None

    def blocks(self) -> list[range]:
        """The groups of each block: by arithmetic on their number alone."""
        groups = self.counts["groups"]
        size = min(LARGEST, max(SMALLEST, -(-groups // BLOCKS)))
        return [range(first, min(first + size, groups)) for first in range(0, groups, size)]

    def is_finished(self, block: int) -> bool:
        return self._path(block).exists()

    def write(self, block: int, mined: Mined) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **mined._asdict())
        write_whole(self._path(block), buffer.getbuffer(), writer=_WRITER)

    def finish(self, recall: Callable[[], float | None]) -> Report | None:
        """Writes output and report where all blocks are finished. None: other ranks are at it still. recall: for the report."""
        with locked(self.folder):
            if (report := self.report()) is not None:
                return report
            blocks = self.blocks()
            if not all(map(self.is_finished, range(len(blocks)))):
                return None
            if self.task.parts() != self.parts:
                raise ValueError("--input or --candidate_pool was changed while it was mined: run the same command again")
            self._write_output(recall())
            return self.report()

    # ------------------------------------------------------------------------------------------------------- the parts

    def _take_up(self) -> Plan:
        self.task.input.check_output(self.output, self.overwrite)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, and the vectors go there: name another folder by --work")
        held = self._held()
        if held is None:
            if foreign := [path.name for path in _listed(self.folder) if not _OURS.fullmatch(path.name)]:
                raise ValueError(f"{self.folder} contains {foreign[0]}, which bge_ds.mine did not write: give another folder")
        elif held["parts"] != self.parts:
            names = {
                name for name in held["parts"].keys() | self.parts.keys() if held["parts"].get(name) != self.parts.get(name)
            }
            if not self.overwrite:
                raise ValueError(
                    f"{self.folder} holds the work of another job (other {', '.join(sorted(names))}): give --overwrite, which "
                    "removes it, or name another folder by --work"
                )
            if not self._is_alone():
                raise ValueError(f"another run is at work in {self.folder}: wait for its end, or name another folder by --work")
            held = None
        if held is None:
            held = {"bge_ds_version": __version__, "parts": self.parts, "counts": self._write_plan()}
            write_whole(self.folder / JOB, orjson.dumps(held, option=orjson.OPT_INDENT_2))
        self.counts: dict[str, int] = held["counts"]
        return Plan(self.folder)

    def _held(self) -> dict[str, Any] | None:
        """What the folder says of itself; what cannot be read is another job's."""
        if not (self.folder / JOB).is_file():
            return None
        with contextlib.suppress(orjson.JSONDecodeError):
            held = orjson.loads((self.folder / JOB).read_bytes())
            if isinstance(held, dict) and held.keys() >= {"parts", "counts"}:
                return held
        return {"parts": {}}

    def _write_plan(self) -> dict[str, int]:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            return self.task.input.write_plan(self.folder, self.task.settings["query"].prompt)
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def _is_alone(self) -> bool:
        """Whether no process is at work here. The caller holds the lock, so that none can begin."""
        with contextlib.suppress(FileNotFoundError), open(self.folder / _IN_USE, "r+") as in_use:
            try:
                fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _path(self, block: int) -> Path:
        return self.mined / f"{block:06d}.npz"

    def _read(self, block: int) -> Mined:
        try:
            with np.load(self._path(block)) as held:
                return Mined(**{name: held[name] for name in Mined._fields})
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ValueError(f"{self._path(block)} is damaged ({error}): remove it, and run the same command again") from None

    def _write_output(self, recall: float | None) -> None:
        counts = self.counts | dict.fromkeys(("short", "filled", "fewer"), 0)
        dropped_R = np.zeros(len(REASONS), np.int64)

        def negatives() -> Iterator[np.ndarray]:
            for block in range(len(self.blocks())):
                mined = self._read(block)
                found_G = (mined.rows >= 0).sum(axis=1)
                counts["short"] += int((found_G - mined.filled < self.task.rules.negative_number).sum())
                counts["fewer"] += int((found_G < self.task.rules.negative_number).sum())
                counts["filled"] += int(mined.filled.sum())
                dropped_R[...] += mined.dropped
                for rows_N in mined.rows:
                    yield rows_N[rows_N >= 0]

        with self.task.input.written(self.output, self.folder, negatives(), self.key, self.overwrite) as written:
            counts["neg_scores_dropped"] = written.lost
            dropped = {name: int(count) for name, count in zip(REASONS, dropped_R, strict=True)}
            # Before the output, which would be taken for another's without it.
            report = Report(self.key, written.hash, counts, dropped, recall)
            write_whole(self.report_path, msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
