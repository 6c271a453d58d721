"""bge_ds from Python: objects in, a trained folder out, the same as the commands give."""

from __future__ import annotations

import json
import shutil

import helpers
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

from bge_ds import api


@pytest.fixture
def setting(tmp_path):
    return helpers.make_training_folder(tmp_path / "base")


def flags_of(setting) -> dict:
    return {
        "model_name_or_path": str(setting / "model"), "cache_dir": str(setting / "cache"), "max_steps": 2,
        "per_device_train_batch_size": 2, "train_group_size": 3, "learning_rate": 1e-3, "save_strategy": "no",
        "sentence_pooling_method": "mean", "query_instruction_for_retrieval": "find: ", "dataloader_num_workers": 0,
        "use_cpu": True,
    }  # fmt: skip


def test_objects_train_as_the_file_with_the_same_rows(tmp_path, setting):
    """A data set, a list and an iterator of rows, and their JSON lines, give one model to the last bit, on two ranks; the
    folder embeds with its own pooling and prompt, and is evaluated as by the command."""
    data = setting / "set"
    data.mkdir()
    for name, ids in (("corpus", ("p1", "p2")), ("queries", ("q1", "q2"))):
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"_id": i, "text": f"text {i}"}) + "\n" for i in ids))
    (data / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t1\nq2\tp2\t1\n")
    helpers.run_ranks("python_api", 2, tmp_path, setting, json.dumps(flags_of(setting)))
    expected = load_file(tmp_path / "file" / "model.safetensors")
    for name in ("list", "dataset", "iterator"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected), name
    assert len(list((setting / "cache").rglob("rows-*.jsonl"))) == 2  # one file a content: groups and texts
    assert not list((setting / "cache").rglob("*.partial"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["shape"] == [2, 32] and found["lengths"] == pytest.approx([1, 1], abs=1e-5)
    assert (found["settings"]["pooling"], found["settings"]["query_prompt"]) == ("mean", "find: ")
    measures = found["measures"][str(data)]
    assert measures["queries"] == 2 and 0 < measures["nDCG@10"] <= 1


def test_mistakes_name_the_row(tmp_path, setting):
    """A row that is no dictionary or holds what JSON cannot is named, and nothing is left in the cache."""
    for bad, words in (
        (["text"], "row 1 is list"),
        ({"query": object()}, "row 1 cannot be written"),
        (None, "row 1 is NoneType"),
    ):
        with pytest.raises(ValueError, match=words):
            api.finetune([{"query": "a", "pos": ["b"], "neg": ["c"]}, bad], output_dir=tmp_path / "o", **flags_of(setting))
    with pytest.raises(ValueError, match="no rows"):
        api.finetune(iter([]), output_dir=tmp_path / "o", **flags_of(setting))
    assert not [path for path in (setting / "cache").rglob("rows-*")] and not (tmp_path / "o").exists()


def test_rows_are_encoded_as_their_file(tmp_path, setting):
    """Rows and their JSON lines give the same vectors, those of the loaded model; a row that cannot serve is named."""
    rows = [{"text": f"text {i}"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model_name_or_path": setting / "model", "cache_dir": str(setting / "cache"), "use_cpu": True, "max_len": 9}
    found = api.encode(rows, output=tmp_path / "a", **flags)
    same = api.encode(tmp_path / "rows.jsonl", output=tmp_path / "b", **flags)
    assert found.shape == (5, 32) and found.ids is None
    model = api.load(setting / "model", use_cpu=True, passage_max_len=9)
    torch.testing.assert_close(torch.from_numpy(found[:]), model([row["text"] for row in rows], "passage"), rtol=0, atol=1e-6)
    assert found[:].tolist() == same[:].tolist()
    with pytest.raises(ValueError, match="texts: row 1 is str"):
        api.encode([rows[0], "plain"], output=tmp_path / "c", **flags)


def test_rows_are_scored_as_lines_are(tmp_path, monkeypatch):
    """api.score on Python rows writes what the command writes of their lines, and gives its counts."""
    from score_runs import GROUPS, make_teacher, read_groups, scored, write_groups

    monkeypatch.setenv("BGE_DS_CACHE", str(tmp_path / "cache"))
    teacher = make_teacher(tmp_path / "teacher")
    counts = api.score(iter(GROUPS), model_name_or_path=teacher, output=tmp_path / "rows.jsonl", use_cpu=True)
    assert counts["groups"] == 10 and counts["pairs"] == sum(len(group["pos"]) + len(group["neg"]) for group in GROUPS)
    lines = scored(teacher, write_groups(tmp_path / "groups.jsonl"), tmp_path / "lines.jsonl")
    assert read_groups(tmp_path / "rows.jsonl") == lines


def test_models_are_merged_as_by_the_command(tmp_path, setting):
    """The folder has the weights asked for, and rows of examples weigh as their file; a mistake names the flag."""
    shutil.copytree(setting / "model", setting / "other")
    model = BertModel.from_pretrained(setting / "other")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(setting / "other")
    models = [setting / "model", setting / "other"]
    folder = api.merge(models, output=tmp_path / "mix", weights=[0.75, 0.25])
    a, b, mixed = (BertModel.from_pretrained(path).embeddings.word_embeddings.weight for path in (*models, folder))
    torch.testing.assert_close(mixed, 0.75 * a + 0.25 * b, rtol=0, atol=1e-6)
    file = setting / "groups.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for name, examples in (("rows", rows), ("file", file)):
        api.merge(models, output=tmp_path / name, examples=examples, use_cpu=True, cache_dir=str(setting / "cache"))
    notes = [json.loads((tmp_path / name / "merge.json").read_text()) for name in ("rows", "file")]
    assert notes[0]["examples"]["losses"] == notes[1]["examples"]["losses"] and notes[0]["examples"]["groups"] == 9
    assert [model["weight"] for model in notes[0]["models"]] == [model["weight"] for model in notes[1]["models"]]
    for flags, said in (({"weights": [1, 1]}, "--weights sum to 2"), ({"dtype": "fp64"}, "--dtype fp64 is none of fp32")):
        with pytest.raises(ValueError, match=said):
            api.merge(models, output=tmp_path / "bad", **flags)
    assert not (tmp_path / "bad").exists()
