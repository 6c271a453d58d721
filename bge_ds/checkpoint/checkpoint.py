"""Saving what a run needs to resume, restoring it, and swapping finished folders into place.

A checkpoint is `checkpoint-N/`: `resume/` (what the ranks have learned, `optimizer_files.py`), `state.json` (step, what a run
must share to resume, the size and hash of every file) and the model as it was then, ready to load. It is written as
`checkpoint-N.partial`, flushed to the disk, and renamed when whole. There is no random state in it: a step seeds its own
generators from (seed, step, rank), and the data's position is the step, so that a resumed run is the undisturbed one.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from bge_ds.checkpoint import filesystem, optimizer_files, state_file
from bge_ds.checkpoint.filesystem import PARTIAL
from bge_ds.checkpoint.state_file import STATE, Best, State
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.deepspeed_engine import optimizer_state
from bge_ds.distributed import collectives

_NAME = re.compile(r"checkpoint-(\d+)")
DAMAGED = ".damaged"
FROZEN = "frozen_weights"
_T = TypeVar("_T")
_DISK = re.compile(r"\[Errno \d+\]|os error \d+")  # the latter is what safetensors says


@dataclass
class ResumePoint:
    """The checkpoint that a run resumes from.

    state: its state.json. notes: what a person should know of how it was chosen. refitted: the batch was set anew.
    """

    path: Path
    state: State
    notes: list[str]
    refitted: bool = False


class Saved(NamedTuple):
    path: Path
    seconds: float
    size: int  # bytes of all files


def _all(output_dir: Path) -> list[tuple[int, Path]]:
    return sorted((int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)))


def _resumable(output_dir: Path) -> list[Path]:
    return [path for _, path in _all(output_dir) if (path / STATE).is_file()]


def newest(output_dir: Path) -> Path | None:
    """The last whole checkpoint of a run that can be resumed."""
    return next(reversed(_resumable(output_dir)), None)


def find(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: a path, or the newest for auto. None: start anew."""
    if not resume:
        return None
    if resume.lower() in ("auto", "true"):
        path = newest(output_dir)
        if path is None and resume.lower() == "true":
            raise ValueError(f"--resume_from_checkpoint {resume}: no checkpoint-N with a state.json in {output_dir}")
        return path
    path = Path(resume)
    if not (path / STATE).is_file():
        here = ", ".join(sorted(p.name for p in path.glob("checkpoint-*"))) if path.is_dir() else ""
        hint = f"; it holds {here}: name one of them" if here else ""
        raise ValueError(f"--resume_from_checkpoint {path}: no resumable checkpoint there (state.json is missing){hint}")
    return path


def select(resume: str | None, output_dir: Path) -> ResumePoint | None:
    """The checkpoint to resume from, the hashes of its files verified; on every rank, once the ranks have met.

    With auto, a damaged one is renamed to `checkpoint-N.damaged` and the one before is selected. Raises ValueError where a
    path that was given is damaged, or where no checkpoint is left.
    """
    if not resume:
        return None
    auto, notes = resume.lower() in ("auto", "true"), []

    def prepare() -> None:
        if auto and output_dir.is_dir():
            filesystem.lock(output_dir)
            filesystem.clean_up(output_dir)

    collectives.on_first_rank(prepare)
    while (path := collectives.on_first_rank(lambda: find(resume, output_dir))) is not None:
        state = collectives.on_first_rank(partial(_state_or_damage, path))
        wrong = state if isinstance(state, str) else _damage(path, state)
        if wrong is None:
            return ResumePoint(path, state, notes)
        if not auto:
            others = [p.name for p in _resumable(path.parent) if p.name != path.name]
            remain = f"resume from another one: {', '.join(others)}" if others else "no other one is beside it"
            raise ValueError(f"--resume_from_checkpoint {path} is damaged: {wrong}; {remain}")
        notes.append(f"warning: {path} is damaged and now {path.name}{DAMAGED}: {wrong}")
        collectives.on_first_rank(partial(filesystem.replace_folder, path, path.with_name(path.name + DAMAGED)))
    if notes:
        raise ValueError(
            f"--resume_from_checkpoint {resume}: no checkpoint in {output_dir} is whole ({'; '.join(notes)}); "
            "start a new run in another --output_dir"
        )
    return None


def _damage(path: Path, state: State) -> str | None:
    """What is wrong with the first damaged file of `resume/`, the same on all ranks, which share the reading."""
    files = sorted(name for name in state.files if name.startswith("resume/"))
    own = files[collectives.rank() :: collectives.world_size()]
    found = next(filter(None, (filesystem.damage(path / name, *state.files[name]) for name in own)), None)
    return next(filter(None, collectives.gather_object(found)), None)


def _state_or_damage(path: Path) -> State | str:
    """The state of a checkpoint, or what is wrong with its file. Raises ValueError for one of another version."""
    try:
        return state_file.read(path)
    except state_file.Damaged as error:
        return str(error)


def check_agreement(point: ResumePoint, expected: dict) -> None:
    """Refuse to resume with other settings. expected: what this run would write; differences are named.

    What a checkpoint does not hold was off there, as it must be here.
    """
    there = point.state.agreement
    if there.get(FROZEN) and expected.get(FROZEN) and there[FROZEN] != expected[FROZEN]:
        raise ValueError(
            f"{point.path} belongs to another run: the weights that are not trained differ, so --model_name_or_path is not the "
            "model that it began with; give that one, or start a new run in another --output_dir"
        )
    differing = [
        f"{key}: {there.get(key)!r} there, {value!r} now"
        for key, value in expected.items()
        if (there[key] != value if key in there else value)
    ]
    if differing:
        raise ValueError(
            f"{point.path} belongs to another run and would not continue exactly ({'; '.join(differing)}); "
            "give the same settings, or start a new run in another --output_dir"
        )


def save(
    engine, output_dir: Path, step: int, tokens_seen: int, agreement: dict, export: Callable[[Path], object],
    keep: int | None, only_model: bool, best: Best | None = None, asked: dict | None = None, meter: dict | None = None,
) -> Saved:  # fmt: skip
    """Write checkpoint-`step`, on every rank; then drop the oldest beyond `keep`, the best one excepted.

    best: step, metric and value of the best checkpoint so far, this one included; it also goes into best.json beside them.
    asked: of the batch's flags, what the command said. meter: what this rank's holds. tokens_seen: by this rank.
    export(folder) writes the model.

    Raises ValueError on every rank where the disk is full or not to be written to: the checkpoints before stay as they were.
    """
    began = time.perf_counter()
    world = collectives.world_size()
    final = output_dir / f"checkpoint-{step}"
    unfinished = final.with_name(final.name + PARTIAL)
    fragments = [] if only_model else optimizer_files.share(optimizer_state.fragments(engine), collectives.rank(), world)
    own = optimizer_files.entries(fragments)
    needed = sum(collectives.gather_object(optimizer_files.size_of(own))) + 4 * engines.count_elements(engine.module)
    tokens_seen = sum(collectives.gather_counts(tokens_seen, engine.device))
    meters = collectives.gather_object(meter)

    def prepare() -> None:
        free = shutil.disk_usage(output_dir).free
        if free < needed:
            raise OSError(f"only {free / 2**20:,.0f} MiB are free")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def write_resume() -> dict[str, tuple[int, str]]:
        if only_model:
            return {}
        (unfinished / "resume").mkdir(exist_ok=True)  # another host may not yet see what rank 0 made
        name = f"resume/{optimizer_files.file_name(collectives.rank(), world)}"
        return {name: optimizer_files.write(own, unfinished / name)}

    def finish() -> int:
        known = {name: entry for part in written for name, entry in part.items()}
        if not only_model:
            filesystem.write_json(unfinished / "resume" / optimizer_files.ENGINE, optimizer_state.describe(engine))
        files = filesystem.hashes(unfinished, known)
        if not only_model:
            state = State(
                step=step, tokens_seen=tokens_seen, best=best, ranks=world, zero_stage=engine.zero_optimization_stage(),
                asked=asked or {}, agreement=agreement, files=files, meters=meters,
            )  # fmt: skip
            state_file.write(unfinished, state)
        filesystem.sync(unfinished)
        filesystem.replace_folder(unfinished, final)
        filesystem.sync_one(output_dir)
        return sum(size for size, _ in files.values())

    def drop_others() -> None:
        if best is not None:
            filesystem.write_json(output_dir / "best.json", best)
        if keep:
            drop_oldest(output_dir, keep, None if best is None else best["step"], newest=step)

    explain = partial(_clear_and_explain, output_dir, unfinished, f"checkpoint-{step}", needed)
    _write(prepare, explain, first_only=True)
    _write(lambda: export(unfinished), explain)
    written = collectives.gather_object(_write(write_resume, explain))
    size = collectives.broadcast_object(_write(finish, explain, first_only=True))
    _write(drop_others, lambda failure: (
        f"{final} is written and whole, but best.json could not be brought up to date or older checkpoints not be removed "
        f"({failure}); make {output_dir} writable, then resume with --resume_from_checkpoint auto"
    ), first_only=True)  # fmt: skip
    return Saved(final, time.perf_counter() - began, size)


def write_aside(output_dir: Path, export: Callable[[Path], _T], place: Callable[[Path], None]) -> _T:
    """export(folder) writes a model into a temporary folder, on every rank; place(folder) moves it from there, on rank 0.

    Returns what `export` does. Raises ValueError on every rank where the disk is full or not to be written to.
    """
    aside = output_dir / ("model" + PARTIAL)

    def make() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    explain = partial(_clear_and_explain, output_dir, aside, "the model", None)
    _write(make, explain, first_only=True)
    result = _write(lambda: export(aside), explain)
    _write(lambda: place(aside), explain, first_only=True)
    return result


def _write(work: Callable[[], _T], explain: Callable[[str], str], first_only: bool = False) -> _T | None:
    """What `work` gives on this rank (first_only: on rank 0, elsewhere None).

    Raises ValueError(explain(failure)) on every rank where some rank could not write to the disk. Other errors are raised where
    they happen: a rank that ends is noticed by the others, one that waits for them is not.
    """
    result = failure = None
    try:
        result = None if first_only and collectives.rank() else work()
    except Exception as error:
        network = isinstance(error, (ConnectionError, TimeoutError))
        if network or not (isinstance(error, OSError) or _DISK.search(str(error))):
            raise
        failure = f"rank {collectives.rank()}: {error}"
    if failures := list(filter(None, collectives.gather_object(failure))):
        raise ValueError(explain(failures[0]))
    return result


def _clear_and_explain(output_dir: Path, unfinished: Path, what: str, needed: int | None, failure: str) -> str:
    """Remove the unfinished folder; a message for the user, on every rank. needed: bytes, where they are known."""

    def clear() -> tuple[int, Path | None]:
        shutil.rmtree(unfinished, ignore_errors=True)
        return shutil.disk_usage(output_dir).free, newest(output_dir)

    free, last = collectives.on_first_rank(clear)
    good = f"{last} is still good" if last else "there is no earlier checkpoint"
    need = f"it needs about {needed / 2**20:,.1f} MiB, and " if needed else ""
    return (
        f"{what} could not be written to {output_dir} ({failure}): {need}{free / 2**20:,.1f} MiB are free; {good}. Make room "
        "(--save_total_limit keeps fewer) or make the folder writable, then resume with --resume_from_checkpoint auto"
    )


def prepare_output(output_dir: Path, drop: bool) -> None:
    """Lock the output folder for this run and clean it up, on every rank; drop: remove another run's checkpoints and log."""

    def work() -> None:
        filesystem.lock(output_dir)
        filesystem.clean_up(output_dir)
        if drop:
            drop_oldest(output_dir, keep=0)
            for name in ("best.json", "metrics.jsonl"):
                (output_dir / name).unlink(missing_ok=True)

    collectives.on_first_rank(work)


def drop_oldest(output_dir: Path, keep: int, best_step: int | None = None, newest: int | None = None) -> None:
    """Remove all but `keep` checkpoints (0: all): the newest, and the best in place of the oldest of them. On rank 0.

    The newest stays beside the best even where `keep` is 1: it is the one to resume from. newest: its step, where a run that
    went on from an earlier checkpoint has later ones of before in its folder; those go first.
    """
    found = sorted(_all(output_dir), key=lambda entry: (newest is None or entry[0] <= newest, entry[0]))
    split = max(0, len(found) - keep)
    doomed_ones = found[:split]
    if any(step == best_step for step, _ in doomed_ones):
        doomed_ones = [entry for entry in found[: split + (keep > 1)] if entry[0] != best_step]
    for _, path in doomed_ones:
        # Renamed first: a kill in the middle of the removal must not leave a folder that looks whole.
        doomed = path.with_name(path.name + PARTIAL)
        path.rename(doomed)
        shutil.rmtree(doomed)


def read_best(path: Path) -> tuple[Best, Path] | None:
    """(the best checkpoint, its folder) as they were when the checkpoint `path` was written."""
    state = state_file.read(path)
    if state.best is None:
        return None
    return state.best, path if state.best["step"] == state.step else path.parent / f"checkpoint-{state.best['step']}"


def check_model(path: Path) -> None:
    """Raises ValueError where a file of a checkpoint's model is not as written. Without a state.json there are no hashes."""
    files = state_file.read(path).files if (path / STATE).is_file() else {}
    for name, entry in files.items():
        if not name.startswith("resume/") and (wrong := filesystem.damage(path / name, *entry)):
            others = ", ".join(p.name for p in _resumable(path.parent) if p.name != path.name) or "none"
            raise ValueError(f"the model of {path} is damaged: {wrong}; that of another checkpoint may be whole: {others}")


def copy_model(path: Path, folder: Path) -> None:
    """A checkpoint's model (checked when it was written) into an existing folder: all but what resuming needs. By rank 0."""
    if collectives.rank() == 0:
        shutil.copytree(path, folder, ignore=shutil.ignore_patterns("resume", STATE), dirs_exist_ok=True)
