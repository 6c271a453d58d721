"""The benchmark driver of the data side: every set gives its rows, and what would make one unfair is refused.

Of the peers, `datasets` is run; MosaicML Streaming where its environment is there.
"""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace

import pytest
import torch
from helpers import REPO, SENTENCES

from bge_ds import preprocess
from bge_ds.data.shards import shard_reader


@pytest.fixture
def data_driver(monkeypatch):
    """The driver of the data side. What it asks of our own side it gets in this process, or each would import torch anew."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import data
    import own_data
    import own_pretraining

    def ask_parts(run, asked, script):
        return (own_pretraining.write_texts if script == "own_pretraining.py" else own_data.work)(asked)

    def launch(commands, log, environments):
        (command,) = commands
        assert command[1:3] == ["-m", "bge_ds.preprocess"] and not preprocess.main(command[3:])

    monkeypatch.setattr(data, "ask_parts", ask_parts)
    monkeypatch.setattr(data, "launch", launch)
    monkeypatch.setattr(own_data, "on_one_core", lambda: None)
    threads = torch.get_num_threads()
    yield data, own_data
    torch.set_num_threads(threads)
    for name in ("data", "own_data", "own_pretraining", "own_parts", "comparing", "rows", "sides", "watching", "run_datasets"):
        sys.modules.pop(name, None)


def data_flags(folder, model, *sets: str) -> list[str]:
    """The driver's arguments for 40 groups whose positives are longer than 512 tokens."""
    negatives = [f"{word} {n}" for n, word in enumerate(SENTENCES[0].split()[:9])]
    groups = [{"query": f"q {i}", "pos": [f"{i} " + " ".join(SENTENCES * 8)], "neg": negatives[i % 3 :]} for i in range(40)]
    (folder / "in.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    flags = {
        "data": folder / "in.jsonl", "model": model, "envs": folder, "work": folder / "work", "output": folder / "rows.csv",
        "bytes": 60_000, "core_bytes": 60_000, "open_bytes": 1_000_000, "memory_bytes": 40_000, "shard_bytes": 30_000,
        "reads": 50, "full_texts": 32, "loader_steps": 2, "num_proc": 2,
    }  # fmt: skip
    return [*(word for name, value in flags.items() for word in (f"--{name}", str(value))), "--sets", *sets]


def read_rows(file) -> list[dict]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_data_sets_of_our_own_side(data_driver, monkeypatch, tmp_path, tiny_bert_path):
    """Every set gives its rows with figures; a peer whose environment is missing is said to have failed."""
    driver, _ = data_driver
    monkeypatch.syspath_prepend(str(REPO / "benchmarks" / "peers"))
    import run_datasets

    def peer(run, script, python, **asked):
        assert script == "run_datasets.py"  # the other one has no interpreter to start with
        return run_datasets.time_reads({**asked, "output": str(run.fresh("run_datasets"))})

    monkeypatch.setattr(driver, "peer", peer)
    assert driver.main(data_flags(tmp_path, tiny_bert_path, "tokenizer", "open", "reads", "loader", "resume")) == 1
    found = read_rows(tmp_path / "rows.csv")
    names = ["bge_ds", "tokenizers.encode_batch", "bge_ds", "bge_ds", "bge_ds"]
    names += [f"datasets, {way}" for way in ("numpy", "lists", "Arrow")] + ["MosaicML Streaming"]
    names += ["bge_ds, one worker", "bge_ds, in the process itself"] * 2 + ["bge_ds"] * 2
    assert [row["side"] for row in found] == names
    assert [row["side"] for row in found if row["note"] == "failed"] == ["MosaicML Streaming"]
    assert all(float(row["figure"]) > 0 for row in found if row["note"] != "failed")
    compared = {row["side"] for row in found if row["ours_times_as_fast"]}
    assert compared == {"tokenizers.encode_batch", *names[5:8]}  # never our own sides with each other
    assert all(bool(row["goal"]) == row["side"].startswith("bge_ds") for row in found)


def test_preprocessing_by_both_commands(data_driver, monkeypatch, tmp_path, tiny_bert_path):
    """All as in a real run, in processes: both commands make as many rows of the same lines."""
    driver, _ = data_driver
    from sides import ask_parts

    monkeypatch.setattr(driver, "ask_parts", ask_parts)
    assert driver.main(data_flags(tmp_path, tiny_bert_path, "preprocess")) == 0
    ours, datasets = read_rows(tmp_path / "rows.csv")
    assert (ours["side"], datasets["side"], ours["unit"]) == ("bge_ds", "datasets", "s")
    assert all(float(row["peak_MiB"]) > 10 and float(row["figure"]) > 0 for row in (ours, datasets))
    assert float(datasets["ours_share_of_memory"]) > 0 and float(datasets["ours_times_as_fast"]) > 0


def test_memory_is_compared_with_that_of_one_input(data_driver, monkeypatch, tmp_path, tiny_bert_path):
    """Each input's peak by that of 1x in the same turn, on inputs of more segments than one that hold no text twice."""
    driver, _ = data_driver
    peaks = iter([100 << 20, 110 << 20, 150 << 20, 200 << 20, 240 << 20, 300 << 20])

    def watched(command, env, log):
        assert not preprocess.main(command[3:])
        return 7.0, next(peaks), ""

    monkeypatch.setattr(driver, "watched", watched)
    assert driver.main([*data_flags(tmp_path, tiny_bert_path, "memory"), "--repeats", "2"]) == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert [row["side"] for row in rows] == ["bge_ds, 1x", "bge_ds, 4x", "bge_ds, 16x"]
    assert [row["figure"] for row in rows] == ["1", "1.15", "1.5"]
    assert [row["peak_MiB"] for row in rows] == ["200.0", "240.0", "300.0"]
    assert [row["goal"] for row in rows] == ["", "at most 1.1", "at most 1.1"]
    assert all(row["note"].startswith("7 s; ") and "none twice" in row["note"] for row in rows)
    assert "2 segments" in rows[0]["note"] and "22 segments" in rows[2]["note"]


def test_memory_needs_more_than_a_segment(data_driver, tmp_path, tiny_bert_path, capsys):
    """An input within one segment says nothing of what a larger one takes; texts that come twice are refused."""
    driver, own = data_driver
    flags = data_flags(tmp_path, tiny_bert_path, "memory")
    with pytest.raises(SystemExit):
        driver.main([*flags, "--shard_bytes", "40000"])
    assert "--memory_bytes 40000 is no more than --shard_bytes 40000" in capsys.readouterr().err
    groups = {"source": str(tmp_path / "in.jsonl"), "target": str(tmp_path / "groups.jsonl"), "bytes": 400_000}
    assert own.work({"what": "groups", **groups})["bytes"] >= 400_000  # the source is gone through several times
    rows = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    texts = [text for row in rows for text in (row["query"], *row["pos"], *row["neg"])]
    assert len(set(texts)) == len(texts) == 9 * len(rows)
    command = ["finetune", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "shards")]
    assert not preprocess.main([*command, "--tokenizer", str(tiny_bert_path)])
    with pytest.raises(ValueError, match="different passages"):
        driver.say_segments(tmp_path / "shards", 1)
    (tmp_path / "in.jsonl").write_text('{"query": "q", "pos": ["p"], "neg": ["n"]}\n')
    with pytest.raises(SystemExit, match="no group has 7 negatives"):
        own.work({"what": "groups", **groups})


def test_opening_maps_nothing_and_a_row_one_shard(data_driver, tmp_path, tiny_bert_path):
    """What makes opening constant in size; a side that maps more is refused, not given a row."""
    driver, own = data_driver
    args = Namespace(model=tiny_bert_path, data=tmp_path / "in.jsonl", core_bytes=50_000, open_bytes=500_000, repeats=1)
    data_flags(tmp_path, tiny_bert_path)
    run = driver.Run(envs=tmp_path, work=tmp_path / "work", threads=1)
    run.work.mkdir()
    small, large = driver.open_set(args, run, "here")
    assert small["size"].endswith("in 1 shards") and int(large["size"].split()[-2]) > 5
    linked = shard_reader.open_folder(run.work / "linked_500000")
    assert own.mapped_shards(linked) == 0
    linked.ids(0), linked.ids(len(linked) - 1)
    assert own.mapped_shards(linked) == 2
    driver.own = lambda *args, **asked: {"mapped": [1, 1], "seconds": 1, "grown": 1, "bytes": 1, "shards": 1}
    with pytest.raises(ValueError, match=r"\[1, 1\], not none and one"):
        driver.open_set(args, run, "here")


def test_data_sides_with_other_texts_are_refused(data_driver, monkeypatch, tmp_path, tiny_bert_path, capsys):
    """A rate of other texts would be no comparison."""
    driver, _ = data_driver
    tokens = iter(range(100))
    monkeypatch.setattr(driver, "peer", lambda *args, **asked: {"seconds": 1, "tokens": next(tokens)})
    assert driver.main(data_flags(tmp_path, tiny_bert_path, "reads")) == 1
    assert "not the same texts" in capsys.readouterr().err and not (tmp_path / "rows.csv").exists()


def test_memory_of_a_tree_counts_children(data_driver, tmp_path):
    """What a child owns counts, and pages that both have count once; a command that fails names its log."""
    from sides import SideFailed
    from watching import watched

    code = "import os, time; kept = b'x' * (40 << 20); pid = os.fork(); more = b'y' * (40 << 20); time.sleep(0.5)"
    seconds, peak, _ = watched([sys.executable, "-c", code], None, tmp_path / "tree.log")
    assert seconds >= 0.5 and 120 << 20 < peak < 150 << 20
    with pytest.raises(SideFailed, match=r"bad\.log"):
        watched([sys.executable, "-c", "raise SystemExit(3)"], None, tmp_path / "bad.log")


def test_streaming_reads_the_same_groups(data_driver, monkeypatch, tmp_path, tiny_bert_path):
    """MosaicML Streaming, where make_environments.sh has made its environment in .bench."""
    driver, own = data_driver
    python = REPO / ".bench" / "streaming" / "bin" / "python"
    if not python.exists():
        pytest.skip("the environment of MosaicML Streaming is missing: benchmarks/make_environments.sh .bench streaming")
    from sides import launch

    monkeypatch.setattr(driver, "launch", launch)
    data_flags(tmp_path, tiny_bert_path)
    command = ["finetune", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "shards")]
    assert not preprocess.main([*command, "--tokenizer", str(tiny_bert_path)])
    run = driver.Run(envs=REPO / ".bench", work=tmp_path / "work", threads=1)
    texts, shards_of_groups = str(run.fresh("texts")), str(tmp_path / "shards")
    own.work({"what": "export", "shards": shards_of_groups, "target": texts})
    theirs = driver.peer(run, "run_streaming.py", str(python), texts=texts, reads=20)
    assert theirs["tokens"] == own.work({"what": "reads", "shards": shards_of_groups, "reads": 20})["tokens"] > 0
