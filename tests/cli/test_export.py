"""The export command: onnxruntime gives the model's vectors for any batch, and a file that would not gets no name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from bge_ds import api, export
from bge_ds.modeling import onnx_export
from bge_ds.modeling.export import write_sentence_transformers

TEXTS = ["fox", *helpers.SENTENCES, " ".join(helpers.SENTENCES * 3)]


def make_folder(folder: Path, family: str, pooling: str, normalize: bool = True, tokenizer: str = "wordpiece") -> Path:
    """A tiny random model that names its pooling and a prompt."""
    helpers.make_model(family, folder, vocab_size=400)
    helpers.make_tokenizer(tokenizer, folder)
    write_sentence_transformers(folder, AutoConfig.from_pretrained(folder), pooling, normalize, {"query": "find: "})
    return folder


def run_graph(file: Path, texts: list[str], tokenizer, outputs=("sentence_embedding",)) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="np")
    return session.run(list(outputs), dict(inputs))


@pytest.mark.parametrize(
    ("family", "pooling", "normalize", "tokenizer"),
    [
        ("xlm-roberta", "mean", False, "unigram"),
        ("modernbert", "cls", True, "bytes"),
        ("qwen3", "last_token", True, "bytes"),
    ],
)
def test_onnxruntime_gives_the_models_vectors(tmp_path, capsys, family, pooling, normalize, tokenizer):
    """Any number and length of texts, alone or padded on either side: what the tokenizer gives is what the graph takes, and its
    vectors are those of `api.load`, pooled and normalised as the folder says."""
    pytest.importorskip("onnxruntime")
    folder = make_folder(tmp_path / "out", family, pooling, normalize, tokenizer)
    assert export.main(["--model_name_or_path", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "differ from the model's by" in printed.out and f"pooling {pooling} (from modules.json)" in printed.err
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model.onnx"] and not list(tmp_path.rglob("*.partial"))
    wanted = api.load(folder, use_cpu=True, passage_max_len=128)(TEXTS, "passage").numpy()
    assert np.ptp(wanted, axis=0).max() > 0.01  # not all alike
    for side in ("right", "left"):
        given = AutoTokenizer.from_pretrained(folder, padding_side=side)
        for some in (slice(0, 1), slice(0, 3), slice(None)):
            hidden, found = run_graph(folder / "onnx/model.onnx", TEXTS[some], given, onnx_export.OUTPUTS)
            scale = np.linalg.norm(wanted[some], axis=1, keepdims=True)
            np.testing.assert_allclose(found / scale, wanted[some] / scale, rtol=0, atol=1e-5)
            assert hidden.shape[::2] == (len(found), found.shape[1])


def test_a_real_model_agrees_with_sentence_transformers(tmp_path, minilm_path):
    """The whole way from another library's model, with a text at the full length."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pytest.importorskip("onnxruntime")
    assert export.main(["--model_name_or_path", str(minilm_path), "--output", str(tmp_path / "made")]) == 0
    texts = ["a short one", "words of a long text " * 60, "中文 and English"]
    (found,) = run_graph(tmp_path / "made/model.onnx", texts, AutoTokenizer.from_pretrained(minilm_path))
    model = sentence_transformers.SentenceTransformer(str(minilm_path), device="cpu")
    model.max_seq_length = 128
    np.testing.assert_allclose(found, model.encode(texts), rtol=0, atol=1e-5)


def test_a_graph_with_other_vectors_gets_no_name(tmp_path, monkeypatch, capsys):
    """Wrong vectors are one line with the difference; the earlier file stays as it was, and nothing lies beside it. What
    replaces it leaves other files in their place."""
    pytest.importorskip("onnxruntime")
    folder = make_folder(tmp_path / "out", "bert", "mean")
    flags = ["--model_name_or_path", str(folder)]
    assert export.main(flags) == 0
    graph = (folder / "onnx/model.onnx").read_bytes()
    assert export.main(flags) == 2 and "or give --overwrite" in capsys.readouterr().err
    monkeypatch.setattr(onnx_export, "write", lambda model, names, partial: (partial / "model.onnx").write_bytes(graph))
    for name in ("model.onnx", "model.onnx.data", "model_quantized.onnx"):
        (folder / "onnx" / name).write_text("of before")
    for other in (("--sentence_pooling_method", "cls"), ("--normalize_embeddings", "False")):
        assert export.main([*flags, "--overwrite", *other]) == 2
        _, line = capsys.readouterr().err.splitlines()
        assert "does not give the model's vectors: they differ by" in line and "nothing was written" in line
        assert (folder / "onnx/model.onnx").read_text() == "of before" and not list(tmp_path.rglob("*.partial"))
    assert export.main([*flags, "--overwrite"]) == 0
    assert (folder / "onnx/model.onnx").read_bytes() == graph
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model_quantized.onnx"]


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    """What is missing is named with the extra that brings it; a hub name needs a place for the file; a file is no folder."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(export, "NEEDED", ("json", "no_such_package"))
    assert export.main(["--model_name_or_path", str(tmp_path)]) == 2
    assert "needs no_such_package; install it with `pip install bge_ds[onnx]`" in capsys.readouterr().err
    monkeypatch.setattr(export, "NEEDED", ("json",))
    for flags, said in (
        (["--model_name_or_path", "us/model"], "us/model is no folder here: give --output"),
        (["--model_name_or_path", str(tmp_path), "--output", str(tmp_path / "file")], "is a file; give a folder"),
        (["--model_name_or_path", str(tmp_path / "none"), "--output", str(tmp_path / "o")], "neither a folder here"),
    ):
        assert export.main(flags) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_flags_are_read_without_torch():
    """--help and mistakes are answered at once."""
    script = "import sys; from bge_ds import export; export.parser().parse_args(['--model_name_or_path', 'a'])\n"
    script += "assert not {'torch', 'transformers', 'deepspeed', 'numpy', 'onnx'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, env=helpers.environment(PYTHONPATH=helpers.PYTHONPATH))
