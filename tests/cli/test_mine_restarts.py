"""The mine command with several ranks, kills, another job's work in its folder, and a full disk."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
from pathlib import Path

import helpers
import pytest
from mine_runs import BLOCK, GROUPS, flags, groups, make_blocks_small, refused, report, start, write_lines

from bge_ds import mine
from bge_ds.mining import work


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    make_blocks_small(monkeypatch, tmp_path / "cache")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_any_number_of_ranks_writes_the_bytes_of_one(tmp_path, tiny_bert_path):
    """Vectors and negatives are shared by arithmetic alone; the last rank to leave removes the work folder. With five ranks
    some have nothing to do."""
    source, made = write_lines(tmp_path / "g.jsonl", groups()), {}
    for ranks in (1, 2, 3, 5):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        words = flags(tiny_bert_path, source, folder / "mined.jsonl", "--relative_margin", "0.01")
        assert "wrote " in helpers.run_ranks("mine_command", ranks, BLOCK, GROUPS, -1, *words)
        assert left(folder) == [".mined.jsonl.report.json", "mined.jsonl"]
        made[ranks] = (folder / "mined.jsonl").read_bytes(), report(folder / "mined.jsonl")
    assert made[1] == made[2] == made[3] == made[5]


def test_killed_at_every_write(tmp_path, tiny_bert_path):
    """Killed in the middle of any file of the plan, the vectors, the blocks or the output, or before or after the last step:
    the second start ends in the bytes of an undisturbed run and leaves nothing else behind."""
    folder = tmp_path / "out"
    folder.mkdir()
    words = flags(tiny_bert_path, write_lines(tmp_path / "g.jsonl", groups(13)), folder / "mined.jsonl")
    undisturbed = start(tmp_path, -1, *words)
    assert undisturbed.returncode == 0, undisturbed.stdout
    wanted, writes = (folder / "mined.jsonl").read_bytes(), int(undisturbed.stdout.split()[-1])
    assert writes > 15
    for moment in ["plan", *range(writes), "output", "replace", "remove"]:
        shutil.rmtree(folder)
        folder.mkdir()
        assert start(tmp_path, moment, *words).returncode == -signal.SIGKILL, moment
        again = start(tmp_path, -1, *words)
        assert again.returncode == 0, again.stdout
        assert (folder / "mined.jsonl").read_bytes() == wanted, moment
        assert left(folder) == [".mined.jsonl.report.json", "mined.jsonl"], moment
        assert int(again.stdout.split()[-1]) <= writes and ("is there and undamaged" in again.stdout) == (moment == "remove")


def test_a_rank_that_comes_late_finds_the_output(tmp_path, tiny_bert_path):
    """A rank whose blocks a killed run had finished may start when the output is there already: it has nothing to do, also
    with --overwrite."""
    words = flags(tiny_bert_path, write_lines(tmp_path / "g.jsonl", groups()), tmp_path / "mined.jsonl", "--overwrite")
    assert start(tmp_path, -1, *words).returncode == 0
    before = (tmp_path / "mined.jsonl").stat().st_mtime_ns
    late = start(tmp_path, -1, *words, RANK="1", WORLD_SIZE="2")
    assert late.returncode == 0 and "nothing to do" in late.stdout and late.stdout.split()[-1] == "0"
    assert (tmp_path / "mined.jsonl").stat().st_mtime_ns == before


def test_another_job_is_refused_by_what_differs(tmp_path, capsys, tiny_bert_path):
    """Unfinished work for another input or model is not mixed in: the refusal says what differs, and --overwrite replaces it.
    An output that was edited is refused like a foreign one."""
    source = write_lines(tmp_path / "g.jsonl", groups())
    words = flags(tiny_bert_path, source, tmp_path / "mined.jsonl")
    assert start(tmp_path, 6, *words).returncode == -signal.SIGKILL
    other = flags(
        tiny_bert_path, write_lines(tmp_path / "h.jsonl", groups(19)), tmp_path / "mined.jsonl", "--passage_max_len", 9
    )
    error = refused(capsys, other)
    assert "holds the work of another job (other --input, passage max_len)" in error
    os.utime(source, ns=(1, 1))
    assert mine.main(words) == 0  # merely touched
    wanted = (tmp_path / "mined.jsonl").read_bytes()
    assert "is there already" in refused(capsys, other)
    (tmp_path / "mined.jsonl").write_bytes(wanted + b"\n")
    assert "is there already" in refused(capsys, words)
    assert mine.main([*words, "--overwrite"]) == 0
    assert (tmp_path / "mined.jsonl").read_bytes() == wanted
    assert mine.main([*other, "--overwrite"]) == 0
    assert len((tmp_path / "mined.jsonl").read_bytes().splitlines()) == 19


def test_work_that_is_in_use_is_not_removed(tmp_path, monkeypatch, capsys, tiny_bert_path):
    """--overwrite does not take the folder away from a run that is at work in it."""
    words = flags(tiny_bert_path, write_lines(tmp_path / "g.jsonl", groups()), tmp_path / "mined.jsonl")
    other = flags(tiny_bert_path, write_lines(tmp_path / "h.jsonl", groups(19)), tmp_path / "mined.jsonl", "--overwrite")
    write = work.Work.write

    def meanwhile(self, block, mined):
        monkeypatch.setattr(work.Work, "write", write)
        tried = start(tmp_path, -1, *other)
        assert tried.returncode == 2 and "another run is at work in" in tried.stdout
        write(self, block, mined)

    monkeypatch.setattr(work.Work, "write", meanwhile)
    assert mine.main(words) == 0
    assert len((tmp_path / "mined.jsonl").read_bytes().splitlines()) == 20


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch, capsys, tiny_bert_path):
    """Negatives are never written beside lines that they were not mined for."""
    source = write_lines(tmp_path / "g.jsonl", groups())
    write = work.Work.write

    def edited(self, block, mined):
        write_lines(source, groups()[::-1])
        write(self, block, mined)

    monkeypatch.setattr(work.Work, "write", edited)
    assert "was changed while it was mined" in refused(capsys, flags(tiny_bert_path, source, tmp_path / "mined.jsonl"))
    assert not (tmp_path / "mined.jsonl").exists()


def test_a_damaged_block_is_named(tmp_path, capsys, tiny_bert_path):
    """A finished block that cannot be read any more is an error that names its file, and what to do about it works."""
    words = flags(tiny_bert_path, write_lines(tmp_path / "g.jsonl", groups()), tmp_path / "mined.jsonl")
    assert start(tmp_path, "output", *words).returncode == -signal.SIGKILL
    (block, *_) = sorted((tmp_path / ".mined.jsonl.mining").glob("mined-*/*.npz"))
    data = bytearray(block.read_bytes())
    data[len(data) // 4] ^= 1
    block.write_bytes(data)
    assert f"{block} is damaged" in refused(capsys, words)
    block.unlink()
    assert mine.main(words) == 0


def test_a_full_disk_is_a_clear_error(tmp_path, capsys, tiny_bert_path):
    """Met in the middle, the error says where and that the command goes on; it does once there is room."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    source, disk = write_lines(tmp_path / "g.jsonl", groups()), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        words = flags(tiny_bert_path, source, disk / "mined.jsonl")
        write = work.Work.write

        def fill_up(self, block, mined):
            with open(disk / "filler", "wb") as filler, pytest.raises(OSError):
                while True:
                    filler.write(bytes(4096))
                    filler.flush()
            write(self, block, mined)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work.Work, "write", fill_up)
            assert "No space left on device: fix that; the same command continues" in refused(capsys, words)
        assert not list(disk.rglob("*.npz*"))
        (disk / "filler").unlink()
        assert mine.main(words) == 0 and left(disk) == [".mined.jsonl.report.json", "mined.jsonl"]
    finally:
        gc.collect()  # files that are still mapped keep the disk busy
        subprocess.run(["umount", str(disk)], check=True)
