"""The mine command: what a plain search gives, duplicates, margins, filling, files of all kinds, every mistake named."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from mine_runs import PASSAGES, flags, groups, make_blocks_small, mined, read_lines, refused, report, write_lines

from bge_ds import api, mine
from bge_ds.encoding import run


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    make_blocks_small(monkeypatch, tmp_path / "cache")


def vector(text: str) -> np.ndarray:
    """Of small whole numbers, so that scores are exact and many are equal."""
    return np.random.default_rng(list(text.encode())).integers(-1, 2, 32).astype(np.float32)


class WholeNumbers:
    """An embedder whose vectors are `vector` of the text with its prompt."""

    def __init__(self, options, settings):
        self.prompt = settings.prompt

    def describe(self):
        return "in whole numbers"

    def tokenize(self, texts, side):
        return [list((self.prompt + text).encode()) for text in texts]

    def encode_ids(self, ids, side, tell):
        return torch.from_numpy(np.stack([vector(bytes(row.astype(np.uint8)).decode()) for row in ids]))


@pytest.fixture
def whole_numbers(monkeypatch):
    monkeypatch.setattr(run, "load_embedder", WholeNumbers)


def reference(listed, pool, first, last, limit=None, prompt="") -> list[list[str]]:
    """The allowed texts of each group, best first, by a plain search. limit: of a score, given the lowest positive's."""
    texts = list(dict.fromkeys(text.strip() for text in pool))
    vectors_PD, found = np.stack([vector(text) for text in texts]), []
    for group in listed:
        query_D = vector(group.get("prompt", prompt) + group["query"])
        positives = {text.strip() for other in listed if other["query"] == group["query"] for text in other["pos"]}
        lowest = min(float(vector(text) @ query_D) for text in positives)
        scores_P = vectors_PD @ query_D
        ranked = sorted(range(len(texts)), key=lambda row: (-scores_P[row], row))[first:last]
        kept = [row for row in ranked if texts[row] not in positives | {group["query"]}]
        found.append([texts[row] for row in kept if limit is None or scores_P[row] <= limit(lowest)])
    return found


def own_pool(listed) -> list[str]:
    return [text for group in listed for text in group["pos"] + group.get("neg", [])]


def test_negatives_are_those_of_a_plain_search_with_ties(tmp_path, tiny_bert_path, whole_numbers):
    """The best of the range, exactly, equal scores in the order of the pool, over several blocks of passages and of groups;
    no positive of any line of the query, nor the query, is among them; and all keys but the negatives stay."""
    listed = groups()
    source = write_lines(tmp_path / "g.jsonl", listed)
    how = ("--sampling", "top", "--no_fill", "--query_instruction_for_retrieval", "find: ")
    found = mined(tiny_bert_path, source, tmp_path / "mined.jsonl", *how)
    expected = reference(listed, own_pool(listed), 1, 15, prompt="find: ")
    assert [[text.strip() for text in group["neg"]] for group in found] == [texts[:4] for texts in expected]
    for group, before in zip(found, listed, strict=True):
        assert {**group, "neg": 0} == {**{k: v for k, v in before.items() if k != "neg_scores"}, "neg": 0}
    counts = report(tmp_path / "mined.jsonl")
    assert counts["counts"]["neg_scores_dropped"] == 1 and counts["counts"]["short"] == 0
    assert counts["dropped"]["positive"] == sum(14 - len(texts) for texts in expected) - counts["dropped"]["query"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mined.jsonl.report.json", "cache", "g.jsonl", "mined.jsonl"]


def test_random_negatives_are_from_the_range(tmp_path, tiny_bert_path, whole_numbers):
    """Sampled negatives are distinct allowed texts of the range; another seed draws others, the same seed the same bytes."""
    listed = groups()
    source, expected = write_lines(tmp_path / "g.jsonl", listed), reference(listed, own_pool(listed), 1, 15)
    found = [mined(tiny_bert_path, source, tmp_path / f"{n}.jsonl", "--seed", seed) for n, seed in enumerate((3, 3, 4))]
    assert found[0] == found[1] != found[2]
    for group, texts in zip(found[0], expected, strict=True):
        own = [text.strip() for text in group["neg"]]
        assert len(set(own)) == 4 and set(own) <= set(texts)


def test_margins_are_against_the_lowest_positive(tmp_path, capsys, tiny_bert_path, whole_numbers):
    """No negative is above the limit of the query's lowest-scoring positive, in any line of it, and the report says how many
    were dropped and who got fewer."""
    listed = groups()
    source = write_lines(tmp_path / "g.jsonl", listed)
    for name, flag, limit in (
        ("absolute", ("--absolute_margin", 2), lambda lowest: lowest - 2),
        ("relative", ("--relative_margin", 0.5), lambda lowest: lowest - 0.5 * abs(lowest)),
        ("most", ("--max_score", 3), lambda lowest: 3),
    ):
        output = tmp_path / f"{name}.jsonl"
        found = mined(tiny_bert_path, source, output, "--sampling", "top", "--no_fill", *flag)
        expected = reference(listed, own_pool(listed), 1, 15, limit)
        assert [[text.strip() for text in group["neg"]] for group in found] == [texts[:4] for texts in expected], name
        short = sum(len(texts) < 4 for texts in expected)
        made = report(output)
        assert made["counts"]["short"] == made["counts"]["fewer"] == short and made["counts"]["filled"] == 0
        everything = sum(map(len, reference(listed, own_pool(listed), 1, 15)))
        assert made["dropped"][flag[0][2:]] == everything - sum(map(len, expected)) > 0
        assert f"{short:,} groups got fewer than 4" in capsys.readouterr().out or not short
        filled = mined(tiny_bert_path, source, tmp_path / f"{name}-filled.jsonl", "--sampling", "top", *flag)
        for group, texts in zip(filled, expected, strict=True):
            query_D = vector(group.get("prompt", "") + group["query"])
            positives = {text for other in listed if other["query"] == group["query"] for text in other["pos"]}
            lowest = min(float(vector(text) @ query_D) for text in positives)
            assert [text.strip() for text in group["neg"]][: len(texts[:4])] == texts[:4]
            assert all(vector(text.strip()) @ query_D <= limit(lowest) for text in group["neg"])


def test_short_pools_are_filled_and_reported(tmp_path, tiny_bert_path, whole_numbers):
    """A candidate pool replaces the texts of the input; a range beyond it is filled with its other texts, none twice, none a
    positive; a pool that is too small gives what it has."""
    listed = groups()
    source = write_lines(tmp_path / "g.jsonl", listed)
    small = [PASSAGES[k] for k in (0, 1, 2, 40, 41, 42)]
    pool = write_lines(tmp_path / "p.jsonl", [{"text": text, "_id": k} for k, text in enumerate([*small, small[0]])])
    found = mined(tiny_bert_path, source, tmp_path / "mined.jsonl", "--candidate_pool", pool, "--range_for_sampling", "4-9")
    in_range, wanted = reference(listed, small, 4, 9), 0
    for group, texts in zip(found, in_range, strict=True):
        positives = {text for other in listed if other["query"] == group["query"] for text in other["pos"]}
        assert len(set(group["neg"])) == len(group["neg"]) == min(4, len(set(small) - positives))
        assert group["neg"][: len(texts)] == texts and set(group["neg"]) <= set(small) - positives
        wanted += len(group["neg"]) - len(texts)
    made = report(tmp_path / "mined.jsonl")["counts"]
    assert (made["pool"], made["filled"], made["short"]) == (6, wanted, 20)
    assert made["fewer"] == sum(len(group["neg"]) < 4 for group in found)


def test_vectors_are_the_models(tmp_path, minilm_path):
    """A real model with prompts: the best passage that is no positive is the one that sentence-transformers finds."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    listed = [{"query": text, "pos": [text.upper()], "neg": [text[: len(text) // 2]]} for text in helpers.SENTENCES]
    source = write_lines(tmp_path / "g.jsonl", listed)
    how = ("--range_for_sampling", "0-12", "--sampling", "top", "--query_instruction_for_retrieval", "find: ")
    found = mined(minilm_path, source, tmp_path / "mined.jsonl", *how, "--no_fill")
    model, pool = sentence_transformers.SentenceTransformer(str(minilm_path), device="cpu"), own_pool(listed)
    scores_QP = model.encode([f"find: {text}" for text in helpers.SENTENCES]) @ model.encode(pool).T
    for group, scores_P in zip(found, scores_QP, strict=True):
        ranked = [pool[k] for k in np.argsort(-scores_P)]
        assert group["neg"] == [text for text in ranked if text not in group["pos"]][:4]


def test_files_in_and_out(tmp_path, tiny_bert_path, whole_numbers):
    """Compressed lines, a table and a folder give the same groups; .gz and .zst outputs hold the lines of a plain one; and
    Python objects give what their file gives."""
    listed = groups()
    source = write_lines(tmp_path / "g.jsonl", listed)
    wanted = mined(tiny_bert_path, source, tmp_path / "mined.jsonl")
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(source.read_bytes().splitlines(keepends=True)[:9])))
    pa.parquet.write_table(
        pa.Table.from_pylist([group | {"neg": group.get("neg", [])} for group in listed[9:]]), parts / "b.parquet"
    )
    found = mined(tiny_bert_path, parts, tmp_path / "parts.jsonl")
    assert [(group["id"], group["neg"]) for group in found] == [(group["id"], group["neg"]) for group in wanted]
    for ending, unpacked in (
        ("gz", gzip.decompress),
        ("zst", lambda data: pa.input_stream(pa.BufferReader(data), "zstd").read()),
    ):
        output = tmp_path / f"packed.jsonl.{ending}"
        assert mine.main(flags(tiny_bert_path, source, output)) == 0
        assert unpacked(output.read_bytes()) == (tmp_path / "mined.jsonl").read_bytes()
    rules = {"range_for_sampling": (1, 15), "negative_number": 4}
    made = api.mine(listed, model_name_or_path=tiny_bert_path, output=tmp_path / "api.jsonl", use_cpu=True, **rules)
    assert read_lines(made) == wanted


def test_the_flags_of_hn_mine(tmp_path, capsys, tiny_bert_path, whole_numbers):
    """A command line of FlagEmbedding does the same; its flags without effect here are refused with what to do instead."""
    source = write_lines(tmp_path / "g.jsonl", groups())
    wanted = mined(tiny_bert_path, source, tmp_path / "mined.jsonl", "--query_max_len", 32)
    theirs = [
        "--embedder_name_or_path", tiny_bert_path, "--input_file", source, f"--output_file={tmp_path / 'theirs.jsonl'}",
        "--range_for_sampling", "1-15", "--negative_number", 4, "--embedder_query_max_length", 32, "--use_fp16", "False",
        "--search_batch_size", 3, "--pooling_method", "cls", "--normalize_embeddings", "True", "--use_cpu",
    ]  # fmt: skip
    assert mine.main([str(word) for word in theirs]) == 0
    assert read_lines(tmp_path / "theirs.jsonl") == wanted
    for more, words in (
        (("--devices", "cuda:0"), "--devices cuda:0 is a flag of hn_mine without effect here: start one rank"),
        (("--use_fp16",), "--use_fp16 is a flag of hn_mine"),
        (("--use_gpu_for_searching",), "--use_gpu_for_searching and --use_cpu exclude each other"),
    ):
        assert words in refused(capsys, flags(tiny_bert_path, source, tmp_path / "x.jsonl", *more))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"query": "q", "pos": ', "g.jsonl:3: not JSON"),
        (b'{"query": "q", "pos": []}', 'g.jsonl:3: "pos" is empty'),
        (b'{"query": "q", "pos": ["p"], "neg": "n"}', 'g.jsonl:3: "neg" must be a list of strings'),
        (b'{"query": "", "pos": ["p"]}', 'g.jsonl:3: "query" is an empty text'),
    ],
)
def test_bad_lines_are_named(tmp_path, capsys, tiny_bert_path, line, words):
    """The first bad line ends the command with its file and number, and leaves nothing behind."""
    lines = write_lines(tmp_path / "g.jsonl", groups()).read_bytes().splitlines()
    (tmp_path / "g.jsonl").write_bytes(b"\n".join([lines[0], b"", line, *lines[1:]]))
    assert words in refused(capsys, flags(tiny_bert_path, tmp_path / "g.jsonl", tmp_path / "mined.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "g.jsonl"]


def test_other_mistakes_are_named(tmp_path, capsys, tiny_bert_path):
    """Paths, flags and outputs that cannot serve are one line each, and nothing is overwritten."""
    source = write_lines(tmp_path / "g.jsonl", groups())
    empty = write_lines(tmp_path / "empty.jsonl", [])
    nameless = write_lines(tmp_path / "nameless.jsonl", [{"text": "a"}, {"body": "b"}])
    there = write_lines(tmp_path / "there.jsonl", [{"a": 1}])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    out = tmp_path / "x.jsonl"
    for given, output, more, words in (
        (source, tmp_path / "x.csv", (), "name a file that ends in .json"),
        (source, source, (), "is read as"),
        (source, there, (), "is there already: name another file, or give --overwrite"),
        (empty, out, (), "empty.jsonl: no line to read"),
        (tmp_path / "absent.jsonl", out, (), "no file"),
        (source, out, ("--candidate_pool", nameless), 'nameless.jsonl:2: "text" is missing'),
        (source, out, ("--candidate_pool", empty), "empty.jsonl: no line to read"),
        (source, out, ("--range_for_sampling", "9-3"), "--range_for_sampling 9-3"),
        (source, out, ("--max_score", "nan"), "--max_score nan"),
        (source, out, ("--probes", 3), "--probes has no effect"),
        (source, out, ("--seed", 3, "--sampling", "top", "--no_fill"), "--seed has no effect"),
        (source, out, ("--query_max_len", 500), "500 is more than the 130 positions"),
        (source, out, ("--work", tmp_path / "foreign"), "notes.txt, which bge_ds.mine did not write"),
    ):
        assert words in refused(capsys, flags(tiny_bert_path, given, output, *more)), words
    assert "--model_name_or_path" in refused(capsys, flags(tmp_path / "no model", source, out))
    assert (tmp_path / "foreign/notes.txt").read_text() == "mine" and read_lines(there) == [{"a": 1}]
    assert not out.exists() and not list(tmp_path.glob(".x*")) and not list(tmp_path.glob(".*.lock"))


def test_help_needs_no_torch():
    """--help answers before anything heavy is loaded."""
    code = "import sys; from bge_ds import mine; mine.parser(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=helpers.environment(PYTHONPATH=helpers.PYTHONPATH)
    )
    assert done.stdout.split("\n")[0] == "False False", done.stderr


def test_faiss_finds_nearly_the_same_and_says_how_nearly(tmp_path, capsys, monkeypatch, tiny_bert_path, whole_numbers):
    """With all lists searched the approximate index gives the texts of the exact one; with few, the measured recall says so.
    Where faiss is missing, the command says how to get it."""
    listed = [{"query": f"query {i}", "pos": [f"passage {i}"], "neg": [f"other {i} {k}" for k in range(20)]} for i in range(30)]
    source = write_lines(tmp_path / "g.jsonl", listed)
    approximate = ("--sampling", "top", "--index", "faiss")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        assert "pip install faiss-cpu" in refused(capsys, flags(tiny_bert_path, source, tmp_path / "x.jsonl", *approximate))
    pytest.importorskip("faiss")
    exact = mined(tiny_bert_path, source, tmp_path / "exact.jsonl", "--sampling", "top")
    full = mined(tiny_bert_path, source, tmp_path / "full.jsonl", *approximate, "--probes", 99)
    assert report(tmp_path / "full.jsonl")["recall"] == 1
    for group, other in zip(exact, full, strict=True):
        query_D = vector(group["query"])
        assert [vector(a) @ query_D for a in group["neg"]] == [vector(b) @ query_D for b in other["neg"]]
    capsys.readouterr()
    mined(tiny_bert_path, source, tmp_path / "few.jsonl", *approximate, "--probes", 1)
    recall = report(tmp_path / "few.jsonl")["recall"]
    assert 0.05 < recall < 0.9 and f"faiss found {recall:.1%} of the 15 best passages" in capsys.readouterr().out


def test_a_kept_work_folder_serves_other_rules(tmp_path, monkeypatch, capsys, tiny_bert_path, whole_numbers):
    """With --work nothing is encoded a second time: other ranks and margins take the vectors that are there."""
    source = write_lines(tmp_path / "g.jsonl", groups())
    first = mined(tiny_bert_path, source, tmp_path / "a.jsonl", "--work", tmp_path / "work")
    monkeypatch.setattr(run, "load_embedder", None)
    other = mined(tiny_bert_path, source, tmp_path / "b.jsonl", "--work", tmp_path / "work", "--range_for_sampling", "20-40")
    assert mined(tiny_bert_path, source, tmp_path / "c.jsonl", "--work", tmp_path / "work") == first != other
    words = flags(tiny_bert_path, source, tmp_path / "d.jsonl", "--work", tmp_path / "work", "--query_max_len", "20")
    assert "holds the work of another job (other query max_len)" in refused(capsys, words)
    assert json.loads((tmp_path / "work/job.json").read_text())["counts"]["groups"] == 20
