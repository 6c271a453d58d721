"""Rankings as files: measures against sums written out, what is written is read back in order, bad files named by line."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch

from bge_ds import evaluate
from bge_ds.data import beir
from bge_ds.evaluation import retrieval, run_files

PASSAGES = [f"p{n}" for n in range(6)]
QRELS = {"q1": {"p1": 1, "p2": 2}, "q2": {"p3": 1}, "q4": {"p0": 1}}
RUN = {"q1": {"p0": 9.0, "p2": 7.5, "p1": 7.0}, "q2": {"p4": 3.0, "p3": 2.0}, "q3": {"p5": 1.0}}


def write_set(folder: Path, copies: bool = False) -> Path:
    """q3 has no relevant passage. copies: all passages but p0 and p1 have one text."""
    folder.mkdir(parents=True)
    texts = {name: "the same" if copies and name > "p1" else f"text {name}" for name in PASSAGES}
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": k, "text": t}) + "\n" for k, t in texts.items()))
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{n}", "text": f"text p{n} the"}) + "\n" for n in range(1, 5))
    )
    rows = [f"{query}\t{passage}\t{grade}\n" for query, found in QRELS.items() for passage, grade in found.items()]
    (folder / "qrels.tsv").write_text("".join(rows))
    return folder


def as_trec(run: dict) -> str:
    """Lines in a mixed order, with ranks that mean nothing."""
    return "".join(f"{q} Q0 {p} 1 {score} other\n" for q, found in run.items() for p, score in sorted(found.items()))


def ndcg(gains: list[int], ideal: list[int]) -> float:
    return sum(g / math.log2(i + 2) for i, g in enumerate(gains)) / sum(g / math.log2(i + 2) for i, g in enumerate(ideal))


@pytest.mark.parametrize("form", ["trec", "trec.gz", "json", "json.gz", "flagembedding.json"])
def test_rankings_of_others_are_measured(tmp_path, capsys, form):
    """Every form gives the same figures: by score, a query without results as 0, one without relevant passages left out."""
    text = as_trec(RUN) if "trec" in form else json.dumps(RUN, indent=4)
    if form.startswith("flag"):
        text = json.dumps({"eval_name": "x", "model_name": "y", "split": "test", "search_results": RUN})
    path = tmp_path / f"run.{form}"
    path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    output = tmp_path / "scores.json"
    folder = write_set(tmp_path / "set")
    assert evaluate.main(["--search_results", str(path), "--data", str(folder), "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    values = written["results"]["set"]
    assert values["nDCG@10"] == pytest.approx((ndcg([0, 2, 1], [2, 1]) + ndcg([0, 1], [1]) + 0) / 3, abs=1e-6)
    assert values["MRR@10"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3, abs=1e-6)
    assert values["Recall@100"] == pytest.approx(2 / 3, abs=1e-6)
    said = capsys.readouterr()
    assert "1 queries are not judged in set and were left out" in said.err
    assert "1 queries of set have no passages and count as 0" in said.err
    assert "0.5" not in said.out and f"{values['nDCG@10']:.4f}" in said.out
    assert written["search_results"] == [str(path)] and "model" not in written


def test_equal_scores_are_ranked_as_trec_eval_does(tmp_path):
    """Figures that another program printed for the same file must come out again; and no later line wins by its place."""
    folder = write_set(tmp_path / "set")
    run = {"q1": dict.fromkeys(PASSAGES, 1.0), "q2": dict.fromkeys(PASSAGES, 1.0)}
    (tmp_path / "run.trec").write_text(as_trec(run))
    data = beir.read_folder(folder)
    read, _ = run_files.read_run(tmp_path / "run.trec", data)
    theirs = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], QRELS, list(ir_measures.read_trec_run(as_trec(run))))
    assert retrieval.measure(data, read)["nDCG@10"] == pytest.approx(theirs[ir_measures.nDCG @ 10], abs=1e-6)
    assert list(run_files.in_order(read)["q1"]) == PASSAGES[::-1]


def test_a_written_run_gives_the_same_measures_and_scores(tmp_path):
    """Equal texts have equal scores: another program would reorder them, and so measure something else."""
    data = beir.read_folder(write_set(tmp_path / "set", copies=True))
    generator = torch.Generator().manual_seed(0)
    vectors = {text: torch.randn(4, generator=generator) for text in (*data.distinct(), *data.queries.values())}

    def encode(texts: list[str], side: str) -> torch.Tensor:
        return torch.stack([vectors[text] for text in texts])

    found = retrieval.rank_with(data, encode, 0.5)
    assert list(found) == ["vectors", "BM25", "hybrid"]
    for kind, found_Q in found.items():
        path = tmp_path / "runs" / f"{kind}.trec"
        run_files.write_run(path, run_files.of_found(data, found_Q), "my model")
        lines = [line.split(" ") for line in path.read_text().splitlines()]
        assert all(len(line) == 6 and line[1] == "Q0" and line[5] == "my_model" for line in lines)
        for query in data.queries:
            own = [line for line in lines if line[0] == query]
            assert [int(line[3]) for line in own] == list(range(1, len(own) + 1))
            scores = np.array([line[4] for line in own], np.float32)
            assert (np.diff(scores) < 0).all()  # strictly, in fp32, as trec_eval reads them
            if kind == "vectors":
                assert len(own) == len(PASSAGES)
                text_of = dict(zip(data.passage_ids, data.passages(), strict=True))
                products = [float(vectors[data.queries[query]] @ vectors[text_of[line[2]]]) for line in own]
                np.testing.assert_allclose(scores, products, rtol=1e-6, atol=1e-6)
        read, _ = run_files.read_run(path, data)
        wanted = retrieval.measure(data, retrieval.ranking(data, found_Q))
        assert retrieval.measure(data, read) == wanted
        theirs = ir_measures.calc_aggregate(retrieval.MEASURES, data.qrels, list(ir_measures.read_trec_run(str(path))))
        assert [round(theirs[m], 6) for m in retrieval.MEASURES] == list(wanted.values())


def test_runs_of_several_rankings(tmp_path, capsys):
    """Several files for one folder are rows of their own, and each is written as a run; equal scores keep their order."""
    folder = write_set(tmp_path / "set")
    for name, run in (("a", RUN), ("b", {"q1": {"p1": 1, "p5": 1}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    files = ["a.json", "b.json"]
    flags = ["--data", str(folder), "--run_output", str(tmp_path / "runs")]
    assert evaluate.main(["--search_results", *(str(tmp_path / file) for file in files), *flags]) == 0
    printed = capsys.readouterr().out
    assert all(f"set, {file}" in printed for file in files)
    first, second = sorted((tmp_path / "runs").iterdir())
    assert (first.name, second.name) == ("set, a.json.trec", "set, b.json.trec")
    assert [line.split()[:4] for line in first.read_text().splitlines()][:3] == [
        ["q1", "Q0", "p0", "1"], ["q1", "Q0", "p2", "2"], ["q1", "Q0", "p1", "3"],
    ]  # fmt: skip
    assert second.read_text().startswith("q1 Q0 p5 1 1.0 b\nq1 Q0 p1 2 0.99999994 b\n")


BAD = {
    "q1 Q0 p1 1 0.5\n": ":1: 5 fields, not the 6 of a TREC run",
    "q1 Q0 p1 1 0.5 x\n\nq1 Q0 p9 2 0.4 x\n": ":3: passage 'p9' is not in the corpus",
    "q1 Q0 p1 1 0.5 x\nq1 Q0 p1 2 0.4 x\n": ":2: passage 'p1' was given before for query 'q1'",
    "q1 Q0 p1 1 high x\n": ":1: the score of passage 'p1' must be a finite number, not 'high'",
    "q1 Q0 p1 1 nan x\n": ":1: the score of passage 'p1' must be a finite number",
    "q7 Q0 p1 1 0.5 x\n": ": none of its 1 queries is one that set has relevant passages for",
    "": ": none of its 0 queries",
    '{"q1": {"p1": 0.5},\n "q2": }': ":2: not JSON",
    '{"q1": {"p9": 0.5}}': ": query 'q1': passage 'p9' is not in the corpus",
    '{"q1": {"p1": true}}': ": query 'q1': the score of passage 'p1' must be a finite number, not True",
    '{"q1": {"p1": NaN}}': ": query 'q1': the score of passage 'p1' must be a finite number",
    '{"q1": ["p1"]}': ": query 'q1' must have an object {passage: score}",
    '{"q1": {"p1": 1, "p1": 2}}': ": 'p1' stands twice in one object",
    '{"search_results": []}': ': "search_results" must be an object',
}


@pytest.mark.parametrize("content", BAD)
def test_bad_files_are_named(tmp_path, capsys, content):
    """One line with the file, and the line or the query; the exit status of a mistake; no figures."""
    path = tmp_path / "run"
    path.write_text(content)
    assert evaluate.main(["--search_results", str(path), "--data", str(write_set(tmp_path / "set"))]) == 2
    said = capsys.readouterr()
    assert f"{path}{BAD[content]}" in said.err and said.err.count("\n") == 1 and not said.out


def test_other_encodings_are_named(tmp_path):
    path = tmp_path / "run"
    path.write_bytes("q1 Q0 p1 1 0.5 übung\n".encode("latin-1"))
    with pytest.raises(ValueError, match="run:1: not UTF-8"):
        run_files.read_run(path, beir.read_folder(write_set(tmp_path / "set")))


def test_flags_that_exclude_each_other(tmp_path, capsys):
    """What would have no effect, or has no target, is refused before anything is read."""
    folder, run = str(write_set(tmp_path / "set")), str(tmp_path / "run")
    Path(run).write_text(as_trec(RUN))
    given = ["--search_results", run, "--data", folder]
    cases = (
        (["--data", folder], "--model_name_or_path is missing: name a model, or give rankings as --search_results"),
        ([*given, "--model_name_or_path", "m"], "--model_name_or_path has no effect with --search_results"),
        ([*given, "--query_instruction_for_retrieval", "q: "], "--query_instruction_for_retrieval has no effect"),
        ([*given, "--bm25", "0.2"], "--bm25 has no effect"),
        ([*given, "--use_cpu"], "--use_cpu has no effect"),
        ([*given[:2], run, "--data", folder, str(tmp_path), "x"], "--search_results names 2 files for 3 folders"),
        ([*given, folder], "the same folder twice"),
        ([*given, "--run_output", run], "is a file: name a folder"),
        (["--search_results", "none", "--data", folder], "--search_results none: no such file"),
    )
    for flags, said in cases:
        assert evaluate.main(flags) == 2
        assert said in capsys.readouterr().err


def test_ids_that_a_run_cannot_hold(tmp_path, capsys):
    """A space in an id would make a line of seven fields."""
    folder = write_set(tmp_path / "set")
    with open(folder / "corpus.jsonl", "a") as corpus:
        corpus.write(json.dumps({"_id": "p 7", "text": "seven"}) + "\n")
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    flags = ["--search_results", str(tmp_path / "run.json"), "--data", str(folder)]
    assert evaluate.main(flags) == 0
    assert evaluate.main([*flags, "--run_output", str(tmp_path / "runs")]) == 2
    assert "set has the passage id 'p 7', and a TREC run parts its fields at spaces" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
