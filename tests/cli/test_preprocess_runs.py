"""Runs of the preprocess command that are shared out, killed or sampled: the bytes depend on input and settings alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import helpers
import pytest
from test_preprocess import GROUPS, contents, run, write

from bge_ds import preprocess
from bge_ds.data.preprocess import input_files
from bge_ds.data.shards import integrity, shard_reader

TEXTS = [{"text": f"{text} {i}"} for i in range(30) for text in helpers.SENTENCES]


def lines_of(kind) -> list:
    return TEXTS if kind == "pretrain" else GROUPS * 3


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(input_files, "BLOCK_BYTES", 500)


# --------------------------------------------------------------------------------------------------------- segments


def test_passages_are_found_in_their_own_segment(tmp_path, minilm_path, small_blocks):
    """References count within a segment on disk; the reader must add where its passages begin, for every segment."""
    given = [write(tmp_path / f"{name}.jsonl", part) for name, part in (("a", GROUPS), ("b", GROUPS[::-1]))]
    assert run("finetune", given, tmp_path / "s", minilm_path, "--shard_bytes", "900") == 0
    data = shard_reader.open_folder(tmp_path / "s")
    entries = [entry for entry in data.manifest.shards if entry.table == "groups"]
    assert len(entries) > 6 and len(data) == 80
    counts = data.manifest.counts
    assert 40 < counts["passages"] == data.num_passages == 320 - counts["duplicates"]
    tokenizer = preprocess.validate.load_tokenizer(minilm_path)
    for row, line in enumerate([*GROUPS, *GROUPS[::-1]]):
        group = data.group(row)
        for name, rows in (("pos", group.pos), ("neg", group.neg)):
            assert [tokenizer.decode(data.passage(p), skip_special_tokens=True) for p in rows] == line[name]
    # A text that two segments store has one hash: a false negative stays hidden.
    assert len(set(data.hashes(range(data.num_passages)).tolist())) == 40


# ------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_merged_parts_are_the_undivided_run(tmp_path, tiny_tokenizer_path, small_blocks, kind, ending):
    """1, 2 or 3 parts, 1 or 2 processes, seekable or not, skipped lines too: the same bytes, the manifest's included."""
    lines = lines_of(kind)
    given = [write(tmp_path / f"a{ending}", [*lines[:50], b"{bad\n", *lines[50:70]]), write(tmp_path / "b.jsonl", lines[70:])]
    given.append(write(tmp_path / "c.jsonl", [b"\n"]))
    how = ["--shard_bytes", "2000", "--on_error", "skip"]
    found = []
    for n in (1, 2, 3):
        parts = [tmp_path / f"part{n}-{i}" for i in range(1, n + 1)]
        for i, part in enumerate(parts, 1):
            more = ["--num_proc", str(1 + i % 2), *(["--partition", f"{i}/{n}"] if n > 1 else [])]
            assert run(kind, given, part, tiny_tokenizer_path, *how, *more) == 0
        whole = parts[0]
        if n > 1:
            whole = tmp_path / f"whole{n}"
            assert preprocess.main(["merge", *map(str, parts[::-1]), "--output", str(whole)]) == 0
            for part in parts:
                shutil.rmtree(part)
        assert integrity.verify_folder(whole) == []
        found.append(contents(whole))
    assert found[0] == found[1] == found[2]
    listed = [json.loads(line) for line in (whole / "skipped.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in listed] == [(given[0], 51), (given[2], 0)]


def test_merging_the_wrong_parts_names_them(tmp_path, tiny_tokenizer_path, capsys):
    """A part that is missing, doubled or of another run would lose or double rows without a trace."""
    given = write(tmp_path / "a.jsonl", GROUPS)
    names = {}
    for i in (1, 2, 3):
        names[i] = str(tmp_path / f"p{i}")
        assert run("finetune", given, names[i], tiny_tokenizer_path, "--shard_bytes", "900", "--partition", f"{i}/3") == 0
    other = str(tmp_path / "other")
    more = ["--shard_bytes", "900", "--partition", "3/3", "--query_max_len", "9"]
    assert run("finetune", given, other, tiny_tokenizer_path, *more) == 0
    whole = str(tmp_path / "whole")
    assert run("finetune", given, whole, tiny_tokenizer_path) == 0
    copied = str(tmp_path / "copy")
    shutil.copytree(names[1], copied)
    capsys.readouterr()
    for given_parts, message in (
        ([names[1], names[3]], "part 2/3 is missing"),
        ([names[1], names[2], names[2]], "p2 is given twice"),
        ([names[1], names[2], copied], "copy is part 1/3, and so is"),
        ([names[1], names[2], other], "other is of another run than"),
        ([names[1], names[2], whole], "it is a whole folder of shards"),
    ):
        assert preprocess.main(["merge", *given_parts, "--output", str(tmp_path / "m")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "m").exists()
    damaged = next((tmp_path / "p2").glob("groups-*.arrow"))
    damaged.unlink()
    assert preprocess.main(["merge", *names.values(), "--output", str(tmp_path / "m")]) == 2
    assert f"{damaged} is missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is one part of several: join them first"):
        shard_reader.open_folder(names[1])


def test_what_only_the_whole_can_tell_is_told_at_the_merge(tmp_path, tiny_tokenizer_path, capsys):
    """One positive in all of the input leaves nothing to compare; a part alone cannot know."""
    given = write(tmp_path / "a.jsonl", [{"query": f"fox {i}", "pos": ["dog"]} for i in range(40)])
    parts = [str(tmp_path / f"p{i}") for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        assert run("finetune", given, part, tiny_tokenizer_path, "--shard_bytes", "200", "--partition", f"{i}/2") == 0
    assert preprocess.main(["merge", *parts, "--output", str(tmp_path / "m")]) == 2
    assert "a.jsonl:1: nothing to compare against" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--partition", "0/2"], "--partition 0/2: give i/n with i from 1 to n"),
        (["--partition", "3/2"], "--partition 3/2: give i/n"),
        (["--partition", "2"], "--partition 2: give i/n"),
        (["--partition", "1/2", "--sample", "5"], "--sample is a quick look"),
        (["--sample", "-1"], "--sample -1: give 0 or more"),
    ],
)
def test_wrong_shares_are_refused(tmp_path, tiny_tokenizer_path, capsys, more, message):
    """A share that is none must not become an empty or a whole run."""
    assert run("finetune", write(tmp_path / "a.jsonl", GROUPS), tmp_path / "s", tiny_tokenizer_path, *more) == 2
    assert message in capsys.readouterr().err


def test_a_bad_line_in_a_later_segment_has_its_number(tmp_path, tiny_tokenizer_path, capsys, small_blocks):
    """A segment is reached by a seek: the lines before it are counted only when an error needs the number."""
    rows = [*GROUPS, b"\n", *GROUPS, b"{bad\n", *GROUPS]
    for name in ("a.jsonl", "a.jsonl.gz"):
        given = write(tmp_path / name, rows)
        for more in ([], ["--partition", "1/2"], ["--partition", "2/2"]):
            status = run("finetune", given, tmp_path / f"{name}{len(more) and more[1][0]}", tiny_tokenizer_path,
                         "--shard_bytes", "700", *more)  # fmt: skip
            error = capsys.readouterr().err
            assert status == 0 or f"{name}:82: not JSON" in error
            assert status == 2 or more


# ------------------------------------------------------------------------------------------------------------- kills


def kill_until_done(argv, output, chance, kills) -> int:
    """Starts the command again and again, killing it at random moments; how often segments were finished by then."""
    useful, journal = 0, f".{output.name}.partial-*/segments/*.json"
    for _ in range(kills):
        # A fork has everything imported: starting anew would take ten times what there is to do.
        process = multiprocessing.get_context("fork").Process(target=preprocess.main, args=([*argv, "--output", str(output)],))
        known, until = len(list(output.parent.glob(journal))), time.monotonic() + 60
        process.start()
        if chance.random() < 0.8:  # else at any moment from the very start on
            while process.is_alive() and len(list(output.parent.glob(journal))) <= known and time.monotonic() < until:
                time.sleep(0.002)
        time.sleep(chance.random() * 0.1)
        process.kill()
        process.join()
        if output.exists():
            break
        useful += len(list(output.parent.glob(journal))) > known
    assert output.exists() or preprocess.main([*argv, "--output", str(output)]) == 0
    return useful


@pytest.mark.parametrize("processes", ["1", "2"])
def test_twenty_kills_end_byte_identical(tmp_path, tiny_tokenizer_path, processes):
    """kill -9 at random moments, then the same command: it goes on, and every byte is that of an undisturbed run."""
    lines = [
        line | {"query": f"{line['query']} {i}", "neg": [f"{n} {i}" for n in line["neg"]]}
        for i in range(350)
        for line in GROUPS
    ]
    given = [write(tmp_path / "a.jsonl", lines[:9000]), write(tmp_path / "b.jsonl.gz", lines[9000:])]
    argv = ["finetune", "--input", *given, "--tokenizer", str(tiny_tokenizer_path), "--shard_bytes", "8000"]
    argv += ["--num_proc", processes]
    assert preprocess.main([*argv, "--output", str(tmp_path / "whole")]) == 0
    useful = kill_until_done(argv, tmp_path / "s", random.Random(int(processes)), 20)
    assert useful >= 5, "the run ended before it was killed: this proves nothing"
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl.gz", "s", "whole"]


@pytest.mark.parametrize("moment", ["os.replace", "os.rename", "shutil.rmtree"])
def test_a_kill_while_the_folder_gets_its_name(tmp_path, tiny_tokenizer_path, moment):
    """Between the manifest, the end of the journal and the two renames of --overwrite: the next run finishes the job."""
    given = write(tmp_path / "a.jsonl", TEXTS)
    how = ("pretrain", given, tmp_path / "s", tiny_tokenizer_path, "--shard_bytes", "2000", "--num_proc", "1")
    assert run(*how[:2], tmp_path / "t", *how[3:]) == 0
    assert run("pretrain", write(tmp_path / "b.jsonl", TEXTS[:5]), tmp_path / "s", tiny_tokenizer_path) == 0
    module, name = (__import__(moment.split(".")[0]), moment.split(".")[1])
    for count in range(200):
        pid = os.fork()
        if pid == 0:
            original, calls = getattr(module, name), []

            def killed(*args, calls=calls, original=original, count=count, **kwargs):
                calls.append(args)
                if len(calls) > count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(module, name, killed)
            os._exit(run(*how, "--overwrite"))
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            break
        if count % 7 == 0:  # from the beginning, and often from what the last kill left
            for left in tmp_path.glob(".s.partial-*"):
                shutil.rmtree(left)
    assert os.WEXITSTATUS(status) == 0 and count >= 2
    assert contents(tmp_path / "s") == contents(tmp_path / "t")


def test_a_changed_input_is_another_job(tmp_path, tiny_tokenizer_path, monkeypatch):
    """What a killed run left of an input that was edited since must not be mixed with the new rows."""
    given = write(tmp_path / "a.jsonl", TEXTS)
    how = ("pretrain", given, tmp_path / "s", tiny_tokenizer_path, "--shard_bytes", "500", "--num_proc", "1")

    def stop_at(number):
        original, made = preprocess.build.__globals__["segment_writer"].SegmentWriter.finish, []

        def finish(self):
            original(self)
            made.append(self.segment)
            if len(made) == number:
                raise KeyboardInterrupt

        return finish

    with monkeypatch.context() as patch:
        patch.setattr("bge_ds.data.preprocess.segment_writer.SegmentWriter.finish", stop_at(5))
        assert run(*how) == 130
    (left,) = tmp_path.glob(".s.partial-*")
    assert len(list(left.glob("segments/rows-00000-*.json"))) == 5
    made: list[int] = []
    original = preprocess.build.__globals__["segment_writer"].SegmentWriter.finish
    with monkeypatch.context() as patch:
        patch.setattr(
            "bge_ds.data.preprocess.segment_writer.SegmentWriter.finish",
            lambda self: (original(self), made.append(self.segment)),
        )
        assert run(*how) == 0
    assert min(made) == 5 and len(shard_reader.open_folder(tmp_path / "s")) == len(TEXTS)
    shutil.rmtree(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr("bge_ds.data.preprocess.segment_writer.SegmentWriter.finish", stop_at(5))
        assert run(*how) == 130
    write(tmp_path / "a.jsonl", [{"text": "other " + line["text"]} for line in TEXTS])
    assert run(*how) == 0
    assert contents(tmp_path / "s") == (run(*how[:2], tmp_path / "t", *how[3:]), contents(tmp_path / "t"))[1]
    assert not list(tmp_path.glob(".s*"))


def test_bad_lines_can_be_skipped_after_all(tmp_path, tiny_tokenizer_path):
    """A bad line late in a long input stops it; the same command with --on_error skip goes on from what is finished."""
    given = write(tmp_path / "a.jsonl", [*TEXTS[:100], b"{bad\n", *TEXTS[100:]])
    how = ("pretrain", given, tmp_path / "s", tiny_tokenizer_path, "--shard_bytes", "500")
    assert run(*how) == 2
    (left,) = tmp_path.glob(".s.partial-*")
    known = {path: os.stat(path).st_mtime_ns for path in left.glob("texts-*.arrow")}
    assert len(known) > 3
    assert run(*how, "--on_error", "skip") == 0
    kept = [path for path in known if (tmp_path / "s" / path.name).stat().st_mtime_ns == known[path]]
    assert len(kept) >= len(known) - 1
    assert run(*how[:2], tmp_path / "t", *how[3:], "--on_error", "skip") == 0
    assert contents(tmp_path / "s") == contents(tmp_path / "t")


# ------------------------------------------------------------------------------------------------------------ sample


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_sample_is_the_first_lines_of_each_source(tmp_path, minilm_path, small_blocks, ending):
    """A quick look takes N lines of each input, blank ones not counted, and says so in the manifest."""
    given = [write(tmp_path / f"a{ending}", [b"\n", *GROUPS[:3], b"\n", *GROUPS[3:]]), write(tmp_path / "b.jsonl", GROUPS[:2])]
    assert run("finetune", given, tmp_path / "s", minilm_path, "--sample", "7", "--shard_bytes", "600") == 0
    data = shard_reader.open_folder(tmp_path / "s")
    assert data.manifest.sample == 7 and [source.rows for source in data.manifest.sources] == [(0, 7), (7, 9)]
    tokenizer = preprocess.validate.load_tokenizer(minilm_path)
    shown = [tokenizer.decode(data.group(row).query, skip_special_tokens=True) for row in range(9)]
    assert shown == [f"question {i}" for i in (*range(7), 0, 1)]
