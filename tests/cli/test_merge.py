"""The merge command: its result loads in sentence-transformers, its note says what was mixed, every mistake is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from bge_ds import merge
from bge_ds.merging import average


@pytest.fixture(scope="module")
def base_and_tuned(minilm_path, tmp_path_factory) -> tuple[Path, Path]:
    """all-MiniLM-L6-v2, and the same moved away from it at random."""
    tuned = tmp_path_factory.mktemp("models") / "tuned"
    model = AutoModel.from_pretrained(minilm_path)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(5e-3 * torch.randn_like(parameter))
    shutil.copytree(minilm_path, tuned, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(minilm_path).save_pretrained(tuned)
    return minilm_path, tuned


def test_the_result_loads_in_sentence_transformers(base_and_tuned, tmp_path):
    """Its vectors are those of a stock model with averaged weights, pooled and normalised as the first model's files say."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    output = tmp_path / "mix"
    flags = ["--models", *map(str, base_and_tuned), "--weights", "0.7", "0.3", "--output", str(output)]
    assert merge.main(flags) == 0
    texts = ["a short text", "another one that is somewhat longer than the first"]
    found = sentence_transformers.SentenceTransformer(str(output), device="cpu").encode(texts)

    base, tuned = (AutoModel.from_pretrained(folder) for folder in base_and_tuned)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(0.7 * parameter + 0.3 * tuned.get_parameter(name))
        given = AutoTokenizer.from_pretrained(base_and_tuned[0])(texts, padding=True, return_tensors="pt")
        hidden, mask = base.eval()(**given).last_hidden_state, given["attention_mask"][..., None]
    mean = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    wanted = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    other = sentence_transformers.SentenceTransformer(str(base_and_tuned[0]), device="cpu").encode(texts)
    assert np.abs(found - other).max() > 1e-3

    note = json.loads((output / "merge.json").read_text())
    assert [(model["name"], model["weight"]) for model in note["models"]] == [
        (str(base_and_tuned[0]), 0.7),
        (str(base_and_tuned[1]), 0.3),
    ]
    assert all(len(digest) == 32 for model in note["models"] for digest in model["xxh3_128"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["mix"]


def test_the_card_says_what_was_mixed(pair, examples, tmp_path):
    """Models of the hub are named to it as what this one was merged from; folders only by their last part."""
    flags = ["--models", *pair, "--examples", str(examples), "--use_cpu", "--license", "mit"]
    assert merge.main([*flags, "--output", str(tmp_path / "mix")]) == 0
    text = (tmp_path / "mix/README.md").read_text()
    note = json.loads((tmp_path / "mix/merge.json").read_text())
    for name, model, loss in zip("ab", note["models"], note["examples"]["losses"], strict=True):
        assert f"| {name} | {model['weight']:.4f} | {loss:.4f} |" in text
    assert "license: mit" in text and "merge.json" in text and str(Path(pair[0]).parent) not in text


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    base = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        AutoModel.from_config(helpers.tiny_config("bert")).save_pretrained(base / name)
        helpers.make_tokenizer("wordpiece", base / name)
    return [str(base / name) for name in "ab"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "groups.jsonl"
    rows = [{"query": text[:12], "pos": [text], "neg": []} for text in helpers.SENTENCES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_weights_from_examples_are_used_and_noted(pair, examples, tmp_path, capsys):
    """The printed and noted weights are the softmax of the noted losses, and those of the average."""
    flags = ["--models", *pair, "--examples", str(examples), "--temperature", "0.5", "--output", str(tmp_path / "mix")]
    assert merge.main([*flags, "--use_cpu", "--passage_max_len", "64"]) == 0
    note = json.loads((tmp_path / "mix/merge.json").read_text())
    origin, weights = note["examples"], [model["weight"] for model in note["models"]]
    powers = np.exp(-np.array(origin["losses"]) / 0.5)
    np.testing.assert_allclose(weights, powers / powers.sum(), rtol=1e-9)
    assert abs(weights[0] - 0.5) > 1e-3
    assert (origin["groups"], origin["file"], origin["temperature"]) == (6, "groups.jsonl", 0.5)
    assert f"{weights[0]:.4f}  {pair[0]}, loss {origin['losses'][0]:.4f}" in capsys.readouterr().out
    a, b, mix = (
        AutoModel.from_pretrained(folder).get_parameter("encoder.layer.0.output.dense.weight")
        for folder in (*pair, tmp_path / "mix")
    )
    torch.testing.assert_close(mix, weights[0] * a + weights[1] * b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weights", "0.5", "0.6"], "--weights sum to 1.1, not to 1; in these proportions they are 0.4545455 0.5454545"),
        (["--weights", "1"], "--weights has 1 numbers for 2 models; give one for each"),
        (["--weights", "1.5", "-0.5"], "--weights -0.5 is not a number above 0"),
        (["--weights", "nan", "1"], "--weights nan is not a number above 0"),
        (["--weights", "0", "1"], "leave out a model that is not to count"),
        (["--weights", "0.5", "0.5", "--examples", "x.jsonl"], "--weights and --examples exclude each other"),
        (["--temperature", "2"], "--temperature has no effect without --examples"),
        (["--examples", "x.jsonl", "--temperature", "0"], "--temperature 0 is not a number above 0"),
        (["--use_cpu"], "--use_cpu has no effect without --examples"),
        (["--license", "All mine"], "--license All mine is not a licence identifier of the Hugging Face hub"),
        (["--examples", "none.jsonl"], "--examples none.jsonl: no such file"),
    ],
)
def test_flags_that_cannot_serve(pair, tmp_path, capsys, flags, said):
    """One line, exit status 2, nothing written."""
    assert merge.main(["--models", *pair, "--output", str(tmp_path / "mix"), *flags]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_serve(pair, tmp_path, capsys):
    """One model, one twice, and models that do not fit."""
    for models, said in (([pair[0]], "give two or more"), ([pair[0]] * 2, f"--models names {pair[0]} twice")):
        assert merge.main(["--models", *models, "--output", str(tmp_path / "mix")]) == 2
        assert said in capsys.readouterr().err
    other = helpers.make_model("roberta", tmp_path / "other", vocab_size=400)
    helpers.make_tokenizer("bytes", other)
    assert merge.main(["--models", pair[0], str(other), "--output", str(tmp_path / "mix")]) == 2
    assert "these models cannot be averaged: config.json: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_nothing_is_overwritten_that_is_not_a_result(pair, tmp_path, capsys):
    """A folder that is read, foreign files, and an earlier result without --overwrite stay."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    cases = (
        (pair[0], "which is read; name another folder"),
        (str(Path(pair[0]).parent), "which is read; name another folder"),
        (str(tmp_path / "mine"), "is not empty, and no result of an earlier merge"),
        (str(tmp_path / "file"), "is a file; give a folder"),
    )
    for output, said in cases:
        assert merge.main(["--models", *pair, "--output", output, "--overwrite"]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    again = ["--models", *pair, "--output", str(tmp_path / "mix")]
    assert merge.main(again) == 0 and merge.main(again) == 2
    assert "or give --overwrite" in capsys.readouterr().err
    assert merge.main([*again, "--weights", "0.9", "0.1", "--overwrite"]) == 0
    assert json.loads((tmp_path / "mix/merge.json").read_text())["models"][0]["weight"] == 0.9


@pytest.mark.parametrize("place", ["average", "check_loads"])
def test_a_failure_half_way_leaves_the_earlier_result(pair, tmp_path, monkeypatch, capsys, place):
    """A full disk, in the middle or at the end, is one line; the folder of before is whole, and nothing lies beside it."""
    flags = ["--models", *pair, "--output", str(tmp_path / "mix")]
    assert merge.main(flags) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "mix").iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(average, place, fail)
    assert merge.main([*flags, "--overwrite"]) == 2
    assert "could not be written ([Errno 28] No space left on device); make room" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "mix").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["mix"]


def test_flags_are_read_without_torch():
    """--help and mistakes are answered at once."""
    script = "import sys; from bge_ds import merge; merge.parser().parse_args(['--models', 'a', 'b', '--output', 'c'])\n"
    script += "assert not {'torch', 'transformers', 'deepspeed', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, env=helpers.environment(PYTHONPATH=helpers.PYTHONPATH))
