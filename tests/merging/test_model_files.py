"""Models that cannot be averaged: each difference is named, with the tensor, the shapes and the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

from bge_ds.merging.model_files import check_alike, open_model


@pytest.fixture
def pair(tmp_path, tiny_bert_path) -> tuple[Path, Path]:
    """Two copies of one encoder; a test changes the second."""
    for name in ("a", "b"):
        shutil.copytree(tiny_bert_path, tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def refused(*folders: Path) -> str:
    with pytest.raises(ValueError) as error:
        check_alike([open_model(str(folder)) for folder in folders])
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_pooling(folder: Path, pooling: str, normalize: bool, prompts: dict | None = None) -> None:
    """sentence-transformers' files, written down here."""
    kinds = ["Transformer", "Pooling", *["Normalize"] * normalize]
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}))


def test_models_that_differ_in_values_only_pass(pair):
    """Other weights, dropout and names in the config are what fine-tuning changes."""
    a, b = pair
    weights = load_file(b / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, b / "model.safetensors", metadata={"format": "pt"})
    edit_json(b / "config.json", hidden_dropout_prob=0.3, transformers_version="4.8.2", torch_dtype="float16")
    assert check_alike([open_model(str(a)), open_model(str(b))]) == []


def test_an_older_folder_passes_with_what_is_saved_today(minilm_path, tmp_path):
    """all-MiniLM-L6-v2 was saved in 2021 with its position ids; what is fine-tuned from it today has none."""
    AutoModel.from_pretrained(minilm_path).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(minilm_path).save_pretrained(tmp_path)
    assert check_alike([open_model(str(minilm_path)), open_model(str(tmp_path))]) == []


def test_other_shapes_are_named(tmp_path, pair):
    """Both shapes and files, and the setting behind them."""
    other = helpers.make_model("bert", tmp_path / "wide", intermediate_size=96)
    helpers.make_tokenizer("wordpiece", other)
    said = refused(pair[0], other)
    assert "config.json: intermediate_size is 64 in" in said and "and 96 in" in said
    name = "encoder.layer.0.intermediate.dense.weight"
    assert f"{name} is 64 x 32 in {pair[0]}/model.safetensors and 96 x 32 in {other}/model.safetensors" in said


def test_settings_without_a_shape_are_compared(pair):
    """Two models of 4 and 2 heads have the same shapes, and their average would compute nothing sensible."""
    edit_json(pair[1] / "config.json", num_attention_heads=2)
    assert "num_attention_heads is 4 in" in refused(*pair)


def test_missing_tensors_are_named(pair):
    """A model cut short is not filled up with zeros; a pooler, which no embedding uses, may be missing."""
    a, b = pair
    weights = load_file(b / "model.safetensors")
    gone = next(name for name in weights if name.endswith("layer.1.output.dense.bias"))
    weights.pop(gone)
    save_file(weights, b / "model.safetensors", metadata={"format": "pt"})
    assert f"{b} has no tensor encoder.layer.1.output.dense.bias" in refused(a, b)
    assert f"{b} has no tensor encoder.layer.1.output.dense.bias" in refused(b, a)


def test_many_differences_are_counted(pair, tmp_path):
    """The line stays readable where nothing fits."""
    other = helpers.make_model("bert", tmp_path / "narrow", hidden_size=16)
    helpers.make_tokenizer("wordpiece", other)
    assert " more" in refused(pair[0], other)


def test_tokenizers_are_compared(pair):
    """Two tokens that change places give every text other ids, and no shape shows it."""
    content = json.loads((pair[1] / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["##ing"], vocabulary["##er"] = vocabulary["##er"], vocabulary["##ing"]
    (pair[1] / "tokenizer.json").write_text(json.dumps(content))
    Tokenizer.from_file(str(pair[1] / "tokenizer.json"))
    assert refused(*pair).endswith(f"the tokenizers of {pair[0]} and {pair[1]} differ (vocabulary)")


def test_poolings_are_compared(pair):
    """Vectors pooled in another way were never trained."""
    a, b = pair
    write_pooling(a, "mean", True)
    assert check_alike([open_model(str(a)), open_model(str(b))]) == []  # a plain encoder says nothing of it
    assert f"{b} has no modules.json, whose pooling the result would take, and {a} has one: name {a} first" in refused(b, a)
    write_pooling(b, "cls", False)
    said = refused(a, b)
    assert f"pooling mean with normalisation in {a}, pooling cls without normalisation in {b}" in said


def test_other_prompts_are_a_note(pair):
    """A base model without a stored prompt may be mixed with one that was trained with it."""
    a, b = pair
    write_pooling(a, "mean", True, {"query": "find: ", "passage": ""})
    write_pooling(b, "mean", True)
    (note,) = check_alike([open_model(str(a)), open_model(str(b))])
    assert note == f"the prompts are those of {a}; {b} has none"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "none such"}'), "config.json: "),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing; models are read from safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x99" * 64), "cannot be read as safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "not an index of safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
         "gone.safetensors is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(pair, damage, said):
    """Every file of a model that is missing or broken is an error that names it."""
    damage(pair[1])
    with pytest.raises(ValueError) as error:
        open_model(str(pair[1]))
    assert said in str(error.value) and str(pair[1]) in str(error.value)


def test_a_model_that_is_nowhere(tmp_path):
    """Neither a folder nor, without a network, in the cache."""
    with pytest.raises(ValueError, match="--models none/such: neither a folder here nor a model that the hub gave"):
        open_model("none/such", str(tmp_path))


def test_a_model_of_the_hub_comes_from_the_cache(tmp_path, tiny_bert_path, monkeypatch):
    """A hub name is resolved as for the other commands, weights included."""
    import huggingface_hub

    asked = {}

    def snapshot(name, cache_dir, allow_patterns):
        asked.update(name=name, cache_dir=cache_dir, patterns=allow_patterns)
        return str(tiny_bert_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = open_model("some/model", str(tmp_path))
    assert (asked["name"], asked["cache_dir"]) == ("some/model", str(tmp_path)) and "*.safetensors" in asked["patterns"]
    assert model.folder == tiny_bert_path and all(isinstance(t.read(), torch.Tensor) for t in model.tensors.values())
