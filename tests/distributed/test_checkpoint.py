"""Finding, naming, checking and swapping checkpoints; nothing half-written or damaged looks whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch

from bge_ds.checkpoint import checkpoint, filesystem, optimizer_files
from bge_ds.deepspeed_engine import optimizer_state


class Engine:
    """As much of an engine as a checkpoint asks for, around a model that took one step."""

    device, lr_scheduler, global_steps, global_samples, skipped_steps = torch.device("cpu"), None, 1, 4, 0

    def __init__(self, width: int = 3):
        self.module = torch.nn.Linear(width, 2)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.module(torch.ones(1, width)).sum().backward()
        self.optimizer.step()

    def zero_optimization_stage(self) -> int:
        return 0

    def gradient_accumulation_steps(self) -> int:
        return 1


def write_model(folder: Path) -> None:
    (folder / "model").write_text("weights")


def save(folder, step, engine=None, export=write_model, keep=None, only_model=False, **agreement) -> checkpoint.Saved:
    folder.mkdir(exist_ok=True)
    return checkpoint.save(engine or Engine(), folder, step, 7, agreement, export, keep=keep, only_model=only_model)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def no_lock_outlives_its_test():
    yield
    for file in filesystem._locked.values():
        file.close()
    filesystem._locked.clear()


def make(folder, step, whole=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if whole:
        (path / "state.json").write_text("{}")
    return path


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    """By number, not by name or time; models without resume state and half-written folders are passed over."""
    make(tmp_path, 900)
    newest = make(tmp_path, 1000)
    make(tmp_path, 2000, whole=False)
    (tmp_path / "checkpoint-3000.partial").mkdir()
    assert checkpoint.find("auto", tmp_path) == newest
    assert checkpoint.find(None, tmp_path) is None
    assert checkpoint.find("auto", tmp_path / "nowhere") is None


def test_a_wrong_path_is_an_error_with_the_right_ones(tmp_path):
    """Naming the run's folder instead of a checkpoint tells which checkpoints it holds."""
    make(tmp_path, 5)
    with pytest.raises(ValueError, match=r"state.json is missing\); it holds checkpoint-5: name one"):
        checkpoint.find(str(tmp_path), tmp_path)


def test_another_runs_checkpoint_is_refused_by_name(tmp_path):
    """Other data, another batch: what differs is named, with both values; what was not there was off."""
    point = checkpoint.select(str(save(tmp_path, 5, global_micro_batch=2, data_fingerprint="a").path), tmp_path)
    assert (point.state.step, point.state.tokens_seen) == (5, 7)
    checkpoint.check_agreement(point, {"global_micro_batch": 2, "data_fingerprint": "a", "of_later": False})
    with pytest.raises(ValueError, match="global_micro_batch: 2 there, 3 now; of_later: None there, 1 now"):
        checkpoint.check_agreement(point, {"global_micro_batch": 3, "data_fingerprint": "a", "of_later": 1})


def test_save_keeps_the_last_n(tmp_path):
    """save_total_limit keeps the newest and leaves nothing of the others."""
    for step in (1, 2, 10):
        saved = save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2"]
    content = json.loads((saved.path / "state.json").read_text())
    assert content["step"] == 10 and set(content["files"]) == {
        "model", "resume/engine.json", "resume/rank-00000-of-00001.safetensors",
    }  # fmt: skip
    assert saved.size == sum(size for size, _ in content["files"].values()) and saved.seconds > 0


def test_what_was_saved_is_loaded(tmp_path):
    """Weights, moments and counts come back into a fresh engine; loading runs no step."""
    engine, fresh = Engine(), Engine()
    path = save(tmp_path, 1, engine).path
    fresh.global_steps, fresh.optimizer.param_groups[0]["lr"] = 9, 0.7
    optimizer_files.load(fresh, checkpoint.select(str(path), tmp_path).path / "resume")
    assert fresh.global_steps == 1 and fresh.optimizer.param_groups[0]["lr"] == 0.1
    for a, b in zip(engine.module.parameters(), fresh.module.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in engine.optimizer.state[a].items():
            assert torch.equal(value, fresh.optimizer.state[b][key]) and value.dtype == fresh.optimizer.state[b][key].dtype


def test_another_model_is_refused_by_its_parameter(tmp_path):
    """The first parameter that differs is named, with both shapes."""
    point = checkpoint.select(str(save(tmp_path, 1).path), tmp_path)
    with pytest.raises(ValueError, match=r"trained parameter weight has the shape \[2, 3\] there and \[2, 4\] now"):
        optimizer_files.load(Engine(4), point.path / "resume")
    other = Engine()
    other.module = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(ValueError, match=r"parameter bias has the shape \[2\] there and of nothing now"):
        optimizer_files.load(other, point.path / "resume")


def test_another_version_is_named(tmp_path):
    """A checkpoint in DeepSpeed's own format is not unpickled, and not mistaken for a damaged one."""
    old = make(tmp_path, 3)
    (old / "state.json").write_text(json.dumps({"step": 3, "tokens_seen": 1, "agreement": {}}))
    for how in (str(old), "auto"):
        with pytest.raises(ValueError, match=r"checkpoint-3 was written by another version of bge_ds \(format 1"):
            checkpoint.select(how, tmp_path)
    assert old.is_dir()


def spoil(path: Path, how: str) -> None:
    file = path / "resume" / "rank-00000-of-00001.safetensors"
    if how == "flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif how == "short":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "missing":
        file.unlink()
    elif how == "state of nothing":
        (path / "state.json").write_text("null")
    elif how == "another format":  # one digit, of a file that its checksum knows
        (path / "state.json").write_text((path / "state.json").read_text().replace('"format": 2', '"format": 3'))
    elif how == "state cut":
        (path / "state.json").write_text((path / "state.json").read_text()[:-9])
    else:
        (path / "state.json").write_text((path / "state.json").read_text().replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize(
    ("how", "words"),
    [("flipped", "has the hash [0-9a-f]{32}, [0-9a-f]{32} was written"), ("short", "bytes, .* were written"),
     ("missing", "is missing"), ("state cut", "is no JSON .*"), ("state changed", "does not have its checksum"),
     ("state of nothing", "holds no object"), ("another format", "does not have its checksum")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, how, words):
    """One flipped bit is enough. With auto it is put aside; a path that was given is an error that names the others; with
    none left the run does not quietly begin anew."""
    before, newest = save(tmp_path, 1).path, save(tmp_path, 2).path
    spoil(newest, how)
    with pytest.raises(ValueError, match=rf"checkpoint-2 is damaged: .*{words}; resume from another one: checkpoint-1"):
        checkpoint.select(str(newest), tmp_path)
    point = checkpoint.select("auto", tmp_path)
    assert point.path == before and point.state.step == 1
    (note,) = point.notes
    assert "checkpoint-2 is damaged and now checkpoint-2.damaged" in note
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2.damaged", "run.lock"]
    spoil(before, "missing")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        checkpoint.select("auto", tmp_path)


def test_a_damaged_model_is_not_handed_on(tmp_path):
    """A run that ends with its best checkpoint's model finds one flipped bit in it, which loads as well as any; the files for
    going on are not read for that, and a checkpoint without them has no hashes."""
    before, best = save(tmp_path, 1).path, save(tmp_path, 2).path
    spoil(best, "missing")
    checkpoint.check_model(best)
    (best / "model").write_bytes(bytes([(best / "model").read_bytes()[0] ^ 1]) + (best / "model").read_bytes()[1:])
    with pytest.raises(
        ValueError, match=r"the model of .*checkpoint-2 is damaged: .*has the hash .* may be whole: checkpoint-1"
    ):
        checkpoint.check_model(best)
    (before / "state.json").unlink()
    checkpoint.check_model(before)


def test_what_cannot_be_read_is_damaged(tmp_path, monkeypatch):
    """A bad sector is an error of the reading, not of the file's bytes: the checkpoint before is taken all the same."""
    before = save(tmp_path, 1).path
    for step, name in ((2, "state.json"), (3, "rank-00000-of-00001.safetensors")):
        newest = save(tmp_path, step).path
        real = Path.stat, Path.read_text

        def stat(path, name=name, newest=newest, real=real[0], **more):
            if path.name == name and newest in path.parents and name != "state.json":
                raise OSError(5, "Input/output error")
            return real(path, **more)

        def read_text(path, *words, name=name, newest=newest, real=real[1], **more):
            if path.name == name and newest in path.parents:
                raise OSError(5, "Input/output error")
            return real(path, *words, **more)

        monkeypatch.setattr(Path, "stat", stat)
        monkeypatch.setattr(Path, "read_text", read_text)
        point = checkpoint.select("auto", tmp_path)
        monkeypatch.undo()
        assert point.path == before and "cannot be read ([Errno 5] Input/output error)" in point.notes[0]


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path):
    """Gone on from step 2 in a folder that has later checkpoints: what it saves is the newest, and those go first."""
    for step in (2, 6, 100):
        save(tmp_path, step)
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["checkpoint-4"]


def test_another_model_is_named_by_its_flag(tmp_path):
    """What is not trained is known by a mark, which tells a user nothing; the flag does."""
    point = checkpoint.select(str(save(tmp_path, 1, **{checkpoint.FROZEN: "a"}).path), tmp_path)
    with pytest.raises(ValueError, match="--model_name_or_path is not the model that it began with"):
        checkpoint.check_agreement(point, {checkpoint.FROZEN: "b"})


def test_a_model_that_cannot_be_written_leaves_nothing_half(tmp_path):
    """A full disk at the run's end: what failed, which checkpoint is good, and no folder left of it. Other errors pass."""
    save(tmp_path, 1)

    def full(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"the model could not be written .*No space left.*checkpoint-1 is still good"):
        checkpoint.write_aside(tmp_path, full, lambda aside: pytest.fail("nothing is to be placed"))
    assert names(tmp_path) == ["checkpoint-1"]
    with pytest.raises(KeyError):
        checkpoint.write_aside(tmp_path, lambda folder: {}["x"], lambda aside: None)
    assert checkpoint.write_aside(tmp_path, lambda folder: 0.5, lambda aside: aside.rmdir()) == 0.5


def test_a_whole_checkpoint_is_not_called_unwritten(tmp_path, monkeypatch):
    """What fails after the rename is said as it is: the checkpoint is there."""

    def refuse(*words, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "drop_oldest", refuse)
    with pytest.raises(ValueError, match=r"checkpoint-1 is written and whole, but .*No space left"):
        save(tmp_path, 1, keep=1)
    assert checkpoint.select("auto", tmp_path).state.step == 1


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path):
    """A full disk in the middle of a save: the former checkpoint is still the newest whole one, nothing else is left, and the
    message says what is needed and how to go on."""
    save(tmp_path, 1, keep=1)

    def full(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"checkpoint-2 could not be written .*rank 0: .*No space left.*checkpoint-1 is still"):
        save(tmp_path, 2, export=full, keep=1)
    assert names(tmp_path) == ["checkpoint-1"] and checkpoint.newest(tmp_path) == tmp_path / "checkpoint-1"
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-2"]


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    """The bytes of all ranks and of the model are held against the free ones."""
    engine = Engine()
    content = optimizer_files.entries(list(optimizer_state.fragments(engine)))
    needed = optimizer_files.size_of(content) + 4 * 8
    usage = type(shutil.disk_usage(tmp_path))
    exported = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 0, needed - 1))
    with pytest.raises(ValueError, match=r"it needs about 0.0 MiB.*there is no earlier checkpoint"):
        save(tmp_path, 1, engine, export=exported.append)
    assert not exported and names(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 0, needed))
    save(tmp_path, 1, engine)


def test_what_a_kill_left_is_tidied(tmp_path):
    """Half-written things go, a checkpoint moved aside for one that never came is put back, others' files stay."""
    for name in ("checkpoint-1", "checkpoint-1.old", "checkpoint-2.old", "checkpoint-3.partial", "model.partial", "mine.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "best.json.partial").write_text("{")
    filesystem.clean_up(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "mine.old"]
    assert (tmp_path / "checkpoint-2" / "file").read_text() == "checkpoint-2.old"
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "checkpoint-1"


HOLDER = """
import sys, time
from pathlib import Path
from bge_ds.checkpoint import filesystem as disk
disk.lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_one_run_a_folder(tmp_path):
    """A second run is refused with host and process of the first; a kill, even by -9, gives the folder back."""
    environment = helpers.environment(PYTHONPATH=str(helpers.REPO))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], env=environment, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=rf"another run writes there \(host .*, process {other.pid}, since "):
                filesystem.lock(tmp_path, patience_s=0.5)
        finally:
            other.kill()
    filesystem.lock(tmp_path)
    filesystem.lock(tmp_path)  # the same run again
    assert str(os.getpid()) in (tmp_path / "run.lock").read_text()


def test_only_model_checkpoints_are_not_resumed(tmp_path):
    save(tmp_path, 1, only_model=True)
    assert names(tmp_path / "checkpoint-1") == ["model"]
    assert checkpoint.newest(tmp_path) is None


def test_merge_folder_makes_it_loadable_last(tmp_path, monkeypatch):
    """Killed anywhere in the middle, the output has no config.json; done, it has every file and the old ones' place."""
    new, final = tmp_path / "new", tmp_path / "final"
    for folder, text in ((new, "new"), (final, "old")):
        (folder / "1_Pooling").mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "modules.json", "1_Pooling/config.json"):
            (folder / name).write_text(text)
    order = []
    replace = type(new).replace

    def noted(self, target):
        order.append(self.name)
        assert not (final / "config.json").exists()
        return replace(self, target)

    monkeypatch.setattr(type(new), "replace", noted)
    filesystem.merge_folder(new, final, last=("modules.json", "config.json"))
    assert order[-2:] == ["modules.json", "config.json"] and not new.exists()
    assert {p.read_text() for p in final.rglob("*") if p.is_file()} == {"new"}


def test_dropping_all_leaves_other_files(tmp_path):
    """A new run into an old folder removes the old checkpoints (else `auto` would resume them), and nothing besides."""
    for step in (1, 2):
        make(tmp_path, step)
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "precious").write_text("x")
    checkpoint.drop_oldest(tmp_path, keep=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-notes", "precious"]
