"""The driver of the inference benchmark: turns are paired, sides with other results are refused. FlagEmbedding is not run."""

from __future__ import annotations

import csv
import json
import shutil
import sys

import numpy as np
import pytest
from helpers import REPO, SENTENCES
from transformers import AutoConfig

from bge_ds.modeling.export import write_sentence_transformers


@pytest.fixture
def driver(monkeypatch):
    """The driver, whose sides run in this process, or each would import torch anew."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks" / "peers"))
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import inference
    import own_inference
    import run_inference
    from sides import SideFailed

    order = []

    def ask_parts(run, asked, script):
        assert script == "own_inference.py"
        order.append(asked["what"])
        return own_inference.work(asked)

    def run_peer(setting, run, env, script, **more):
        assert script == "run_inference.py"
        order.append(env)
        if env == "flagembedding":
            raise SideFailed("no such environment")
        return run_inference.measure(more | {"output": str(run.fresh(env))})

    monkeypatch.setattr(inference, "ask_parts", ask_parts)
    monkeypatch.setattr(inference, "run_peer", run_peer)
    yield inference, order
    for name in ("inference", "own_inference", "run_inference", "data", "comparing", "rows", "sides", "watching"):
        sys.modules.pop(name, None)


@pytest.fixture
def model(tmp_path, tiny_bert_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert_path, folder)
    write_sentence_transformers(folder, AutoConfig.from_pretrained(folder), "mean", True, {})
    return folder


def flags(folder, *more: str) -> list[str]:
    groups = [{"query": "q", "pos": [text], "neg": []} for text in [*SENTENCES, SENTENCES[0]]]
    (folder / "in.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    paths = {"data": "in.jsonl", "model": "model", "envs": "envs", "work": "work", "output": "rows.csv"}
    given = {name: folder / path for name, path in paths.items()} | {"texts": 6, "max_len": 16, "repeats": 2, "threads": 1}
    return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]


def test_sides_take_turns_and_give_rows(driver, monkeypatch, tmp_path, model):
    """Each different text once, the second turn in reverse order, and a row a side; one that fails is said, not compared."""
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("BGE_DS_CACHE", str(tmp_path / "cache"))
    inference, order = driver
    assert inference.main(flags(tmp_path, "--sets", "encode")) == 1
    st = "sentence_transformers"
    assert order == ["encode", st, "flagembedding", st, "encode", "compare"]
    with (tmp_path / "rows.csv").open() as file:
        ours, theirs, failed = csv.DictReader(file)
    assert (ours["side"], theirs["side"], failed["note"]) == ("bge_ds", "sentence-transformers", "failed")
    assert ours["size"].startswith("6 texts of ") and "at most 16; fp32, 1 threads" in ours["size"]
    assert all(float(row["figure"]) > 0 and float(row["peak_MiB"]) > 10 for row in (ours, theirs))
    low, high = (float(word) for word in theirs["note"].split(";")[0].split()[1::2])
    assert low <= float(theirs["ours_times_as_fast"]) <= high and "sentence-transformers " in theirs["versions"]


def test_other_vectors_are_refused(driver, monkeypatch, tmp_path, model, capsys):
    """A peer with other vectors has done other work, and too few texts are an error: no row."""
    monkeypatch.setenv("BGE_DS_CACHE", str(tmp_path / "cache"))
    inference, _ = driver

    def run_peer(setting, run, env, script, **more):
        np.save(run.fresh(env) / "vectors.npy", np.zeros((6, 32), np.float32))
        return {"seconds": 1.0, "peak_bytes": 1, "versions": {}}

    monkeypatch.setattr(inference, "run_peer", run_peer)
    assert inference.main(flags(tmp_path, "--sets", "encode", "--repeats", "1")) == 1
    assert "not the same work" in capsys.readouterr().err
    assert inference.main(flags(tmp_path, "--sets", "encode", "--texts", "7")) == 1
    assert "has 6 different texts, --texts 7 are asked for" in capsys.readouterr().err and not (tmp_path / "rows.csv").exists()


def test_mining_searching_and_scoring(driver, monkeypatch, tmp_path, model):
    """The other sets against sentence-transformers: the same negatives and scores, or there were no rows."""
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("BGE_DS_CACHE", str(tmp_path / "cache"))
    inference, order = driver
    for name, value in {"RANGE": (0, 3), "NEGATIVES": 3, "GROUP": 2, "TIMES": (1, 2)}.items():
        monkeypatch.setattr(inference, name, value)
    groups = tmp_path / "groups.jsonl"
    lines = [{"query": text.split()[0], "pos": [text], "neg": SENTENCES[-1:]} for text in SENTENCES[:-1]]
    groups.write_text("".join(json.dumps(line) + "\n" for line in lines))
    count = str(len(lines))
    sizes = ("--queries", count, "--pool", count, "--pairs", str(2 * len(lines)), "--searched", "300", "--width", "8")
    more = ("--groups", str(groups), *sizes, "--repeats", "1", "--sets", "mine", "search", "score", "--max_len", "64")
    assert inference.main(flags(tmp_path, *more)) == 1  # FlagEmbedding is not there
    assert order.count("compare") == 2 and order.count("search") == 2
    with (tmp_path / "rows.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["note"] != "failed"]
    assert [row["what"].split()[0] for row in rows] == ["groups", "groups", "exact", "exact", "groups", "groups"]
    assert "300 passages" in rows[2]["size"] and "600 passages" in rows[3]["size"]
    assert all(float(row["figure"]) > 0 for row in rows)
