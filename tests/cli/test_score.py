"""The score command: agreement with transformers and sentence-transformers, filters, inputs, and every mistake named."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import helpers
import numpy as np
import pytest
import torch
from score_runs import BLOCK, GROUPS, make_decoder, make_teacher, read_groups, refused, scored, write_groups
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bge_ds import preprocess, score
from bge_ds.data.pairs import PASSAGE_PREFIX, PROMPT, QUERY_PREFIX
from bge_ds.evaluation.embedder import Embedder
from bge_ds.scoring import run

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "BLOCK", BLOCK)
    monkeypatch.setenv("BGE_DS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def pairs_of(groups=GROUPS) -> list[tuple[str, str]]:
    return [(group["query"], text) for group in groups for text in group["pos"] + group["neg"]]


def scores_of(groups: list[dict]) -> list[float]:
    return [score for group in groups for score in group["pos_scores"] + group["neg_scores"]]


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("max_len", [128, 40])
def test_scores_equal_those_of_transformers(tmp_path, family, max_len):
    """Padded pairs of the stock tokenizer and model have the same scores, whole and cut; all else of a line stays."""
    model = make_teacher(tmp_path / "model", family, max_position_embeddings=140)
    source = write_groups(tmp_path / "groups.jsonl")
    lengths = ("--max_len", max_len, "--query_max_len", 30)
    groups = scored(model, source, tmp_path / "out.jsonl", *lengths)
    tokenizer = AutoTokenizer.from_pretrained(model)
    stock = AutoModelForSequenceClassification.from_pretrained(model).eval()
    # A query has the room that --query_max_len gives it; the stock tokenizer cuts passages alone.
    queries = tokenizer([q for q, _ in pairs_of()], add_special_tokens=False)["input_ids"]
    assert max(map(len, queries)) <= 30
    queries, passages = zip(*pairs_of(), strict=True)
    inputs = tokenizer(
        list(queries), list(passages), truncation="only_second", max_length=max_len, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = stock(**inputs).logits[:, 0].tolist()
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(scores_of(groups), expected, rtol=0, atol=TOLERANCE)
    for group, given in zip(groups, GROUPS, strict=True):
        assert {key: group[key] for key in given} == given
        assert list(group) == [*given, "pos_scores", "neg_scores"]


def test_scores_equal_those_of_sentence_transformers(tmp_path, teacher):
    """Another program's cross-encoder, sigmoid included."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = write_groups(tmp_path / "groups.jsonl")
    model = sentence_transformers.CrossEncoder(str(teacher), device="cpu", max_length=128)
    for more, activation in ((), torch.nn.Identity()), (("--normalize",), torch.nn.Sigmoid()):
        groups = scored(teacher, source, tmp_path / f"{len(more)}.jsonl", "--max_len", 128, *more)
        expected = model.predict(pairs_of(), activation_fn=activation)
        np.testing.assert_allclose(scores_of(groups), expected, rtol=0, atol=TOLERANCE)


def test_decoders_answer_yes(tmp_path, capsys):
    """The logit of Yes after "A: query", "B: passage" and the prompt, in FlagEmbedding's layout, is the score."""
    model = make_decoder(tmp_path / "model")
    tokenizer, stock = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    groups = scored(model, write_groups(tmp_path / "groups.jsonl"), tmp_path / "out.jsonl", "--max_len", 100)
    assert "cross-encoder (logit of the token Yes)" in capsys.readouterr().err
    (yes,) = tokenizer("Yes", add_special_tokens=False)["input_ids"]
    newline, prompt = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", PROMPT))
    expected = []
    for query, passage in pairs_of():
        left, right = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (QUERY_PREFIX + query, PASSAGE_PREFIX + passage)
        )
        pair = [tokenizer.bos_token_id, *left[:75], *newline, *right[:100]][: 100 + len(newline) + len(prompt)]
        with torch.no_grad():
            expected.append(stock(torch.tensor([pair + newline + prompt])).logits[0, -1, yes].item())
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(scores_of(groups), expected, rtol=0, atol=TOLERANCE)


def test_an_embedder_gives_similarities(tmp_path, capsys, tiny_bert_path):
    """Inner products of its vectors, each side with its prompt; what was taken is said."""
    source, prompts = write_groups(tmp_path / "groups.jsonl"), {"query_prompt": "find: ", "passage_prompt": "p: "}
    words = ("--query_instruction_for_retrieval", "find: ", "--passage_instruction_for_retrieval", "p: ")
    groups = scored(tiny_bert_path, source, tmp_path / "out.jsonl", *words)
    assert "embedder, on cpu" in capsys.readouterr().err
    embedder = Embedder.load(tiny_bert_path, use_cpu=True, **prompts)
    queries, passages = zip(*pairs_of(), strict=True)
    expected = (embedder(list(queries), "query") * embedder(list(passages), "passage")).sum(1)
    np.testing.assert_allclose(scores_of(groups), expected.tolist(), rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------------------- filters


def test_filters_drop_by_score(tmp_path, capsys, teacher):
    """Low positives and high negatives go, with what stands beside them; a group without positives goes; all is counted."""
    groups = [group | {"pos": [*group["pos"], "fox"], "pos_id": ["a", "b"], "neg_scores": [9]} for group in GROUPS]
    source = write_groups(tmp_path / "groups.jsonl", groups)
    whole = scored(teacher, source, tmp_path / "whole.jsonl")
    low = sorted(score for group in whole for score in group["pos_scores"])[9]
    high = sorted(score for group in whole for score in group["neg_scores"])[6]
    capsys.readouterr()
    kept = scored(teacher, source, tmp_path / "kept.jsonl", "--min_pos_score", low, "--max_neg_score", high)
    expected, empty = [], 0
    for group in whole:
        found = dict(group)
        for side, good in (("pos", lambda x: x >= low), ("neg", lambda x: x <= high)):
            picked = [k for k, score in enumerate(group[f"{side}_scores"]) if good(score)]
            for key in (side, f"{side}_scores", *["pos_id"] * (side == "pos")):
                found[key] = [group[key][k] for k in picked]
        if found["pos"]:
            expected.append(found)
            empty += bool(group["neg"]) and not found["neg"]
    assert kept == expected and 0 < len(kept) < 10 and empty
    lost = sum(len(group["neg"]) for group in whole) - 7
    report = json.loads((tmp_path / "kept.jsonl.report.json").read_text())
    counts = report["counts"]
    assert counts.pop("tokens") > 0
    assert counts == {
        "groups": 10, "pairs": len(scores_of(whole)), "groups_dropped": 10 - len(kept), "pos_dropped": 9, "neg_dropped": lost,
        "groups_without_neg": empty,
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert f"dropped 9 positives, {lost} negatives, and {10 - len(kept)} groups" in printed


def test_normalized_scores_are_filtered_after_the_sigmoid(tmp_path, teacher):
    """A limit is compared with the score that is written."""
    source = write_groups(tmp_path / "groups.jsonl")
    raw = scored(teacher, source, tmp_path / "raw.jsonl")
    limit = sorted(1 / (1 + math.exp(-group["pos_scores"][0])) for group in raw)[5] - 1e-6
    kept = scored(teacher, source, tmp_path / "kept.jsonl", "--normalize", "--min_pos_score", limit)
    assert len(kept) == 5 and all(group["pos_scores"][0] >= limit for group in kept)


# -------------------------------------------------------------------------------------------------------------- inputs


def test_inputs_outputs_and_names_of_flagembedding(tmp_path, teacher):
    """Lines, packed lines and tables give the same output, packed or not; FlagEmbedding's flags mean the same."""
    import pyarrow as pa
    import pyarrow.parquet

    wanted = scored(teacher, write_groups(tmp_path / "groups.jsonl"), tmp_path / "out.jsonl", "--max_len", 60)
    assert scored(teacher, write_groups(tmp_path / "g.jsonl.gz"), tmp_path / "out.jsonl.gz", "--max_len", 60) == wanted
    rows = [{"question": group["query"], **{key: group[key] for key in group if key != "query"}} for group in GROUPS]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "g.parquet")
    table = scored(teacher, tmp_path / "g.parquet", tmp_path / "table.jsonl", "--max_len", 60, "--columns", "query=question")
    assert table == wanted
    words = ["--reranker_name_or_path", teacher, "--input_file", tmp_path / "groups.jsonl",
             "--output_file", tmp_path / "fe.jsonl", "--reranker_max_length", 60,
             "--reranker_query_max_length", 45, "--reranker_batch_size", 3,
             "--normalize", "False", "--use_bf16", "False", "--use_cpu"]  # fmt: skip
    assert score.main([str(word) for word in words]) == 0
    np.testing.assert_allclose(scores_of(read_groups(tmp_path / "fe.jsonl")), scores_of(wanted), rtol=0, atol=TOLERANCE)


def test_preprocessing_for_distillation_takes_the_output(tmp_path, teacher):
    """What was written is an input of finetune shards, scores and all."""
    scored(teacher, write_groups(tmp_path / "groups.jsonl"), tmp_path / "out.jsonl.gz")
    words = [
        "finetune",
        "--input",
        tmp_path / "out.jsonl.gz",
        "--output",
        tmp_path / "shards",
        "--tokenizer",
        teacher,
        "--num_proc",
        "1",
    ]
    assert preprocess.main([str(word) for word in words]) == 0
    from bge_ds.data.shards.shard_reader import open_folders

    assert all(lacking is None for _, lacking in open_folders([str(tmp_path / "shards")]).scored())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"query": "q", "pos": ', "groups.jsonl:6: not JSON"),
        (b'{"query": "q", "neg": ["n"]}', 'groups.jsonl:6: "pos" is missing'),
        (b'{"query": "q", "pos": [" "]}', 'groups.jsonl:6: "pos"[0] is an empty text'),
        (b'{"query": 1, "pos": ["p"]}', 'groups.jsonl:6: "query" must be a string'),
        (b'{"query": "q", "pos_ids": ["p"]}', 'groups.jsonl:6: "pos_ids" names passages of a corpus'),
    ],
)
def test_bad_lines_are_named(tmp_path, capsys, teacher, line, expected):
    """The first bad line ends the command before anything is written."""
    lines = write_groups(tmp_path / "groups.jsonl").read_bytes().splitlines()
    (tmp_path / "groups.jsonl").write_bytes(b"\n".join([*lines[:4], b"", line, *lines[4:]]))
    assert expected in refused(capsys, teacher, tmp_path / "groups.jsonl", tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*.lock"))


def test_other_mistakes_are_named(tmp_path, capsys, teacher, tiny_bert_path):
    """Flags without effect, lengths, models and outputs that cannot serve are one line."""
    source, out = write_groups(tmp_path / "groups.jsonl"), tmp_path / "out.jsonl"
    (tmp_path / "mine.jsonl").write_text("mine")
    for model, output, more, expected in (
        (teacher, out, ("--sentence_pooling_method", "cls"), "--sentence_pooling_method has no effect on"),
        (teacher, out, ("--prompt", "?"), "--prompt has no effect on"),
        (tiny_bert_path, out, ("--max_len", 20), "--max_len has no effect on"),
        (tiny_bert_path, out, ("--normalize",), "--normalize has no effect on"),
        (tiny_bert_path, out, ("--teacher", "cross-encoder"), "BertForMaskedLM, no cross-encoder"),
        (teacher, out, ("--max_len", 131), "--max_len 131 is more than the 130 positions"),
        (teacher, out, ("--max_len", 20, "--query_max_len", 17), "--query_max_len 17, --max_len 20: a query of 17 tokens"),
        (teacher, tmp_path / "mine.jsonl", (), "bge_ds.score did not write it"),
        (teacher, tmp_path, (), "is a folder"),
        (teacher, source, ("--overwrite",), "which is read: name another place"),
        (tmp_path / "absent", out, (), "--model_name_or_path"),
    ):
        assert expected in refused(capsys, model, source, output, *more)
    assert "which is read" in refused(capsys, teacher, tmp_path, tmp_path / "more/out.jsonl")
    assert "no file" in refused(capsys, teacher, tmp_path / "absent.jsonl", out)
    scored(teacher, source, out)
    assert "normalize: False there, True here" in refused(capsys, teacher, source, out, "--normalize")
    before = read_groups(out)
    assert scored(teacher, source, out, "--normalize", "--overwrite") != before
    assert scored(teacher, source, tmp_path / "mine.jsonl", "--overwrite") == before


def test_help_needs_no_torch():
    """--help answers at once."""
    code = "import sys; from bge_ds import score; score.parser(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=helpers.environment(PYTHONPATH=helpers.PYTHONPATH)
    )
    assert done.stdout.split("\n")[0] == "False False", done.stderr
