"""The model card: the hub can read its head, its snippets run and agree, and it holds no path of this machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig

from bge_ds.modeling import export, model_card

PROMPTS = {"query": "find: 'it' ", "passage": "text: "}


def snippets(text: str, folder: Path) -> list[dict]:
    """What the code of a card leaves behind, run on a folder."""
    found = []
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        names: dict = {}
        exec(code.replace(model_card.PLACE, str(folder)), names)
        found.append(names)
    return found


@pytest.mark.parametrize(("pooling", "normalize"), [("cls", True), ("mean", True), ("last_token", False)])
def test_the_snippets_run_and_agree(tiny_bert_path, tmp_path, capsys, pooling, normalize):
    """The three libraries give one vector for a query: a wrong pooling, a lost prompt or normalisation in a card would teach
    every reader to use the model wrongly."""
    pytest.importorskip("sentence_transformers")
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert_path, folder)
    config = AutoConfig.from_pretrained(folder)
    export.write_sentence_transformers(folder, config, pooling, normalize, PROMPTS)
    text = model_card.usage(model_card.PLACE, pooling, normalize, PROMPTS, config.max_position_embeddings)
    first, second, third = snippets(text, folder)
    vectors = [np.asarray(names[key])[0] for names, key in ((first, "queries"), (second, "vectors"), (third, "queries"))]
    assert np.abs(vectors[0]).max() > 0.1
    for vector in vectors[1:]:
        np.testing.assert_allclose(vector, vectors[0], rtol=0, atol=1e-4 if normalize else 1e-3)
    np.testing.assert_allclose(np.asarray(third["passages"]), first["passages"], rtol=0, atol=1e-4 if normalize else 1e-3)
    plain = snippets(model_card.usage(model_card.PLACE, pooling, normalize, {}, 130), folder)[1]["vectors"]
    assert np.abs(np.asarray(plain)[0] - vectors[0]).max() > 1e-2  # the prompt matters


def test_padded_texts_keep_their_vectors(tiny_bert_path, tmp_path):
    """The snippet for the last token must not take a padding token's, whichever side a tokenizer pads."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert_path, folder)
    settings = yaml.safe_load((folder / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(
        str(settings).replace("'", '"').replace("True", "true").replace("False", "false").replace("None", "null")
    )
    for pooling in ("cls", "mean", "last_token"):
        text = model_card.usage(model_card.PLACE, pooling, True, {}, 130)
        alone = snippets(text.replace("['what is a shard']", "['a shard']"), folder)[1]["vectors"]
        beside = snippets(text.replace("['what is a shard']", "['a shard', 'one that is much longer than the other']"), folder)[
            1
        ]
        np.testing.assert_allclose(beside["vectors"][0], alone[0], rtol=0, atol=1e-5, err_msg=pooling)


def test_the_hub_reads_the_head(tmp_path, monkeypatch):
    """Base model, licence and tags as the hub has them; folders of this machine are not named as base models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for given, wanted in (
        (["BAAI/bge-base-en-v1.5"], "BAAI/bge-base-en-v1.5"),
        (["BAAI/a", "intfloat/b", "out"], ["BAAI/a", "intfloat/b"]),
        (["out", str(tmp_path)], None),
    ):
        text = model_card.page(model_card.front_matter(given, "apache-2.0", "merge"), "A title", "Words.", [("Empty", "")])
        card = ModelCard(text)
        assert card.data.base_model == wanted and card.data.license == "apache-2.0"
        assert {"sentence-transformers", "feature-extraction"} <= set(card.data.tags)
        assert card.data.to_dict().get("base_model_relation") == (wanted and "merge")
        assert card.text.strip() == "# A title\n\nWords."
    assert "license" not in model_card.front_matter(["out"], None)


def test_names_and_cells(tmp_path):
    """Of a folder only its last part is shown, and a cell cannot break its table."""
    folder = tmp_path / "private" / "base"
    folder.mkdir(parents=True)
    assert model_card.shown_name(str(folder)) == "base" and model_card.shown_name("BAAI/bge-m3") == "BAAI/bge-m3"
    assert model_card.table(["a", "b"], [["x|y", "1\n2"]]).splitlines()[-1] == "| x\\|y | 1 2 |"
    assert model_card.scores({}) == ""
    assert model_card.scores({"dev": {"nDCG@10": 0.12345}}).endswith("| dev | 0.1235 |")


def test_an_encoder_without_pooling_gets_no_wrong_advice():
    """sentence-transformers would take a mean for it, which nobody trained."""
    text = model_card.usage("us/encoder", None, False, {}, 512)
    assert "AutoModel" in text and "SentenceTransformer" not in text
