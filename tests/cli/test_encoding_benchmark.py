"""The driver of the encoding benchmark: turns are paired, sides with other vectors are refused. FlagEmbedding is not run."""

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
    import encoding
    import own_encoding
    import run_encoding
    from sides import SideFailed

    order = []

    def ask_parts(run, asked, script):
        assert script == "own_encoding.py"
        order.append(asked["what"])
        return own_encoding.work(asked)

    def run_peer(setting, run, env, script, **more):
        assert script == "run_encoding.py"
        order.append(env)
        if env == "flagembedding":
            raise SideFailed("no such environment")
        return run_encoding.measure({"model": setting.model, "data": setting.data, **more, "output": str(run.fresh(env))})

    monkeypatch.setattr(encoding, "ask_parts", ask_parts)
    monkeypatch.setattr(encoding, "run_peer", run_peer)
    yield encoding, order
    for name in ("encoding", "own_encoding", "run_encoding", "data", "comparing", "rows", "sides", "watching"):
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
    encoding, order = driver
    assert encoding.main(flags(tmp_path)) == 1
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
    encoding, _ = driver

    def run_peer(setting, run, env, script, **more):
        np.save(run.fresh(env) / "vectors.npy", np.zeros((6, 32), np.float32))
        return {"seconds": 1.0, "peak_bytes": 1, "versions": {}}

    monkeypatch.setattr(encoding, "run_peer", run_peer)
    assert encoding.main(flags(tmp_path, "--repeats", "1")) == 1
    assert "not the same work" in capsys.readouterr().err
    assert encoding.main(flags(tmp_path, "--texts", "7")) == 1
    assert "has 6 different texts, --texts 7 are asked for" in capsys.readouterr().err and not (tmp_path / "rows.csv").exists()
