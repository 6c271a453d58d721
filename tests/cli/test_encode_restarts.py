"""The encode command with several ranks, kills, damage, a full disk, and another job's vectors in its output."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import helpers
import pytest
from encode_runs import BLOCK, TEXTS, content, encoded, flags, refused, start, write_lines

from bge_ds import encode
from bge_ds.encoding import output, run
from bge_ds.encoding.vectors import open_vectors


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "BLOCK", BLOCK)
    monkeypatch.setenv("BGE_DS_CACHE", str(tmp_path / "cache"))


def test_two_ranks_write_the_bytes_of_one(tmp_path, tiny_bert_path):
    """A block is packed by itself, so that neither its bytes nor the manifest depend on who encodes it."""
    source = write_lines(tmp_path / "c.jsonl")
    for ranks in (1, 2, 3):
        words = flags(tiny_bert_path, source, tmp_path / f"{ranks}", "--dtype", "int8")
        printed = helpers.run_ranks("encode_command", ranks, BLOCK, -1, *words)
        assert printed.count("wrote ") >= 1
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    assert sorted(content(tmp_path / "1")) == sorted(
        [
            "manifest.json",
            *(
                f"{kind}-{k:06d}.{end}"
                for kind, end in (("vectors", "npy"), ("scales", "npy"), ("ids", "arrow"))
                for k in range(4)
            ),
        ]
    )
    assert not list(tmp_path.glob(".*.lock"))


def test_killed_at_every_write(tmp_path, tiny_bert_path):
    """Killed in the middle of any file, record or manifest, or before the last cleaning: the second start ends in the bytes of
    an undisturbed run, and does not touch the blocks that were finished."""
    words = flags(tiny_bert_path, write_lines(tmp_path / "c.jsonl"), tmp_path / "out")
    undisturbed = start(tmp_path, -1, *words)
    assert undisturbed.returncode == 0, undisturbed.stdout
    writes = int(undisturbed.stdout.split()[-1])
    assert writes == 14  # the job, then vectors, ids and a record of each block, then the manifest
    wanted = content(tmp_path / "out")
    for moment in [*range(writes), "clean"]:
        shutil.rmtree(tmp_path / "out")
        assert start(tmp_path, moment, *words).returncode == -signal.SIGKILL
        kept = {path: path.stat() for path in finished_files(tmp_path / "out")}
        assert len(kept) == 2 * (4 if moment == "clean" else max(0, moment - 1) // 3)
        again = start(tmp_path, -1, *words)
        assert again.returncode == 0, again.stdout
        assert content(tmp_path / "out") == wanted, moment
        for path, before in kept.items():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns), (moment, path)


def finished_files(folder: Path) -> list[Path]:
    """The files that records or the manifest name."""
    if (folder / "manifest.json").exists():
        blocks = json.loads((folder / "manifest.json").read_text())["blocks"]
    else:
        blocks = [json.loads(path.read_text()) for path in folder.glob("blocks/*.json")]
    return [folder / entry["file"] for block in blocks for entry in block["files"]]


def test_damage_is_found_and_mended(tmp_path, capsys, tiny_bert_path):
    """A flipped byte, a file cut short or a missing one, in a finished folder or an unfinished one: its block alone is encoded
    again, and the result is as before. The reader names the file."""
    source, folder = write_lines(tmp_path / "c.jsonl"), tmp_path / "out"
    encoded(tiny_bert_path, source, folder)
    wanted = content(folder)
    for damage in ("flip", "cut", "missing"):
        path = folder / "vectors-000002.npy"
        data = bytearray(path.read_bytes())
        data[200] ^= 1
        path.unlink()
        if damage != "missing":
            path.write_bytes(data if damage == "flip" else data[:-1])
        if damage == "flip":
            assert [str(path) in problem for problem in open_vectors(folder).verify()] == [True]
        else:
            with pytest.raises(ValueError, match="vectors-000002"):
                open_vectors(folder)
        before = (folder / "vectors-000001.npy").stat().st_mtime_ns
        capsys.readouterr()
        encoded(tiny_bert_path, source, folder)
        assert "vectors-000002.npy" in capsys.readouterr().err
        assert content(folder) == wanted and (folder / "vectors-000001.npy").stat().st_mtime_ns == before
    words = flags(tiny_bert_path, source, folder)
    shutil.rmtree(folder)
    assert start(tmp_path, 8, *words).returncode == -signal.SIGKILL  # two blocks are finished
    path = folder / "ids-000001.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    again = start(tmp_path, -1, *words)
    assert again.returncode == 0 and "ids-000001.arrow" in again.stdout and "1 of 4 blocks are finished" in again.stdout
    assert content(folder) == wanted


def test_no_rank_vouches_for_anothers_damaged_block(tmp_path, tiny_bert_path):
    """All blocks of a killed run are recorded, and one that rank 1 owns is damaged: rank 0, which is done at once, must not
    write a manifest for it. Whoever comes last does."""
    words = flags(tiny_bert_path, write_lines(tmp_path / "c.jsonl"), tmp_path / "out")
    assert start(tmp_path, 13, *words).returncode == -signal.SIGKILL  # in the middle of the manifest
    wanted = (tmp_path / "out/vectors-000001.npy").read_bytes()
    (tmp_path / "out/vectors-000001.npy").write_bytes(wanted[:-1] + b"\1")
    first = start(tmp_path, -1, *words, RANK="0", WORLD_SIZE="2")
    assert first.returncode == 0 and "vectors-000001.npy has the hash" in first.stdout and "wrote" not in first.stdout
    assert not (tmp_path / "out/manifest.json").exists()
    last = start(tmp_path, -1, *words, RANK="1", WORLD_SIZE="2")
    assert last.returncode == 0 and "wrote" in last.stdout
    assert (tmp_path / "out/vectors-000001.npy").read_bytes() == wanted and open_vectors(tmp_path / "out").verify() == []


def test_another_job_is_refused_by_what_differs(tmp_path, capsys, tiny_bert_path):
    """Vectors of other settings, texts or weights are never mixed: the refusal names each difference, --overwrite replaces
    them, and a text file that was merely touched or packed goes on."""
    source, folder = write_lines(tmp_path / "c.jsonl"), tmp_path / "out"
    model = shutil.copytree(tiny_bert_path, tmp_path / "model")
    encoded(model, source, folder)
    wanted = content(folder)
    error = refused(capsys, model, source, folder, "--dtype", "float16", "--max_len", 20, "--normalize_embeddings", "False")
    for words in ("dtype: 'float32' there, 'float16' here", "max_len: 130 there, 20 here", "normalize: True there, False here"):
        assert words in error
    changed = write_lines(tmp_path / "changed.jsonl", [*TEXTS[:-1], "another"])
    assert "the texts: 30 there, 30 here, and not the same" in refused(capsys, model, changed, folder)
    helpers.make_model("bert", model, hidden_act="relu")
    assert "the files of the model" in refused(capsys, model, source, folder)
    assert content(folder) == wanted
    shutil.rmtree(model)
    shutil.copytree(tiny_bert_path, model)
    os.utime(source, ns=(1, 1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    encoded(model, tmp_path / "c.jsonl.gz", folder)
    assert content(folder) == wanted

    bad = write_lines(tmp_path / "bad.jsonl", [*TEXTS, ""])
    assert "bad.jsonl:31" in refused(capsys, model, bad, folder, "--overwrite")
    assert content(folder) == wanted  # not removed before the new input is known to be good
    vectors = encoded(model, changed, folder, "--overwrite", "--dtype", "float16")
    assert vectors.dtype == "float16" and vectors.verify() == []
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace('"texts": 30', '"texts": 29'))
    assert "it was edited or damaged" in refused(capsys, model, source, folder)
    again = encoded(model, source, folder, "--overwrite")
    assert again.manifest.fingerprint == json.loads(wanted["manifest.json"])["fingerprint"]
    assert {**content(folder), "manifest.json": b""} == {**wanted, "manifest.json": b""}  # which has the time of the input


def test_a_job_that_was_taken_over_stops(tmp_path, monkeypatch, capsys, tiny_bert_path):
    """A run whose output another run has replaced meanwhile must not add its blocks to the other's."""
    source, folder = write_lines(tmp_path / "c.jsonl"), tmp_path / "out"
    write_block = output.write_block

    def taken(*args):
        monkeypatch.setattr(output, "write_block", write_block)
        assert start(tmp_path, -1, *flags(tiny_bert_path, source, folder, "--dim", "8", "--overwrite")).returncode == 0
        write_block(*args)

    monkeypatch.setattr(output, "write_block", taken)
    assert encode.main(flags(tiny_bert_path, source, folder)) == 2
    assert "another run has replaced or finished what is there" in capsys.readouterr().err
    assert open_vectors(folder).shape == (30, 8) and open_vectors(folder).verify() == []


def test_a_full_disk_is_a_clear_error(tmp_path, capsys, tiny_bert_path):
    """Seen beforehand, the need is named; met in the middle, the file is, and the run goes on once there is room."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    source, disk = write_lines(tmp_path / "c.jsonl", TEXTS * 40), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        assert "the vectors take 153,600 bytes, and " in refused(capsys, tiny_bert_path, source, disk / "out")
        (disk / "filler").write_bytes(bytes(50_000))
        words = flags(tiny_bert_path, source, disk / "out", "--dim", "8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
            assert encode.main(words) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert not list(disk.glob("out/vectors*.partial")) and (disk / "out/job.json").exists()
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert encode.main(words) == 0
        assert "blocks are finished" in capsys.readouterr().err and open_vectors(disk / "out").verify() == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
