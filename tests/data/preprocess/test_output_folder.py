"""Folders of shards appear whole or not at all, and replace nothing but shards."""

from __future__ import annotations

import pytest

from bge_ds.data.preprocess import output_folder
from bge_ds.data.shards import manifest_file, shard_reader


def write_shards(folder) -> dict:
    """A folder of shards without a row."""
    tokenizer = {"name": "t", "fingerprint": "f", "vocab_size": 300}
    with output_folder.new_folder(folder) as partial:
        manifest = {"kind": "pretrain", "tokenizer": tokenizer, "counts": {}, "sources": [], "shards": []}
        return manifest_file.write_manifest(partial, manifest)


def test_a_failed_run_leaves_nothing_and_keeps_the_old_folder(tmp_path):
    """A run that fails may leave no folder that looks complete, and overwriting replaces only at the very end."""
    with pytest.raises(RuntimeError), output_folder.new_folder(tmp_path / "s") as partial:
        (partial / "texts-00000.arrow").write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    manifest = write_shards(tmp_path / "s")
    with pytest.raises(RuntimeError), output_folder.new_folder(tmp_path / "s", overwrite=True):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert shard_reader.open_folder(tmp_path / "s").fingerprint == manifest.fingerprint


def test_a_killed_runs_folder_is_gone_on_with_by_the_same_job_alone(tmp_path):
    """What another job left is no part of this one's result, is told, and is removed once the output is written."""
    said: list[str] = []
    left = tmp_path / ".s.partial-one"
    left.mkdir()
    (left / "texts-00000-000000.arrow").write_bytes(b"one")
    with output_folder.new_folder(tmp_path / "s", job="two", say=said.append) as partial:
        assert list(partial.iterdir()) == []
        assert left.exists() and "is what another job left unfinished" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
    left.mkdir()
    (left / "texts-00000-000000.arrow").write_bytes(b"one")
    with output_folder.new_folder(tmp_path / "s", overwrite=True, job="one") as partial:
        assert [path.name for path in partial.iterdir()] == ["texts-00000-000000.arrow"]


def test_finished_segments_outlast_a_bad_line(tmp_path):
    """Hours of work must not go because of one line: --on_error skip goes on from what is finished."""
    said: list[str] = []
    with pytest.raises(ValueError), output_folder.new_folder(tmp_path / "s", job="one", say=said.append) as partial:
        (partial / output_folder.JOURNAL).mkdir()
        (partial / output_folder.JOURNAL / "rows-00000-000003.json").write_bytes(b"{}")
        (partial / "texts-00000-000003.arrow").write_bytes(b"x")
        raise ValueError
    assert said[0].startswith("1 finished segments are kept") and partial.exists()


def test_a_second_run_on_one_output_is_refused(tmp_path):
    """Two runs in one folder would overwrite each other's files; the second must end, whatever its job."""
    with (
        output_folder.new_folder(tmp_path / "s", job="one"),
        pytest.raises(ValueError, match="another process is writing it"),
        output_folder.new_folder(tmp_path / "s", job="two"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_output_folders_that_would_lose_files_are_refused(tmp_path):
    """Overwriting deletes what it replaces, so a folder with anything but shards in it is never replaced."""
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty \(it holds thesis\.txt\)"):
        output_folder.check_output(tmp_path, overwrite=False)
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which is no part of shards"):
        output_folder.check_output(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        output_folder.check_output(tmp_path / "thesis.txt", overwrite=True)
