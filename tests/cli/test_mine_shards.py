"""The mine command on shards: the negatives of the lines that they were made of, in shards that name stored passages."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import helpers
import mine_runs
import numpy as np
import pytest
import xxhash
from mine_runs import BLOCK, GROUPS, flags, make_blocks_small, mined, refused, report, start, write_lines

from bge_ds import mine, preprocess
from bge_ds.data.shards.shard_reader import FinetuneShards, open_folder, open_folders
from bge_ds.encoding import run


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    make_blocks_small(monkeypatch, tmp_path / "cache")


def groups(count: int = 20) -> list[dict]:
    """Those of the lines' tests, with queries that the tiny tokenizer, to which numbers are unknown, tells apart."""
    found = mine_runs.groups(count)
    for group in found:
        if group["query"].startswith("query "):
            group["query"] = f"query {chr(ord('a') + int(group['query'][6:]))}"
    return found


def shards_of(source: Path, output: Path, tokenizer: Path, *more: object) -> Path:
    """Segments are of a few lines each, so that passages stand in several."""
    words = ["finetune", "--input", source, "--output", output, "--tokenizer", tokenizer, "--num_proc", 1]
    assert preprocess.main([str(word) for word in [*words, "--shard_bytes", 1000, *more]]) == 0
    return output


def mined_shards(model: Path, source: Path, output: Path, *more: object) -> FinetuneShards:
    assert mine.main(flags(model, source, output, *more)) == 0
    return open_folder(output)


def hashes(texts: list[str]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(text.encode()) for text in texts]


def negatives(shards: FinetuneShards) -> list[list[int]]:
    return [shards.hashes(shards.group(row).neg).tolist() for row in range(len(shards))]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("prompt", ["", "find: "])
@pytest.mark.parametrize(
    "more", [("--sampling", "top", "--range_for_sampling", "0-30"), ("--seed", 3), ("--relative_margin", 0.05)]
)
def test_negatives_are_those_of_the_lines(tmp_path, tiny_bert_path, prompt, more):
    """Random or best, filled or not, the shards' negatives are the texts, in the order, that mining the lines gives; so a text
    of several segments counts once, and positives of all groups of a query and the query itself are dropped."""
    source = write_lines(tmp_path / "g.jsonl", groups())
    how = ("--query_instruction_for_retrieval", prompt) if prompt else ()
    made = shards_of(source, tmp_path / "shards", tiny_bert_path, *how)
    assert sum(entry.table == "groups" for entry in open_folder(made).manifest.shards) > 2
    lines = mined(tiny_bert_path, source, tmp_path / "mined.jsonl", *how, *more)
    found = mined_shards(tiny_bert_path, made, tmp_path / "mined", *how, *more)
    assert negatives(found) == [hashes(group["neg"]) for group in lines]
    ours, theirs = report(tmp_path / "mined"), report(tmp_path / "mined.jsonl")
    assert (ours["counts"], ours["dropped"]) == (theirs["counts"], theirs["dropped"])
    assert ours["dropped"]["positive"] > 0
    assert ours["dropped"]["query"] > 0 or "top" not in more or prompt
    assert left(tmp_path) == [
        ".mined.jsonl.report.json", ".mined.report.json", "cache", "g.jsonl", "mined", "mined.jsonl", "shards",
    ]  # fmt: skip


def test_only_the_negatives_are_new(tmp_path, capsys, tiny_bert_path):
    """Two folders become one that reads as both together, but for the negatives and their scores: the passages' files are those
    of the input, queries, positives, their scores, types and prompts stay. A corpus is searched as a whole."""
    corpus = write_lines(tmp_path / "c.jsonl", [{"_id": k, "text": text} for k, text in enumerate(mine_runs.PASSAGES[::-1])])
    first = write_lines(tmp_path / "a.jsonl", groups()[3:12])
    second = [{"query": group["query"], "pos_ids": [mine_runs.PASSAGES[::-1].index(group["pos"][0])]} for group in groups()[:6]]
    a = shards_of(first, tmp_path / "a", tiny_bert_path, "--passage_max_len", 60)
    b = shards_of(write_lines(tmp_path / "b.jsonl", second), tmp_path / "b", tiny_bert_path, "--corpus", corpus)
    words = flags(tiny_bert_path, a, tmp_path / "mined", "--sampling", "top")
    words.insert(words.index("--output"), str(b))
    assert mine.main(words) == 0
    found, given = open_folder(tmp_path / "mined"), open_folders([a, b])
    assert (len(found), found.num_passages) == (len(given), given.num_passages)
    assert (found.passages(np.arange(9)).values == given.passages(np.arange(9)).values).all()
    for row in range(len(given)):
        ours, theirs = found.group(row), given.group(row)
        assert ours.query.tolist() == theirs.query.tolist() and ours.pos.tolist() == theirs.pos.tolist()
        assert found.notes(row) == given.notes(row) and ours.neg_scores is None
        assert (ours.pos_scores is None) == (theirs.pos_scores is None) and len(ours.neg) == 4
    assert given.group(7).neg_scores is not None and found.group(7).pos_scores.tolist() == [0.5]
    assert found.notes(6) == ("retrieval", "normal")
    manifest, (ours, theirs) = found.manifest, (dict(made.manifest.counts) for made in (found, given))
    assert (theirs.pop("groups_without_negatives"), ours.pop("groups_without_negatives")) == (7, 0)
    assert theirs.pop("duplicates") > 0 and ours == theirs
    assert manifest.fingerprint != given.fingerprint and manifest.passage_max_len == 60
    assert [Path(source.path).name for source in manifest.sources] == ["a.jsonl", "b.jsonl"]
    assert [source.rows for source in manifest.sources] == [(0, 9), (9, 15)]
    assert [Path(source.path).name for source in manifest.corpus] == ["a.jsonl", "c.jsonl"]
    for folder, source in ((a, 0), (b, 1)):
        for path in folder.glob("passages-*"):
            linked = tmp_path / "mined" / path.name.replace("passages-00000", f"passages-{source:05d}")
            assert linked.samefile(path)
    lines = write_lines(tmp_path / "b-lines.jsonl", [group | {"pos": group["pos"][:1]} for group in groups()[:6]])
    pool = ("--sampling", "top", "--candidate_pool", corpus)
    wanted = mined(tiny_bert_path, lines, tmp_path / "b-mined.jsonl", *pool)
    alone = mined_shards(tiny_bert_path, b, tmp_path / "b-mined", "--sampling", "top")
    assert negatives(alone) == [hashes(group["neg"]) for group in wanted]
    capsys.readouterr()
    assert preprocess.main(["verify", str(tmp_path / "mined")]) == 0
    assert preprocess.main(["inspect", str(tmp_path / "mined")]) == 0
    assert "15 groups" in capsys.readouterr().out


def test_mined_shards_train_and_can_be_mined_again(tmp_path, tiny_bert_path):
    """Fine-tuning takes a step on the output, whose hashes it checks; mining it gives what mining its input gave."""
    made = shards_of(write_lines(tmp_path / "g.jsonl", groups()), tmp_path / "shards", tiny_bert_path)
    first = mined_shards(tiny_bert_path, made, tmp_path / "mined")
    assert negatives(mined_shards(tiny_bert_path, tmp_path / "mined", tmp_path / "again")) == negatives(first)
    shutil.rmtree(made)
    how = {
        "output_dir": tmp_path / "out", "model_name_or_path": tiny_bert_path, "train_data": tmp_path / "mined",
        "cache_dir": tmp_path / "cache", "learning_rate": "1e-3", "per_device_train_batch_size": 4, "logging_steps": 1,
        "train_group_size": 4, "max_steps": 1,
    }  # fmt: skip
    words = [str(word) for name, value in how.items() for word in (f"--{name}", value)]
    helpers.run_ranks("command", 1, "finetune", *words, "--use_cpu", timeout=280)
    (row,) = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 1 and 0 < row["loss"] < 10


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_ranks_writes_the_bytes_of_one(tmp_path, tiny_bert_path):
    """Whoever finishes last writes the folder."""
    source, made = shards_of(write_lines(tmp_path / "g.jsonl", groups()), tmp_path / "shards", tiny_bert_path), {}
    for ranks in (1, 2, 3):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        words = flags(tiny_bert_path, source, folder / "mined", "--relative_margin", "0.01")
        assert "wrote " in helpers.run_ranks("mine_command", ranks, BLOCK, GROUPS, -1, *words)
        assert left(folder) == [".mined.report.json", "mined"]
        made[ranks] = contents(folder / "mined"), report(folder / "mined")
    assert made[1] == made[2] == made[3]


def test_killed_at_every_write(tmp_path, tiny_bert_path):
    """Killed in the middle of the plan, the vectors, the blocks, the groups, the manifest or the report, or before or after the
    last step: the second start ends in the bytes of an undisturbed run and leaves nothing else behind."""
    folder = tmp_path / "out"
    folder.mkdir()
    made = shards_of(write_lines(tmp_path / "g.jsonl", groups(13)), tmp_path / "shards", tiny_bert_path)
    words = flags(tiny_bert_path, made, folder / "mined")
    undisturbed = start(tmp_path, -1, *words)
    assert undisturbed.returncode == 0, undisturbed.stdout
    wanted, writes = contents(folder / "mined"), int(undisturbed.stdout.split()[-1])
    assert writes > 15
    for moment in ["plan", *range(writes), "output", "replace", "remove"]:
        shutil.rmtree(folder)
        folder.mkdir()
        assert start(tmp_path, moment, *words).returncode == -signal.SIGKILL, moment
        assert (folder / "mined").exists() == (moment == "remove"), moment
        again = start(tmp_path, -1, *words)
        assert again.returncode == 0, again.stdout
        assert contents(folder / "mined") == wanted, moment
        assert left(folder) == [".mined.report.json", "mined"], moment
        assert int(again.stdout.split()[-1]) <= writes and ("is there and undamaged" in again.stdout) == (moment == "remove")


def test_a_full_disk_is_a_clear_error(tmp_path, capsys, monkeypatch, tiny_bert_path):
    """Passages that cannot be linked are copied; where that meets a full disk the error says so, half an output is removed and
    the same command continues from the blocks."""
    made = shards_of(write_lines(tmp_path / "g.jsonl", groups()), tmp_path / "shards", tiny_bert_path)
    words = flags(tiny_bert_path, made, tmp_path / "mined")

    def fail(number):
        def instead(source, target):
            raise OSError(number, os.strerror(number), str(target))

        return instead

    monkeypatch.setattr(os, "link", fail(errno.EXDEV))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", fail(errno.ENOSPC))
        assert "No space left on device: fix that; the same command continues" in refused(capsys, words)
    assert not (tmp_path / "mined").exists() and not list(tmp_path.glob(".mined.partial*"))
    monkeypatch.setattr(run, "load_embedder", None)
    assert mine.main(words) == 0
    copy = next((tmp_path / "mined").glob("passages-*"))
    assert copy.read_bytes() == (made / copy.name).read_bytes() and not copy.samefile(made / copy.name)


def test_an_output_that_is_there_is_kept(tmp_path, capsys, tiny_bert_path):
    """The same command has nothing to do; a damaged output, or that of other rules, is replaced with --overwrite alone."""
    made = shards_of(write_lines(tmp_path / "g.jsonl", groups()), tmp_path / "shards", tiny_bert_path)
    words = flags(tiny_bert_path, made, tmp_path / "mined")
    assert mine.main(words) == 0
    wanted = contents(tmp_path / "mined")
    assert mine.main(words) == 0 and "nothing to do" in capsys.readouterr().err
    path = next((tmp_path / "mined").glob("groups-*"))
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    assert "is not empty" in refused(capsys, words)
    assert mine.main([*words, "--overwrite"]) == 0 and contents(tmp_path / "mined") == wanted
    assert "is not empty" in refused(capsys, [*words, "--seed", "7"])
    assert mine.main([*words, "--seed", "7", "--overwrite"]) == 0 and contents(tmp_path / "mined") != wanted
    assert left(tmp_path) == [".mined.report.json", "cache", "g.jsonl", "mined", "shards"]


def test_inputs_that_do_not_fit_are_named(tmp_path, capsys, tiny_bert_path, minilm_path):
    """Shards of another kind, tokenizer, prompt or length, shards among lines, and outputs that cannot serve: one line each."""
    source = write_lines(tmp_path / "g.jsonl", groups())
    made, out = shards_of(source, tmp_path / "shards", tiny_bert_path, "--query_max_len", 20), tmp_path / "out"
    texts = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in mine_runs.PASSAGES])
    words = ["pretrain", "--input", texts, "--output", tmp_path / "texts", "--tokenizer", tiny_bert_path, "--num_proc", 1]
    assert preprocess.main([str(word) for word in words]) == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    shutil.copytree(made, tmp_path / "bad")
    path = next((tmp_path / "bad").glob("passages-*"))
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    shutil.copytree(made, tmp_path / "edited")
    manifest = tmp_path / "edited/manifest.json"
    manifest.write_text(manifest.read_text().replace('"query_max_len": 20', '"query_max_len": 21'))
    for model, given, output, more, expected in (
        (tiny_bert_path, tmp_path / "texts", out, (), "holds texts for pre-training, without queries"),
        (minilm_path, made, out, (), "was made with another tokenizer"),
        (tiny_bert_path, made, out, ("--query_instruction_for_retrieval", "q: "), "holds the query prompt ''"),
        (tiny_bert_path, made, out, ("--query_max_len", 21), "a length of 21 is more than the 20 tokens"),
        (tiny_bert_path, made, out, ("--candidate_pool", texts), "the candidates of shards are their own passages"),
        (tiny_bert_path, source, tmp_path / "x.jsonl", ("--candidate_pool", made), "give lines of `text`"),
        (tiny_bert_path, made, tmp_path / "x.jsonl", (), "are written as shards: name a folder"),
        (tiny_bert_path, made, made, ("--overwrite",), "is read as --input"),
        (tiny_bert_path, made, tmp_path / "full", ("--overwrite",), "holds notes.txt, which is no part of shards"),
        (tiny_bert_path, made, tmp_path / "texts", (), "is not empty"),
        (tiny_bert_path, tmp_path / "bad", out, (), "corrupted shard"),
        (tiny_bert_path, tmp_path / "edited", out, (), "its fingerprint is not that of its content"),
        (tiny_bert_path, source, out, (), "name a file that ends in .json"),
    ):
        assert expected in refused(capsys, flags(model, given, output, *more)), expected
    mixed = flags(tiny_bert_path, made, out)
    mixed.insert(mixed.index("--output"), str(source))
    assert "is a folder of shards and" in refused(capsys, mixed)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_an_approximate_index_searches_distinct_passages(tmp_path, tiny_bert_path):
    """With all lists searched, faiss finds what the exact search finds."""
    pytest.importorskip("faiss")
    made = shards_of(write_lines(tmp_path / "g.jsonl", groups()), tmp_path / "shards", tiny_bert_path)
    exact = mined_shards(tiny_bert_path, made, tmp_path / "exact", "--sampling", "top")
    found = mined_shards(tiny_bert_path, made, tmp_path / "faiss", "--sampling", "top", "--index", "faiss", "--probes", 99)
    assert negatives(found) == negatives(exact) and report(tmp_path / "faiss")["recall"] == 1
