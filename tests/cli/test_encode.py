"""The encode command: agreement with sentence-transformers, any number of ranks, kills, refusals, and every bad input named."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from encode_runs import BLOCK, TEXTS, content, encoded, refused, write_lines

from bge_ds import preprocess
from bge_ds.encoding import run
from bge_ds.encoding.vectors import open_vectors


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "BLOCK", BLOCK)
    monkeypatch.setenv("BGE_DS_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------------------ vectors


def test_vectors_equal_those_of_sentence_transformers(tmp_path, minilm_path):
    """Pooling, normalisation, prompt, title and truncation give what sentence-transformers gives, in the order of the input,
    with texts of all lengths in one block and a last block that is not full."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["a short one", "words of a long text " * 60, "中文 and English", "x", *TEXTS[:7]]
    source = write_lines(tmp_path / "c.jsonl", texts, title="On texts")
    vectors = encoded(minilm_path, source, tmp_path / "out", "--max_len", 200, "--passage_instruction_for_retrieval", "P: ")
    model = sentence_transformers.SentenceTransformer(str(minilm_path), device="cpu")
    model.max_seq_length = 200
    expected = model.encode([f"P: On texts {text}" for text in texts])
    np.testing.assert_allclose(vectors[:], expected, rtol=0, atol=1e-5)
    assert vectors.ids.to_pylist() == [f"d{i}" for i in range(len(texts))]
    assert vectors.manifest.settings.pooling == "mean" and len(vectors.manifest.blocks) == 2


def test_a_side_has_its_own_length_and_prompt(tmp_path, tiny_bert_path):
    """Queries are cut at 64 tokens by default, passages at 256 or the model's positions (130); other flags are refused."""
    source = write_lines(tmp_path / "c.jsonl", ["word " * 300])
    query = encoded(tiny_bert_path, source, tmp_path / "q", "--side", "query", "--query_instruction_for_retrieval", "find: ")
    passage = encoded(tiny_bert_path, source, tmp_path / "p")
    assert (query.manifest.counts["tokens"], passage.manifest.counts["tokens"]) == (64, 130)
    assert query.manifest.settings.prompt == "find: "


def test_types_and_dim_on_disk(tmp_path, tiny_bert_path):
    """float16, bfloat16 and int8 hold what float32 holds up to their rounding, cut vectors are of unit length again."""
    source = write_lines(tmp_path / "c.jsonl")
    full = encoded(tiny_bert_path, source, tmp_path / "float32")[:]
    cut = full[:, :12] / np.sqrt((full[:, :12].astype(np.float64) ** 2).sum(1, keepdims=True))
    for dtype, tolerance, stored in (
        ("float32", 1e-7, np.float32), ("float16", 2.0**-11, np.float16), ("bfloat16", 2.0**-8, np.uint16),
        ("int8", 0.5 / 127 + 1e-6, np.int8),
    ):  # fmt: skip
        folder = tmp_path / f"cut-{dtype}"
        vectors = encoded(tiny_bert_path, source, folder, "--dim", 12, "--dtype", dtype)
        assert vectors.shape == (30, 12)
        np.testing.assert_allclose(vectors[:], cut, rtol=0, atol=tolerance)
        assert np.load(folder / "vectors-000001.npy", mmap_mode="r").dtype == stored
    scale = np.load(tmp_path / "cut-int8/scales-000000.npy")
    np.testing.assert_allclose(scale, np.abs(cut[:BLOCK]).max(1) / 127, rtol=1e-5)
    np.testing.assert_array_equal(
        np.load(tmp_path / "cut-float16/vectors-000000.npy"), open_vectors(tmp_path / "cut-float32")[:8].astype(np.float16)
    )


# ------------------------------------------------------------------------------------------------------------- inputs


def compressed(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else zstandard.compress(data))
    return path


def test_every_kind_of_file_gives_the_same_vectors(tmp_path, tiny_bert_path):
    """Blocks that begin in the middle of a stream, a table or a file, or go from one file to the next, hold the same texts."""
    lines = write_lines(tmp_path / "c.jsonl")
    wanted = content(encoded(tiny_bert_path, lines, tmp_path / "lines").folder, but=("manifest.json",))
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    raw, parts = lines.read_bytes(), []
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=5)
    for n, (first, last) in enumerate([(0, 5), (5, 20), (20, 30)]):
        part = b"\n\n".join(raw.splitlines()[first:last])  # blank lines, and no end of the last
        parts.append(compressed(tmp_path / f"{n}.jsonl.gz", part) if n % 2 else tmp_path / f"{n}.jsonl")
        if not n % 2:
            parts[-1].write_bytes(b"\xef\xbb\xbf" + part)
    sources = [
        compressed(tmp_path / "c.jsonl.gz", raw),
        compressed(tmp_path / "c.jsonl.zst", raw),
        tmp_path / "c.parquet",
        parts,
    ]
    for n, source in enumerate(sources):
        folder = encoded(tiny_bert_path, source, tmp_path / f"out-{n}").folder
        assert content(folder, but=("manifest.json",)) == wanted, source
    renamed = [{"docno": int(row["_id"][1:]), "contents": row["text"]} for row in rows]
    pa.parquet.write_table(pa.Table.from_pylist(renamed), tmp_path / "renamed.parquet")
    columns = ("--columns", "text=contents", "_id=docno")
    vectors = encoded(tiny_bert_path, tmp_path / "renamed.parquet", tmp_path / "renamed", *columns)
    np.testing.assert_array_equal(vectors[:], open_vectors(tmp_path / "lines")[:])
    assert vectors.ids.to_pylist() == [str(i) for i in range(30)]


def test_shards_give_what_their_texts_give(tmp_path, tiny_bert_path):
    """Texts that were tokenized once get the vectors of the texts themselves: of pretrain shards the texts, of finetune
    shards each distinct passage once or the queries, cut further than they are stored, prompts included."""
    passages = list(dict.fromkeys(TEXTS))
    groups = [{"query": TEXTS[i], "pos": [TEXTS[i]], "neg": TEXTS[:i]} for i in reversed(range(30))]
    order = list(dict.fromkeys(text for group in groups for text in group["pos"] + group["neg"]))
    assert sorted(order) == sorted(passages)
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    made = ("--tokenizer", str(tiny_bert_path), "--num_proc", "1")
    prompt = ("--passage_instruction_for_retrieval", "p: ")
    source = str(write_lines(tmp_path / "texts.jsonl"))
    assert preprocess.main(["pretrain", "--input", source, "--output", str(tmp_path / "pre"), *made]) == 0
    words = ["finetune", "--input", str(tmp_path / "groups.jsonl"), "--output", str(tmp_path / "fine"), *made, *prompt]
    assert preprocess.main(words) == 0
    queries = [group["query"] for group in groups]
    for name, shards, texts, how in (
        ("pretrain", "pre", TEXTS, ("--max_len", 6)),
        ("passages", "fine", order, ("--max_len", 9, *prompt)),
        ("queries", "fine", queries, ("--side", "query", "--max_len", 7)),
    ):
        expected = encoded(tiny_bert_path, write_lines(tmp_path / "t.jsonl", texts), tmp_path / f"{name}-texts", *how)
        found = encoded(tiny_bert_path, tmp_path / shards, tmp_path / f"{name}-shards", *how)
        assert found.manifest.counts == expected.manifest.counts
        assert found.ids is None
        for block in range(4):
            file = f"vectors-{block:06d}.npy"
            assert (found.folder / file).read_bytes() == (expected.folder / file).read_bytes(), (name, block)


def test_shards_that_do_not_fit_are_refused(tmp_path, capsys, tiny_bert_path, minilm_path):
    """Another tokenizer, another prompt, a length beyond what was stored, or files beside shards: refused before encoding."""
    source, folder = write_lines(tmp_path / "texts.jsonl"), tmp_path / "shards"
    made = ("--tokenizer", str(tiny_bert_path), "--num_proc", "1", "--max_seq_length", "20")
    assert preprocess.main(["pretrain", "--input", str(source), "--output", str(folder), *made]) == 0
    for model, inputs, more, expected in (
        (minilm_path, folder, (), "another tokenizer"),
        (tiny_bert_path, folder, ("--passage_instruction_for_retrieval", "p: "), "holds the passage prompt ''"),
        (tiny_bert_path, folder, ("--max_len", 21), "a length of 21 is more than the 20 tokens"),
        (tiny_bert_path, [folder, source], (), "encode them one after the other"),
        (tiny_bert_path, folder, ("--allow_empty",), "--allow_empty has no effect on shards"),
    ):
        assert expected in refused(capsys, model, inputs, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"_id": "x", "text": ', "c.jsonl:10: not JSON"),
        (b"[1]", "c.jsonl:10: not a JSON object"),
        (b'{"_id": "x", "body": "t"}', 'c.jsonl:10: "text" is missing'),
        (b'{"_id": "x", "text": 3}', 'c.jsonl:10: "text" must be a string, not a number'),
        (b'{"_id": "x", "text": "t", "title": 3}', 'c.jsonl:10: "title" must be a string'),
        (b'{"_id": [], "text": "t"}', 'c.jsonl:10: "_id" must be a string or a whole number'),
        (b'{"text": "t"}', "c.jsonl:10: a line without an _id after others with one"),
        (b'{"_id": "x", "text": " "}', 'c.jsonl:10: "text" is an empty text: give it one, or --allow_empty'),
        (b'{"_id": "x", "text": "\xff"}', "c.jsonl:10: not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, capsys, line, expected):
    """The first bad line ends the command with its file and number before a model is loaded, and nothing is written."""
    lines = write_lines(tmp_path / "c.jsonl").read_bytes().splitlines()
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([*lines[:8], b"", line, *lines[8:]]))
    model = tmp_path / "model"
    helpers.make_tokenizer("wordpiece", model)
    helpers.tiny_config("bert").save_pretrained(model)  # no weights
    assert expected in refused(capsys, model, tmp_path / "c.jsonl", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "cache", "model"]


def test_other_mistakes_are_named(tmp_path, capsys, tiny_bert_path):
    """A path, a length, a dimension or a flag that cannot serve is one line; so is an output that holds something else."""
    source = write_lines(tmp_path / "c.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    for inputs, more, expected in (
        (tmp_path / "absent.jsonl", (), "no file"),
        ([source, tmp_path / "empty.jsonl"], (), "empty.jsonl: it holds no text"),
        (source, ("--max_len", 131), "--max_len 131 is more than the 130 positions"),
        (source, ("--dim", 33), "--dim 33 is more than the 32 features"),
        (source, ("--columns", "body=text"), "--columns body=text: give FIELD=COLUMN, FIELD one of _id, title, text"),
        (source, ("--query_instruction_for_retrieval", "q"), "has no effect with --side passage"),
    ):
        assert expected in refused(capsys, tiny_bert_path, inputs, tmp_path / "out", *more)
    vectors = encoded(tiny_bert_path, source, tmp_path / "vectors").folder
    assert "is that of vectors that bge_ds.encode wrote" in refused(capsys, tiny_bert_path, vectors, tmp_path / "out")
    assert "--output" in refused(capsys, tiny_bert_path, source, source)
    assert "notes.txt, which bge_ds.encode did not write" in refused(
        capsys, tiny_bert_path, source, tmp_path / "foreign", "--overwrite"
    )
    assert "--model_name_or_path" in refused(capsys, tmp_path / "no model", source, tmp_path / "out")
    assert "--model_name_or_path" in refused(capsys, tmp_path / "foreign", source, tmp_path / "out")  # a folder of notes
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.lock"))


def test_empty_texts_where_they_are_wanted(tmp_path, capsys, tiny_bert_path):
    """With --allow_empty a text of nothing has the vector of the special tokens, and the warning counts it."""
    source = write_lines(tmp_path / "c.jsonl", ["a", "", "b"])
    vectors = encoded(tiny_bert_path, source, tmp_path / "out", "--allow_empty")
    assert vectors.manifest.counts == {"texts": 3, "tokens": 8, "empty": 1}
    assert "1 of 3 texts are empty" in capsys.readouterr().err


def test_the_reader_is_numpys_and_help_needs_no_torch(tmp_path, tiny_bert_path):
    """What was written opens in a process that has neither torch nor this package's models, and --help answers at once."""
    folder = encoded(tiny_bert_path, write_lines(tmp_path / "c.jsonl"), tmp_path / "out").folder
    code = (
        "import sys; from bge_ds.encoding.vectors import open_vectors; from bge_ds import encode; encode.parser();"
        f"v = open_vectors({str(folder)!r}); print(v[3].shape, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=helpers.environment(PYTHONPATH=helpers.PYTHONPATH)
    )
    assert done.stdout.split("\n")[0] == "(32,) False False", done.stderr
    assert np.load(io.BytesIO((folder / "vectors-000000.npy").read_bytes())).shape == (BLOCK, 32)
