"""evaluate --rerank: rankings in the order of a cross-encoder's scores, beside those they were made of."""

from __future__ import annotations

import json

import numpy as np
import pytest
from score_runs import make_teacher
from test_evaluate import write_set

from bge_ds import evaluate
from bge_ds.data import beir
from bge_ds.evaluation.run_files import read_run
from bge_ds.scoring.rerank import load_reranker, rerank

PASSAGES = {f"p{n}": f"text of number {n} {'and so on ' * (n % 5)}" for n in range(12)}
QUERIES = {"q1": "the quick brown fox", "q2": "number seven"}
QRELS = "q1\tp3\t1\nq2\tp7\t2\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("reranker"))


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set", PASSAGES, QUERIES, QRELS)


def in_order_of(teacher, query: str, passages: list[str]) -> list[str]:
    """Each pair scored by itself."""
    scores = {
        p: teacher.score(teacher.read([QUERIES[query]], [PASSAGES[p]], np.array([0])), lambda *_: None)[0] for p in passages
    }
    return sorted(passages, key=lambda p: -scores[p])


@pytest.mark.parametrize("depth", [5, 100])
def test_the_first_passages_are_put_in_order(folder, model, depth):
    """The first ones come in the order of scores of pairs scored one by one, the others stay behind them as they were."""
    teacher = load_reranker(str(model), flag="--rerank", use_cpu=True)
    run = {query: {p: -float(n) for n, p in enumerate(PASSAGES)} for query in QUERIES}
    made = rerank(teacher, beir.read_folder(folder), run, depth)
    for query, found in made.items():
        expected = in_order_of(teacher, query, list(PASSAGES)[:depth])
        assert expected != list(PASSAGES)[:depth]
        assert list(found) == expected + list(PASSAGES)[depth:]
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_command_has_rows_before_and_after(tmp_path, capsys, folder, model, tiny_bert_path):
    """The embedder's rankings keep their figures; reranked ones have those of the rankings that are written."""
    words = ["--model_name_or_path", tiny_bert_path, "--data", folder, "--bm25", 0.25, "--use_cpu"]
    assert evaluate.main([str(word) for word in [*words, "--output", tmp_path / "plain.json"]]) == 0
    runs = tmp_path / "runs"
    words += ["--rerank", model, "--rerank_depth", 4, "--rerank_max_len", 60, "--run_output", runs]
    assert evaluate.main([str(word) for word in [*words, "--output", tmp_path / "both.json"]]) == 0
    plain, both = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "both"))
    names = ["set", "set, BM25", "set, hybrid"]
    assert list(both["results"]) == [name for own in names for name in (own, f"{own}, reranked")]
    assert both["rerank_settings"]["max_len"] == 60
    data = beir.read_folder(folder)
    for name in names:
        for measure in ("nDCG@10", "MRR@10", "Recall@100"):
            assert both["results"][name][measure] == plain["results"][name][measure]
        before, after = (list(read_run(runs / f"{label}.trec", data)[0]["q2"]) for label in (name, f"{name}, reranked"))
        assert sorted(before[:4]) == sorted(after[:4]) and before[4:] == after[4:]
    capsys.readouterr()
    again = [
        "--data",
        folder,
        "--search_results",
        runs / "set.trec",
        "--rerank",
        model,
        "--rerank_depth",
        4,
        "--rerank_max_len",
        60,
    ]
    assert evaluate.main([str(word) for word in [*again, "--use_cpu", "--output", tmp_path / "files.json"]]) == 0
    files = json.loads((tmp_path / "files.json").read_text())["results"]
    assert files["set, reranked"]["nDCG@10"] == both["results"]["set, reranked"]["nDCG@10"]


def test_flags_and_models_that_cannot_serve_are_named(capsys, folder, model, tiny_bert_path):
    """A depth without a reranker, one beyond what is kept, an embedder in its place, and a length beyond its positions."""
    for more, expected in (
        (("--rerank_depth", 4), "--rerank_depth has no effect without --rerank"),
        (("--rerank", model, "--rerank_depth", 101), "--rerank_depth 101: rankings of a model have 100"),
        (("--rerank", tiny_bert_path), "--rerank: "),
        (("--rerank", "absent/model"), "--rerank absent/model"),
        (("--rerank", model, "--rerank_max_len", 131), "--rerank_max_len 131 is more than the 130 positions"),
    ):
        words = ["--model_name_or_path", tiny_bert_path, "--data", folder, "--use_cpu", *more]
        assert evaluate.main([str(word) for word in words]) == 2
        assert expected in capsys.readouterr().err
