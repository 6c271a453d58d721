"""What the preprocess command reads: every form of input, columns by other names, passages named by id."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_preprocess import GROUPS, contents, run, write

from bge_ds import preprocess
from bge_ds.data.preprocess import input_files, prepare, validate
from bge_ds.data.shards import integrity, shard_reader

FULL = [line | {"pos_scores": [0.5], "neg_scores": [0.25, 1, 2], "type": "sym", "prompt": f"p{i % 2}: "}
        for i, line in enumerate(GROUPS)]  # fmt: skip


def write_all(folder, rows) -> list[str]:
    """The same rows in every form that is read from files."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir(exist_ok=True)
    names = [write(folder / "a.jsonl", rows), write(folder / "b.jsonl.gz", rows), str(folder / "c.jsonl.zst")]
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress((folder / "a.jsonl").read_bytes()))
    table = pa.Table.from_pylist(rows)
    pa.parquet.write_table(table, folder / "d.parquet", row_group_size=9)
    with pa.ipc.new_file(str(folder / "e.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=11)
    with pa.ipc.new_stream(str(folder / "f.arrow"), table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset.from_list(rows).save_to_disk(folder / "g")
    return [*names, *(str(folder / name) for name in ("d.parquet", "e.arrow", "f.arrow", "g"))]


def rows_of(folder) -> list:
    """All that a reader gives of a folder, passages by their ids."""
    data = shard_reader.open_folder(folder)
    found = []
    for row in range(len(data)):
        group = data.group(row)
        texts = [[data.passage(p).tolist() for p in rows] for rows in (group.pos, group.neg)]
        scores = [None if s is None else s.tolist() for s in (group.pos_scores, group.neg_scores)]
        found.append((group.query.tolist(), texts, scores, data.notes(row)))
    return found


def test_every_form_gives_the_same_rows(tmp_path, tiny_tokenizer_path):
    """Scores, type and prompt are kept by every form; the rows are those of the plain JSON lines."""
    found = []
    for i, name in enumerate(write_all(tmp_path / "in", FULL)):
        for bytes_ in ("500", str(1 << 30)):
            output = tmp_path / f"s{i}-{bytes_}"
            assert run("finetune", name, output, tiny_tokenizer_path, "--shard_bytes", bytes_) == 0
            found.append(rows_of(output))
    assert (
        all(rows == found[0] for rows in found)
        and found[0][0][3] == ("sym", "p0: ")
        and found[0][0][2] == [[0.5], [0.25, 1, 2]]
    )


def test_columns_of_other_names(tmp_path, tiny_tokenizer_path):
    """`--columns` renames, and a plain string for a list of texts is a list of one: hub sets of triplets need no rewriting."""
    triplets = [{"anchor": f"question {i}", "positive": f"answer {i}", "negative": f"other {i}", "pos": 3} for i in range(40)]
    plain = [{"query": f"question {i}", "pos": [f"answer {i}"], "neg": [f"other {i}"]} for i in range(40)]
    assert run("finetune", write(tmp_path / "p.jsonl", plain), tmp_path / "plain", tiny_tokenizer_path) == 0
    names = ["--columns", "query=anchor", "pos=positive", "neg=negative"]
    for i, name in enumerate(write_all(tmp_path / "in", triplets)):
        assert run("finetune", name, tmp_path / f"s{i}", tiny_tokenizer_path, *names) == 0
        assert rows_of(tmp_path / f"s{i}") == rows_of(tmp_path / "plain")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["text"], "--columns text: give FIELD=COLUMN, FIELD one of text"),
        (["query=a"], "--columns query=a: give FIELD=COLUMN, FIELD one of text"),
        (["text=a", "text=b"], "each field once"),
        (["text=body"], r"a\.jsonl:1: \"text\" is missing; the line has 'words'"),
    ],
)
def test_wrong_columns_are_one_line(tmp_path, tiny_tokenizer_path, capsys, names, message):
    """A column that is not there is named with what is there."""
    given = write(tmp_path / "a.jsonl", [{"words": "x"}])
    assert run("pretrain", given, tmp_path / "s", tiny_tokenizer_path, "--columns", *names) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_hub_sets_by_name(tmp_path, tiny_tokenizer_path, monkeypatch):
    """A set of the hub, here a local one, is streamed; parts of it are merged like those of files."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    texts = [{"content": f"the lazy dog {i}"} for i in range(90)]
    for name, part in (("train-0", texts[:50]), ("train-1", texts[50:])):
        write(tmp_path / "set" / f"{name}.jsonl", part)
    plain = write(tmp_path / "a.jsonl", [{"text": text["content"]} for text in texts])
    name, how = f"hf://{tmp_path / 'set'}@train", ["--columns", "text=content", "--shard_bytes", "400"]
    assert run("pretrain", plain, tmp_path / "plain", tiny_tokenizer_path) == 0
    assert run("pretrain", name, tmp_path / "hub", tiny_tokenizer_path, *how) == 0
    one, two = shard_reader.open_folder(tmp_path / "plain"), shard_reader.open_folder(tmp_path / "hub")
    assert [two.ids(row).tolist() for row in range(90)] == [one.ids(row).tolist() for row in range(90)]
    assert [source.rows for source in two.manifest.sources] == [(0, 50), (50, 90)]
    parts = [str(tmp_path / f"p{i}") for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        assert run("pretrain", name, part, tiny_tokenizer_path, *how, "--partition", f"{i}/2") == 0
    assert preprocess.main(["merge", *parts, "--output", str(tmp_path / "m")]) == 0
    assert contents(tmp_path / "m") == contents(tmp_path / "hub")


# ------------------------------------------------------------------------------------------------------------ corpus

CORPUS = [{"_id": f"d{i}", "title": "fox" if i % 2 else "", "text": f"the lazy dog {i}"} for i in range(60)]
NAMED = [
    {"query": f"question {i}", "pos_ids": [f"d{i}"], "neg_ids": [f"d{(i * 7 + j) % 60}" for j in (1, 2)], "neg_scores": [i, 1]}
    for i in range(50)
]


def test_groups_name_passages_of_a_corpus(tmp_path, minilm_path, monkeypatch):
    """A corpus is stored once, as it is; groups refer to it by row, over segments, processes and parts alike."""
    monkeypatch.setattr(input_files, "BLOCK_BYTES", 500)
    corpus = [write(tmp_path / "c1.jsonl", CORPUS[:35]), write(tmp_path / "c2.jsonl.gz", CORPUS[35:])]
    given = write(tmp_path / "a.jsonl", NAMED)
    how = ["--corpus", *corpus, "--shard_bytes", "600"]
    assert run("finetune", given, tmp_path / "s", minilm_path, *how, "--num_proc", "2") == 0
    data = shard_reader.open_folder(tmp_path / "s")
    assert (len(data), data.num_passages) == (50, 60) and integrity.verify_folder(tmp_path / "s") == []
    assert [source.rows for source in data.manifest.corpus] == [(0, 35), (35, 60)]
    tokenizer = validate.load_tokenizer(minilm_path)
    for row, line in enumerate(NAMED):
        group = data.group(row)
        assert [f"d{p}" for p in group.pos] == line["pos_ids"] and [f"d{p}" for p in group.neg] == line["neg_ids"]
        assert group.neg_scores.tolist() == line["neg_scores"]
    for row, entry in enumerate(CORPUS):
        wanted = f"{entry['title']} {entry['text']}".strip()
        assert tokenizer.decode(data.passage(row), skip_special_tokens=True) == wanted
    parts = [str(tmp_path / f"p{i}") for i in (1, 2, 3)]
    for i, part in enumerate(parts, 1):
        assert run("finetune", given, part, minilm_path, *how, "--partition", f"{i}/3") == 0
    assert preprocess.main(["merge", *parts, "--output", str(tmp_path / "m")]) == 0
    assert contents(tmp_path / "m") == contents(tmp_path / "s")


@pytest.mark.parametrize(
    ("corpus", "lines", "message"),
    [
        (CORPUS, [*NAMED, NAMED[0] | {"neg_ids": ["d1", "nowhere"]}], r'a\.jsonl:51: "neg_ids"\[1\] \'nowhere\' is no _id'),
        ([*CORPUS, CORPUS[3]], NAMED, r"c\.jsonl:61: its _id is that of .*c\.jsonl:4 already"),
        ([*CORPUS, {"_id": "x", "text": "\u200b"}], NAMED, r'c\.jsonl:61: "text" is an empty text to this tokenizer'),
        (CORPUS, GROUPS, r'a\.jsonl:1: "pos" holds texts: with --corpus'),
        (CORPUS, [{"query": "q", "pos_ids": "d1"}], r'a\.jsonl:1: "pos_ids" must be a list'),
        (None, NAMED, r'a\.jsonl:1: "pos_ids" names passages of a corpus: give its files by --corpus'),
    ],
)
def test_wrong_ids_are_named(tmp_path, minilm_path, capsys, corpus, lines, message):
    """An id that is missing or given twice is told with file and line, and nothing is written."""
    given, more = write(tmp_path / "a.jsonl", lines), []
    if corpus is not None:
        more = ["--corpus", write(tmp_path / "c.jsonl", corpus)]
    assert run("finetune", given, tmp_path / "s", minilm_path, *more) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
    assert not (tmp_path / "s").exists()


# -------------------------------------------------------------------------------------------------------- round trips

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
A_TEXT = st.builds(lambda text, times: "fox " + text * times, ANY_TEXT, st.sampled_from([1, 1, 1, 60]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(
        st.fixed_dictionaries(
            {"query": A_TEXT, "pos": st.lists(A_TEXT, min_size=1, max_size=3), "neg": st.lists(A_TEXT, max_size=3)},
            optional={"type": ANY_TEXT, "prompt": st.sampled_from(["", "p: "])},
        ),
        min_size=2,
        max_size=12,
    ),
    lengths=st.tuples(st.integers(8, 40), st.integers(8, 60)),
    wide=st.booleans(),
    cut=st.sampled_from([1500, 1 << 20]),
)
def test_any_group_survives_the_round_trip(tmp_path_factory, tiny_tokenizer_path, groups, lengths, wide, cut):
    """Any Unicode, no negatives, very long texts, any length, 16 and 32-bit ids: rows are the tokenizer's own."""
    folder = tmp_path_factory.mktemp("r")
    groups[-1]["neg"] = [*groups[-1]["neg"], "something to compare"]
    tokenizer = validate.load_tokenizer(tiny_tokenizer_path)
    core = validate.core(tokenizer)
    if wide:
        core = dataclasses.replace(core, vocab_size=70000)
    job = prepare.make_settings("finetune", query_max_len=lengths[0], passage_max_len=lengths[1]), core
    source = input_files.Source(folder / "a.jsonl")
    write(source.path, groups)
    preprocess.build(folder / "s", [source], job, num_proc=1, shard_bytes=cut, say=lambda line: None)
    data = shard_reader.open_folder(folder / "s")
    assert len(data) == len(groups) and data.group(0).query.dtype == (np.int32 if wide else np.uint16)

    def ids(texts, length):
        return tokenizer(texts, truncation=True, max_length=length)["input_ids"] if texts else []

    for row, line in enumerate(groups):
        group = data.group(row)
        assert [group.query.tolist()] == ids([(line.get("prompt") or "") + line["query"]], lengths[0])
        for name, rows in (("pos", group.pos), ("neg", group.neg)):
            assert [data.passage(p).tolist() for p in rows] == ids(line[name], lengths[1])
            hashes = [validate.xxhash.xxh3_64_intdigest(text.encode()) for text in line[name]]
            assert data.hashes(rows).tolist() == hashes
        assert data.notes(row) == (line.get("type"), line.get("prompt"))


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(A_TEXT, min_size=1, max_size=12), length=st.integers(3, 60), wide=st.booleans())
def test_any_text_survives_the_round_trip(tmp_path_factory, tiny_tokenizer_path, texts, length, wide):
    """Texts of pre-training: ids cut at any length, and a word for each, never falling."""
    folder = tmp_path_factory.mktemp("r")
    tokenizer = validate.load_tokenizer(tiny_tokenizer_path)
    core = validate.core(tokenizer)
    if wide:
        core = dataclasses.replace(core, vocab_size=70000)
    source = input_files.Source(folder / "a.jsonl")
    source.path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = prepare.make_settings("pretrain", max_seq_length=length), core
    preprocess.build(folder / "s", [source], job, num_proc=1, shard_bytes=1500, say=lambda line: None)
    data = shard_reader.open_folder(folder / "s")
    wanted = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    assert [data.ids(row).tolist() for row in range(len(data))] == wanted
    assert all(len(data.words(row)) == len(ids) and (np.diff(data.words(row)) >= 0).all() for row, ids in enumerate(wanted))
