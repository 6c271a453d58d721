"""Finding, naming and swapping checkpoints; nothing half-written looks whole."""

from __future__ import annotations

import json

import pytest

from bge_ds.distributed import checkpoint


def make(folder, step, whole=True, **agreement):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if whole:
        checkpoint.write_json(path / "state.json", {"step": step, "tokens_seen": 7, "agreement": agreement})
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
    """Other data, another rank count, another batch: what differs is named, with both values."""
    path = make(tmp_path, 5, ranks=2, data_fingerprint="a")
    assert checkpoint.read_state(path, {"ranks": 2, "data_fingerprint": "a"}) == {"step": 5, "tokens_seen": 7}
    with pytest.raises(ValueError, match="ranks: 2 there, 3 now"):
        checkpoint.read_state(path, {"ranks": 3, "data_fingerprint": "a"})
    # Of a version that had no mixtures: it goes on without one, and is refused where one is asked for.
    later = {"ranks": 2, "train_weights": None, "same_dataset_within_batch": False, "max_example_num_per_dataset": 9}
    assert checkpoint.read_state(path, later)["step"] == 5
    with pytest.raises(ValueError, match=r"train_weights: None there, \[1.0, 2.0\] now"):
        checkpoint.read_state(path, later | {"train_weights": [1.0, 2.0]})
    (path / "state.json").write_text('{"step": 5')
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read_state(path, {})


class FakeEngine:
    """Writes what DeepSpeed would, a file in the tag's folder."""

    device = "cpu"

    def save_checkpoint(self, folder, tag, save_latest):
        from pathlib import Path

        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "state.pt").write_text("x")


def test_save_keeps_the_last_n(tmp_path):
    """save_total_limit keeps the newest and leaves nothing of the others."""
    for step in (1, 2, 10):
        checkpoint.save(FakeEngine(), tmp_path, step, 0, {}, lambda f: (f / "model").mkdir(), keep=2, only_model=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    state = json.loads((tmp_path / "checkpoint-10" / "state.json").read_text())
    assert state["step"] == 10
    assert (tmp_path / "checkpoint-10" / "resume" / "state.pt").is_file()


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path):
    """A full disk in the middle of a save: the former checkpoint is still the newest whole one."""
    checkpoint.save(FakeEngine(), tmp_path, 1, 0, {}, lambda f: None, keep=1, only_model=False)

    def full(folder):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.save(FakeEngine(), tmp_path, 2, 0, {}, full, keep=1, only_model=False)
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-1"
    checkpoint.save(FakeEngine(), tmp_path, 2, 0, {}, lambda f: None, keep=1, only_model=False)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_only_model_checkpoints_are_not_resumed(tmp_path):
    checkpoint.save(FakeEngine(), tmp_path, 1, 0, {}, lambda f: (f / "model").mkdir(), keep=None, only_model=True)
    assert (tmp_path / "checkpoint-1" / "model").is_dir()
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
    checkpoint.merge_folder(new, final, last=("modules.json", "config.json"))
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
