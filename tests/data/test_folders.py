"""Folders of shards appear whole or not at all, and replace nothing but shards."""

from __future__ import annotations

import os

import pytest

from bge_ds.data import folders, shards


def write_shards(folder) -> dict:
    """A folder of shards without a row."""
    tokenizer = {"name": "t", "fingerprint": "f", "vocab_size": 300}
    with folders.new_folder(folder) as partial:
        manifest = {"kind": "pretrain", "tokenizer": tokenizer, "counts": {}, "sources": [], "shards": []}
        return shards.write_manifest(partial, manifest)


def test_a_failed_run_leaves_nothing_and_keeps_the_old_folder(tmp_path):
    """A run that fails may leave no folder that looks complete, and overwriting replaces only at the very end."""
    with pytest.raises(RuntimeError), folders.new_folder(tmp_path / "s") as partial:
        (partial / "texts-00000.arrow").write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    manifest = write_shards(tmp_path / "s")
    with pytest.raises(RuntimeError), folders.new_folder(tmp_path / "s", overwrite=True):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert shards.open_folder(tmp_path / "s").fingerprint == manifest["fingerprint"]


def test_a_killed_runs_folder_is_cleared_by_the_next_run(tmp_path):
    """A killed run leaves its partial folder, which has no final name; the next run removes it, but no living run's."""
    host = folders.socket.gethostname()
    dead, alive = tmp_path / f".s.partial-{host}-999999999", tmp_path / f".s.partial-{host}-{os.getppid()}"
    dead.mkdir()
    alive.mkdir()
    write_shards(tmp_path / "s")
    assert not dead.exists() and alive.exists()


def test_output_folders_that_would_lose_files_are_refused(tmp_path):
    """Overwriting deletes what it replaces, so a folder with anything but shards in it is never replaced."""
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty \(it holds thesis\.txt\)"):
        folders.check_output(tmp_path, overwrite=False)
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which is no part of shards"):
        folders.check_output(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        folders.check_output(tmp_path / "thesis.txt", overwrite=True)
