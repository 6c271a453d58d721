"""Saving what a run needs to go on, resuming it, and swapping finished folders into place.

A checkpoint is `checkpoint-N/`: `resume/` (DeepSpeed's state of every rank), `state.json` (step, and what the run must
agree on to be resumed) and the model as it was then, ready to load. It is written as `checkpoint-N.partial` and renamed when
whole. There is no random state in it: a step seeds its own generators from (seed, step, rank), and the
data's position is the step, so that a resumed run is the undisturbed one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from bge_ds.distributed import collectives

_NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL = ".partial"
FROZEN = "frozen_weights"
_ONCE_UNWRITTEN = ("max_example_num_per_dataset",)  # older checkpoints say nothing of it, though it was in effect


def newest(output_dir: Path) -> Path | None:
    """The last whole checkpoint of a run that can be resumed."""
    found = [(int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    found = [(step, path) for step, path in found if (path / "state.json").is_file()]
    return max(found)[1] if found else None


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
    if not (path / "state.json").is_file():
        here = ", ".join(sorted(p.name for p in path.glob("checkpoint-*"))) if path.is_dir() else ""
        hint = f"; it holds {here}: name one of them" if here else ""
        raise ValueError(f"--resume_from_checkpoint {path}: no resumable checkpoint there (state.json is missing){hint}")
    return path


def read_state(path: Path, expected: dict) -> dict:
    """A checkpoint's `step` and `tokens_seen`. `expected`: what this run would write; a difference is refused by name.

    What an older version's checkpoint does not hold was off there, as it must be here.
    """
    file = path / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); resume from another checkpoint") from error
    differing = [
        f"{key}: {state['agreement'].get(key)!r} there, {value!r} now"
        for key, value in expected.items()
        if (state["agreement"][key] != value if key in state["agreement"] else value and key not in _ONCE_UNWRITTEN)
    ]
    if differing:
        raise ValueError(
            f"{path} belongs to another run and would not continue exactly ({'; '.join(differing)}); "
            "give the same settings, or start a new run in another --output_dir"
        )
    return {key: int(state[key]) for key in ("step", "tokens_seen")}


def restore(engine, path: Path, without_frozen: bool = False) -> None:
    """Load weights, optimizer, schedule and loss scale, on every rank. without_frozen: the weights that train only."""
    loaded, _ = engine.load_checkpoint(str(path), tag="resume", load_module_strict=not without_frozen)
    if loaded is None:
        raise ValueError(f"{path / 'resume'}: DeepSpeed found no state for this run; the checkpoint is incomplete")


def save(
    engine,
    output_dir: Path,
    step: int,
    tokens_seen: int,
    agreement: dict,
    export: Callable[[Path], None],
    keep: int | None,
    only_model: bool,
    best: dict | None = None,
) -> Path:
    """Write checkpoint-`step`, on every rank; then drop the oldest beyond `keep`, the best one excepted.

    best: step, metric and value of the best checkpoint so far, this one included; it also goes into best.json beside them.

    tokens_seen: by this rank. export(folder) writes the model. Where `agreement` holds FROZEN, the mark of the weights that
    do not train, `resume/` leaves those out: a run that resumes has just loaded them, and the mark says that they are the same.
    """
    final = output_dir / f"checkpoint-{step}"
    partial = final.with_name(final.name + PARTIAL)
    if collectives.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    collectives.barrier()
    export(partial)
    if not only_model:
        more = {"exclude_frozen_parameters": True} if FROZEN in agreement else {}
        engine.save_checkpoint(str(partial), tag="resume", save_latest=False, **more)
    tokens_seen = sum(collectives.gather_counts(tokens_seen, engine.device))
    if collectives.rank() == 0:
        if not only_model:
            state = {"step": step, "tokens_seen": tokens_seen, "best": best, "agreement": agreement}
            write_json(partial / "state.json", state)
        replace_folder(partial, final)
        if best is not None:
            write_json(output_dir / "best.json", best)
        if keep:
            drop_oldest(output_dir, keep, None if best is None else best["step"])
    collectives.barrier()
    return final


def drop_oldest(output_dir: Path, keep: int, best_step: int | None = None) -> None:
    """Remove all but `keep` checkpoints (0: all): the newest, and the best in place of the oldest of them. On rank 0.

    The newest stays beside the best even where `keep` is 1: it is the one to resume from.
    """
    found = sorted((int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)))
    split = max(0, len(found) - keep)
    doomed_ones = found[:split]
    if any(step == best_step for step, _ in doomed_ones):
        doomed_ones = [entry for entry in found[: split + (keep > 1)] if entry[0] != best_step]
    for _, path in doomed_ones:
        # Renamed first: a kill in the middle of the removal must not leave a folder that looks whole.
        doomed = path.with_name(path.name + PARTIAL)
        path.rename(doomed)
        shutil.rmtree(doomed)


def read_best(path: Path) -> tuple[dict, Path] | None:
    """(step, metric and value of the best checkpoint, its folder) as they were when the checkpoint `path` was written."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    best = state.get("best")
    if best is None:
        return None
    return best, path if best["step"] == state["step"] else path.parent / f"checkpoint-{best['step']}"


def copy_model(path: Path, folder: Path) -> None:
    """A checkpoint's model (checked when it was written) into an existing folder: all but what resuming needs."""
    for entry in sorted(path.iterdir()):
        if entry.name in ("resume", "state.json"):
            continue
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name)
        else:
            shutil.copy2(entry, folder / entry.name)


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all."""
    aside = path.with_name(path.name + PARTIAL)
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def replace_folder(new: Path, final: Path) -> None:
    """Put a finished folder in another's place."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def merge_folder(new: Path, final: Path, last: tuple[str, ...]) -> None:
    """Move a finished folder's files into another, those in `last` (what makes it loadable) removed first, added last."""
    for name in last:
        (final / name).unlink(missing_ok=True)
    entries = sorted(new.iterdir(), key=lambda p: (last.index(p.name) if p.name in last else -1, p.name))
    for entry in entries:
        target = final / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    new.rmdir()
