"""The evaluate command: known rankings, agreement with sentence-transformers, and every bad folder a clear error."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_ds import evaluate
from bge_ds.data import beir
from bge_ds.evaluation import retrieval
from bge_ds.evaluation.embedder import EmbeddingSettings

PASSAGES = {"p1": "cats purr", "p2": "dogs bark", "p3": "fish swim"}
QUERIES = {"q1": "what purrs", "q2": "what barks"}
QRELS = "query-id\tcorpus-id\tscore\nq1\tp1\t1\nq2\tp2\t1\n"


def write_set(folder: Path, passages=PASSAGES, queries=QUERIES, qrels: str = QRELS, ending: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if ending else open
    for name, texts in (("corpus.jsonl", passages), ("queries.jsonl", queries)):
        with opener(folder / (name + ending), "wt", encoding="utf-8") as out:
            out.writelines(json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
    with opener(folder / ("qrels.tsv" + ending), "wt", encoding="utf-8") as out:
        out.write(qrels)
    return folder


def fixed_vectors(table: dict[str, list[float]]):
    return lambda texts, side: torch.tensor([table[text] for text in texts], dtype=torch.float32)


def test_measures_of_a_known_ranking(tmp_path):
    """The right passage at rank 1 and at rank 2 gives (1 + 1/log2(3)) / 2 and (1 + 1/2) / 2: a shifted rank, a wrong
    join of ids or scores taken in ascending order would all give other numbers."""
    data = beir.read_folder(write_set(tmp_path / "set"))
    vectors = {"cats purr": [1, 0], "dogs bark": [0, 1], "fish swim": [0.8, 0.6]}
    vectors |= {"what purrs": [1, 0], "what barks": [0.7, 0.75]}
    values = retrieval.evaluate_set(data, fixed_vectors(vectors))
    assert values["nDCG@10"] == pytest.approx((1 + 1 / np.log2(3)) / 2, abs=1e-6)
    assert values["MRR@10"] == pytest.approx(0.75, abs=1e-6)
    assert values["Recall@100"] == 1.0


def test_measures_stop_at_their_cutoffs(tmp_path):
    """A relevant passage at rank 11 counts for Recall@100 and for nothing else; at rank 101 it counts for nothing."""
    passages = {f"p{i:03d}": f"text {i}" for i in range(150)}
    queries = {"eleventh": "eleven", "hundred and first": "far"}
    qrels = "eleventh\tp010\t1\nhundred and first\tp100\t1\n"
    data = beir.read_folder(write_set(tmp_path / "set", passages, queries, qrels))
    vectors = {f"text {i}": [1.0 - i / 1000] for i in range(150)} | {"eleven": [1.0], "far": [1.0]}
    values = retrieval.evaluate_set(data, fixed_vectors(vectors))
    assert (values["nDCG@10"], values["MRR@10"], values["Recall@100"]) == (0.0, 0.0, 0.5)


def test_search_in_blocks_and_tiles_is_exact(monkeypatch):
    """Blocks and tiles of odd sizes give what one full matrix product gives; a wrong row offset would shift ids."""
    monkeypatch.setattr(retrieval, "TILE", 7)
    generator = torch.Generator().manual_seed(0)
    queries_QD, passages_PD = (torch.randn(n, 16, generator=generator) for n in (23, 501))
    scores, rows = retrieval.search(queries_QD, passages_PD.split(37), kept=50)
    expected = (queries_QD @ passages_PD.T).topk(50)
    torch.testing.assert_close(scores, expected.values, rtol=1e-5, atol=1e-6)  # blocks may sum in another order
    assert torch.equal(rows, expected.indices)


@pytest.mark.parametrize("block", [1, 7, 40])
def test_equal_scores_come_in_the_order_of_the_corpus(block):
    """Ties, also those that the cut goes through, are broken by row whatever the blocks; 0.0 and -0.0 are equal; a vector
    that is no number comes last instead of first."""
    passages_PD = torch.tensor([[0.5], [1.0], [-0.0], [1.0], [-1.0], [0.0], [float("nan")], [0.5], [1.0], [-1.0]]).repeat(4, 1)
    queries_QD = torch.tensor([[1.0], [-2.0]])
    exact_QP = torch.nan_to_num(queries_QD @ passages_PD.T, nan=-torch.inf)
    expected = exact_QP.sort(dim=1, descending=True, stable=True)
    for kept in (5, 13, 40, 100):
        scores, rows = retrieval.search(queries_QD, passages_PD.split(block), kept)
        assert torch.equal(rows, expected.indices[:, :kept]) and torch.equal(scores, expected.values[:, :kept])


def test_the_measures_keep_the_order_of_equal_scores(tmp_path):
    """Three passages of one score: the first of the corpus is the first found, also where its id sorts last or first."""
    for relevant, reciprocal in (("p1", 1.0), ("p2", 0.5), ("p3", 1 / 3)):
        data = beir.read_folder(write_set(tmp_path / relevant, qrels=f"q1\t{relevant}\t1\n"))
        vectors = {text: [1.0] for text in [*PASSAGES.values(), *QUERIES.values()]}
        assert retrieval.evaluate_set(data, fixed_vectors(vectors))["MRR@10"] == pytest.approx(reciprocal, abs=1e-6)


def test_equal_texts_are_encoded_once_and_all_found(tmp_path):
    """A text that stands three times in a corpus takes three places of the ranking, in the order of the corpus, though two
    encodings of it might differ in the last bit."""
    passages = {"a": "cats purr", "b": "dogs bark", "c": "cats purr", "d": "fish swim", "e": "cats purr"}
    folder = write_set(tmp_path / "set", passages, {"q": "what purrs"}, "q\te\t1\n")
    data = beir.read_folder(folder)
    assert list(data.distinct()) == ["cats purr", "dogs bark", "fish swim"] and len(list(data.passages())) == 5
    run = retrieval.ranking(data, [[2, 0, 1]])
    assert sorted(run["q"], key=run["q"].get, reverse=True) == ["d", "a", "c", "e", "b"]
    vectors = {"cats purr": [1.0], "dogs bark": [0.0], "fish swim": [0.5], "what purrs": [1.0]}
    assert retrieval.evaluate_set(data, fixed_vectors(vectors))["MRR@10"] == pytest.approx(1 / 3, abs=1e-6)


def test_names_tell_folders_apart(tmp_path):
    """The names that the log and `--metric_for_best_model` use: never the same for two folders, never only `dev`."""
    names = beir.names_of([tmp_path / "debian" / "dev", tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "nq"])
    assert names == ["debian_dev", "a_x", "b_x", "nq"]
    twins = [tmp_path / top / "a" / "dev" for top in "cd"]
    assert beir.names_of(twins) == list(map(str, twins))
    with pytest.raises(ValueError, match="the same folder twice"):
        beir.names_of([tmp_path / "nq", tmp_path / "a" / ".." / "nq"])


def test_blocks_of_a_corpus_keep_their_order(tmp_path, monkeypatch):
    """Passages beyond the first block are found under their own ids."""
    monkeypatch.setattr(retrieval, "BLOCK", 2)
    data = beir.read_folder(write_set(tmp_path / "set", qrels="q1\tp3\t1\n"))
    vectors = {"cats purr": [0.0], "dogs bark": [0.1], "fish swim": [1.0], "what purrs": [1.0]}
    assert retrieval.evaluate_set(data, fixed_vectors(vectors))["MRR@10"] == 1.0


def test_titles_gz_and_nested_qrels(tmp_path):
    """A title goes before its text, `.gz` files and `qrels/test.tsv` are found, and queries without a relevant passage
    are counted, not scored as 0."""
    folder = write_set(tmp_path / "set", queries=QUERIES | {"q3": "unjudged"}, ending=".gz")
    (folder / "qrels").mkdir()
    (folder / "qrels.tsv.gz").rename(folder / "qrels/test.tsv.gz")
    with gzip.open(folder / "corpus.jsonl.gz", "at") as out:
        out.write('{"_id": "p4", "title": "Birds", "text": "sing"}\n')
    data = beir.read_folder(folder)
    assert list(data.passages())[-1] == "Birds sing"
    assert list(data.queries) == ["q1", "q2"] and data.unjudged == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("corpus.jsonl", '{"_id": "p1", "text": "a"}\nnot json\n', "corpus.jsonl:2: not JSON"),
        ("corpus.jsonl", '{"_id": "p1", "text": "a"}\n["p2"]\n', "corpus.jsonl:2: not a JSON object but a list"),
        ("corpus.jsonl", '{"_id": 1, "text": "a"}\n', "corpus.jsonl:1: _id must be a non-empty string"),
        ("corpus.jsonl", '{"_id": "p1"}\n', "corpus.jsonl:1: text"),
        ("corpus.jsonl", '{"_id": "p1", "text": "a"}\n\n{"_id": "p1", "text": "b"}\n', "corpus.jsonl:3: passage 'p1'"),
        ("corpus.jsonl", '{"_id": "p1", "text": "\\ud800"}\n', "corpus.jsonl:1: a text holds half of a surrogate"),
        ("corpus.jsonl", "", "corpus.jsonl: an empty corpus"),
        ("queries.jsonl", '{"_id": "q1", "text": " "}\n', "queries.jsonl:1: an empty query"),
        ("queries.jsonl", b'{"_id": "q1", "text": "\xff"}\n', "queries.jsonl:1: not UTF-8"),
        ("qrels.tsv", "query-id\tcorpus-id\tscore\nq1\tp9\t1\n", "qrels.tsv:2: passage 'p9'"),
        ("qrels.tsv", "q9\tp1\t1\n", "qrels.tsv:1: query 'q9'"),
        ("qrels.tsv", "q1 p1 1\n", "qrels.tsv:1: 1 tab-separated fields"),
        ("qrels.tsv", "q1\tp1\t1\nq1\tp2\tyes\n", "qrels.tsv:2: the score must be a whole number"),
        ("qrels.tsv", "q1\tp1\t0\n", "no query has a relevant passage"),
        ("qrels.tsv", None, "holds no qrels.tsv or qrels/test.tsv"),
    ],
)
def test_bad_folders_are_named(tmp_path, capsys, name, content, expected):
    """Each mistake in a folder ends the command with one line that names the file (and line), before a model loads."""
    folder = write_set(tmp_path / "set")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status = evaluate.main(["--model_name_or_path", str(tmp_path / "no model"), "--data", str(folder)])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert expected in error


def test_a_model_that_does_not_exist(tmp_path, capsys):
    """A mistyped model path is one line, not a traceback."""
    folder = write_set(tmp_path / "set")
    assert evaluate.main(["--model_name_or_path", str(tmp_path / "absent"), "--data", str(folder)]) == 2
    assert "error: --model_name_or_path" in capsys.readouterr().err


def settings_of(folder: Path, **given):
    return EmbeddingSettings.read(folder, **given)


def test_settings_come_from_flags_then_files_then_defaults(tmp_path, minilm_path):
    """A model trained with mean pooling and a prompt must not be judged with cls and none unless a flag asks for it."""
    bare = settings_of(tmp_path)
    assert (bare.pooling, bare.normalize, bare.query_prompt) == ("cls", True, "")
    assert "by default" in bare.sources[0]

    shutil.copytree(minilm_path / "1_Pooling", tmp_path / "1_Pooling")
    modules = json.loads((minilm_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))  # no Normalize
    prompts = {"prompts": {"query": "find: ", "document": "text: "}}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    stored = settings_of(tmp_path)
    assert (stored.pooling, stored.normalize) == ("mean", False)
    assert (stored.query_prompt, stored.passage_prompt) == ("find: ", "text: ")

    given = settings_of(tmp_path, pooling="cls", normalize=True, query_prompt="")
    assert (given.pooling, given.normalize) == ("cls", True)
    assert (given.query_prompt, given.passage_prompt) == ("", "text: ")


def test_vectors_equal_those_of_sentence_transformers(minilm_path):
    """Pooling, normalisation, prompt and truncation together give what sentence-transformers gives, at a length beyond
    the 128 tokens that this model's tokenizer file would cut at."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["a short one", "words of a long text " * 60, "中文 and English"]
    flags = ["--query_max_len", "200", "--query_instruction_for_retrieval", "Q: ", "--use_cpu"]
    encode = evaluate.load_embedder(
        evaluate.parser().parse_args(["--model_name_or_path", str(minilm_path), "--data", "d", *flags])
    )
    assert encode.effective()["pooling"] == "mean"
    model = sentence_transformers.SentenceTransformer(str(minilm_path), device="cpu")
    model.max_seq_length = 200
    expected = model.encode([f"Q: {text}" for text in texts], convert_to_tensor=True)
    # fp32 sums in another order; a cut at 128 or a lost prompt changes the first digits
    torch.testing.assert_close(encode(texts, "query"), expected, rtol=0, atol=2e-6)


def test_the_command_writes_a_table_and_json(tmp_path, capsys, minilm_path):
    """The printed table and the JSON file carry the same figures, for each of two folders of one name."""
    folders = [str(write_set(tmp_path / parent / "dev")) for parent in ("a", "b")]
    output = tmp_path / "scores" / "out.json"
    status = evaluate.main(["--model_name_or_path", str(minilm_path), "--data", *folders, "--output", str(output), "--use_cpu"])
    printed = capsys.readouterr().out
    written = json.loads(output.read_text())
    assert status == 0
    assert list(written["results"]) == folders
    assert written["results"][folders[0]]["nDCG@10"] == 1.0  # cats purr, dogs bark
    assert written["settings"]["pooling"] == "mean"
    assert printed.count("1.0000") == 6
    assert list(output.parent.iterdir()) == [output]  # no temporary file stays


def test_the_command_writes_its_rankings(tmp_path, minilm_path):
    """One TREC run for each kind of ranking, which evaluates to the figures that the command wrote."""
    folder = write_set(tmp_path / "dev")
    flags = ["--data", str(folder), "--output", str(tmp_path / "scores.json")]
    model = ["--model_name_or_path", str(minilm_path), "--use_cpu", "--bm25", "0.25", "--run_output", str(tmp_path / "runs")]
    assert evaluate.main([*flags, *model]) == 0
    own = json.loads((tmp_path / "scores.json").read_text())["results"]
    files = {f"{name}.trec" for name in own}
    assert files == {"dev.trec", "dev, BM25.trec", "dev, hybrid.trec"} == {path.name for path in (tmp_path / "runs").iterdir()}
    assert (tmp_path / "runs/dev.trec").read_text().split()[:4] == ["q1", "Q0", "p1", "1"]  # cats purr
    for name, values in own.items():
        assert evaluate.main([*flags, "--search_results", str(tmp_path / f"runs/{name}.trec")]) == 0
        again = json.loads((tmp_path / "scores.json").read_text())["results"]["dev"]
        assert {key: values[key] for key in again} == again
