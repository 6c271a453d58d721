"""The quickstart's own data: harvested pairs must be a fair task, and its baseline a fair measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

sys.path.insert(0, str(helpers.REPO / "examples"))
import harvest
import make_tokenizer
import report

from bge_ds.data.beir import read_folder

VERBS = ["open", "rotate", "merge", "compress", "validate", "schedule", "translate", "measure"]
THINGS = ["archives", "matrices", "sockets", "calendars", "polygons", "tokens", "sensors", "ledgers", "playlists"]


def written(verb: str, thing: str) -> str:
    """A docstring like no other: summary, blank line, a body of its own words."""
    unique = " ".join(f"{thing[:4]}{verb[:3]}{i}" for i in range(30))
    return f"{verb.title()} several {thing} without waiting.\n\nWhat happens inside: {unique}."


@pytest.fixture(scope="module")
def docstrings() -> list[harvest.Docstring]:
    return [harvest.split("pkg", written(verb, thing)) for verb in VERBS for thing in THINGS]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_held_out_docstrings_are_in_no_training_file(tmp_path, docstrings):
    """A test text seen in training, even as a negative or in pre-training, would make the table's gain worthless."""
    harvest.write(docstrings, tmp_path, test_share=0.3, max_queries=1000)
    test = read_folder(tmp_path / "test")
    bodies, queries = list(test.passages()), list(test.queries.values())
    assert len(bodies) > 10 and len(queries) == len(bodies)
    training = (tmp_path / "train.jsonl").read_text() + (tmp_path / "pretrain.jsonl").read_text()
    assert len(read(tmp_path / "train.jsonl")) + len(bodies) == len(docstrings)
    assert not [text for text in [*bodies, *queries] if text in training]


def test_groups_are_well_formed(tmp_path, docstrings):
    """No group's negative is its own positive, and a training pair is a summary with the body it stood above."""
    harvest.write(docstrings, tmp_path, test_share=0.3, max_queries=1000)
    pairs = {d.summary: d.body for d in docstrings}
    for group in read(tmp_path / "train.jsonl"):
        assert group["pos"] == [pairs[group["query"]]]
        assert len(group["neg"]) == harvest.NEGATIVES and group["pos"][0] not in group["neg"]


def test_the_same_sources_give_the_same_files(tmp_path, docstrings):
    """Two machines with the same packages must report the same figures."""
    contents = []
    for name in ("a", "b"):
        harvest.write(docstrings, tmp_path / name, test_share=0.3, max_queries=5)
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))])
    assert contents[0] == contents[1] and len(contents[0]) == 5


LONG = (
    "Words that say at length what goes on inside when the thing is used by somebody"
    " who has read all of its manual, and what they may expect afterwards."
)


@pytest.mark.parametrize(
    ("summary", "body", "usable"),
    [
        ("Open the archive and list members", LONG + " Ends.", True),
        ("Open the archive and list members", "Open the archive and list members. " + LONG, False),
        ("Return it", LONG, False),
        ("Open the archive and list members", "Too short.", False),
        ("name (str): the archive to be opened", LONG + " Ends.", False),
    ],
)
def test_only_pairs_that_must_be_understood(summary, body, usable):
    """A summary that stands in its body again, or says nothing, would be found by copying or by luck."""
    counts = {" ".join(harvest.words(summary)): 1}
    assert harvest.is_pair(harvest.Docstring("pkg", summary, [body]), counts) == usable


def test_boilerplate_and_copies_are_dropped():
    """A paragraph that many docstrings share is removed from all of them; a docstring that repeats another goes."""
    shared = "See the user guide for more about this interface and its history."
    texts = [written(verb, "archives") + "\n\n" + shared for verb in VERBS]
    found = [harvest.split("pkg", text) for text in [*texts, texts[0].replace("several", "many")]]
    harvest.drop_shared_paragraphs(found)
    assert all(shared not in d.paragraphs and len(d.paragraphs) == 1 for d in found)
    assert len(harvest.drop_repeats(found)) == len(texts)


def test_markup_is_removed():
    """Rules, prompts and roles are no words that a query could ask for."""
    d = harvest.split("pkg", "Add two.\n\nParameters\n----------\nx: see :func:`~torch.add`\n\n>>> add(1)\n")
    assert d.paragraphs == ["Parameters x: see torch.add"]


def test_the_tokenizer_round_trips_through_transformers(tmp_path, docstrings):
    """The saved folder loads as a fast BERT tokenizer with the ids its vocabulary file says, special tokens first."""
    from transformers import AutoTokenizer

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{d.summary} {d.body}"}) + "\n" for d in docstrings))
    make_tokenizer.make_tokenizer([texts], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    pieces = (tmp_path / "out/vocab.txt").read_text().splitlines()
    ids = tokenizer("Rotate SEVERAL matrices").input_ids
    assert tokenizer.is_fast and [pieces[i] for i in ids] == tokenizer.convert_ids_to_tokens(ids)
    assert (pieces[ids[0]], pieces[ids[-1]]) == ("[CLS]", "[SEP]")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "rotate several matrices"
    assert [tokenizer.pad_token_id, tokenizer.mask_token_id] == [pieces.index("[PAD]"), pieces.index("[MASK]")]


@pytest.fixture
def small_set(tmp_path) -> Path:
    """A BEIR folder of three passages, at `data/test` beside the models."""
    folder = tmp_path / "data/test"
    folder.mkdir(parents=True)
    texts = ["red fox red", "brown dogs bark at night", "a matrix is a table of numbers"]
    lines = [json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "which dogs bark"}\n')
    (folder / "qrels.tsv").write_text("q\td1\t1\n")
    return folder


def example(*args: object) -> tuple[int, str, str]:
    """Runs a program of `examples/`; (exit status, stdout, stderr)."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=helpers.REPO / "examples", env=helpers.environment(), capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_report_has_a_row_for_each_model_and_a_picture(tmp_path, tiny_bert_path, small_set):
    """BM25 first, the models in their order, the last one with BM25; the losses come from the run's own file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"note": "end"}\n')
    models = ["before=" + str(tiny_bert_path), "after=" + str(tiny_bert_path)]
    flags = ["--data", small_set, "--bm25", 0.25, "--losses", tmp_path / "run", "--picture", tmp_path / "report.png"]
    status, said, errors = example("report.py", *models, *flags)
    assert status == 0, errors
    names = [line.split("  ")[0] for line in said.splitlines()[1:5]]
    assert names == ["BM25 (words alone)", "before", "after", "after + BM25"]
    assert said.splitlines()[1].split()[-3:] == ["1.0000"] * 3  # its only query shares two words with its passage alone
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert report.read_curves(tmp_path / "run") == {"loss": ([1, 2], [2.0, 1.5])}
    status, _, errors = example("report.py", models[0], "--data", tmp_path / "nowhere")
    assert status == 1 and errors.startswith("error: ") and "nowhere" in errors


def test_a_search_prints_the_best_passages_and_keeps_the_vectors(tmp_path, minilm_path, small_set):
    """The corpus is found beside the model, encoded once, and again when it has changed."""
    model = tmp_path / "model"
    model.mkdir()
    for file in minilm_path.iterdir():
        (model / file.name).symlink_to(file)
    status, said, errors = example("search.py", model, "dogs that bark", "rows and columns", "--top", 2)
    assert status == 0, errors
    lines = said.strip().splitlines()
    assert lines[0] == "dogs that bark" and "brown dogs" in lines[1] and "a matrix" in lines[5] and len(lines) == 7
    assert "encoding 3 passages" in errors
    again = example("search.py", model, "dogs that bark", "--top", 1)
    assert lines[1] in again[1] and "encoding" not in again[2]
    other = tmp_path / "lines.txt"
    other.write_text("cats purr\n\nships sail\n")
    status, said, errors = example("search.py", model, "a boat", "--corpus", other, "--top", 1)
    assert "ships sail" in said and "encoding 2 passages" in errors
    status, _, errors = example("search.py", tmp_path / "nothing", "x")
    assert status == 1 and "holds no trained model" in errors
