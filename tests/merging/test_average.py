"""Averaged weights against sums written out with numpy, on whole files and shards, one tensor in memory at a time."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import AutoModel, BertForMaskedLM, BertModel

from bge_ds import merge
from bge_ds.merging import average, model_files


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[Path]:
    """Three encoders of one shape with one tokenizer; the first is stored whole, the second in shards, the third in bf16."""
    base = tmp_path_factory.mktemp("three")
    for seed, name in enumerate(("whole", "shards", "half")):
        torch.manual_seed(seed)
        model = BertModel(helpers.tiny_config("bert")).to(torch.bfloat16 if name == "half" else torch.float32)
        model.save_pretrained(base / name, max_shard_size="30KB" if name == "shards" else "1GB")
        helpers.make_tokenizer("wordpiece", base / name)
    assert len(list((base / "shards").glob("*.safetensors"))) > 2
    return [base / name for name in ("whole", "shards", "half")]


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder in fp64, by numpy alone but for bf16, which it does not know."""
    found = {}
    for file in folder.glob("*.safetensors"):
        if folder.name == "half":
            found |= {name: p.detach().double().numpy() for name, p in AutoModel.from_pretrained(folder).named_parameters()}
        else:
            found |= {name: array.astype(np.float64) for name, array in load_file(file).items()}
    return found


def run(models: list, output: Path, *flags: str) -> None:
    assert merge.main(["--models", *map(str, models), "--output", str(output), *flags]) == 0


def test_the_result_is_the_weighted_sum_of_every_tensor(three, tmp_path):
    """Whatever the files' number and type: a shard passed over, or a sum in bf16, would be off in the third digit."""
    run(three[::-1], tmp_path / "mix", "--weights", "0.2", "0.3", "0.5")
    parts, result = [stored(folder) for folder in three], load_file(tmp_path / "mix/model.safetensors")
    assert result.keys() == parts[0].keys()
    for name, array in result.items():
        wanted = sum(weight * part[name] for weight, part in zip((0.5, 0.3, 0.2), parts, strict=True))
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-6, err_msg=name)


def test_without_weights_all_count_alike(three, tmp_path):
    """The default is written down in the note."""
    run(three[:2], tmp_path / "mix")
    name = "encoder.layer.1.output.dense.weight"
    wanted = (stored(three[0])[name] + stored(three[1])[name]) / 2
    np.testing.assert_allclose(load_file(tmp_path / "mix/model.safetensors")[name], wanted, rtol=0, atol=1e-6)
    note = json.loads((tmp_path / "mix/merge.json").read_text())
    assert note["weights_from"] == "equal" and [model["weight"] for model in note["models"]] == [0.5, 0.5]
    assert len(note["models"][1]["xxh3_128"]) == len(list(three[1].glob("*.safetensors")))


def test_a_large_result_is_written_in_shards(three, tmp_path, monkeypatch):
    """Files of a bounded size with an index that transformers reads: the same weights as in one file."""
    run(three[:2], tmp_path / "one")
    monkeypatch.setattr(average, "SHARD_BYTES", 20_000)
    run(three[:2], tmp_path / "many")
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "many/model.safetensors").exists()
    one, many = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_one_tensor_is_in_memory_at_a_time(three, tmp_path, monkeypatch):
    """No tensor that was read outlives the next one: models larger than the memory could not be averaged otherwise."""
    alive, most = [], []
    read = model_files.StoredTensor.read

    def watched(self):
        most.append(sum(found() is not None for found in alive))
        tensor = read(self)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(model_files.StoredTensor, "read", watched)
    run(three[:2], tmp_path / "mix")
    assert len(most) > 50 and max(most) <= 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_types_of_16_bits_are_rounded_once(three, tmp_path, dtype):
    """The fp32 sum is rounded at the end, and config.json says the type, by which transformers loads it."""
    run(three[:2], tmp_path / "mix", "--dtype", dtype)
    run(three[:2], tmp_path / "fp32")
    half, whole = (AutoModel.from_pretrained(tmp_path / name, dtype="auto") for name in ("mix", "fp32"))
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert half.dtype == wanted and whole.dtype == torch.float32
    for name, parameter in whole.named_parameters():
        assert torch.equal(half.get_parameter(name), parameter.to(wanted)), name


def test_numbers_that_do_not_fit_are_refused(three, tmp_path, capsys):
    """Infinite weights would be written without a word; an earlier result stays as it is."""
    large = tmp_path / "large"
    model = AutoModel.from_pretrained(three[0])
    model.embeddings.LayerNorm.weight.data[0] = 3e5
    model.save_pretrained(large)
    helpers.make_tokenizer("wordpiece", large)
    run(three[:2], tmp_path / "mix")
    before = (tmp_path / "mix/model.safetensors").read_bytes()
    flags = ["--models", str(three[1]), str(large), "--output", str(tmp_path / "mix"), "--overwrite"]
    assert merge.main([*flags, "--dtype", "fp16"]) == 2
    assert "embeddings.LayerNorm.weight holds numbers beyond 65504; take bf16 or fp32" in capsys.readouterr().err
    model.embeddings.LayerNorm.weight.data[0] = float("nan")
    model.save_pretrained(large)
    assert merge.main(flags) == 2
    assert "embeddings.LayerNorm.weight holds NaN or infinite numbers" in capsys.readouterr().err
    assert (tmp_path / "mix/model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "mix"]


def test_heads_and_old_names_are_no_obstacle(tmp_path, capsys):
    """A checkpoint with a vocabulary head, and one with the names that BERT's norms had at first, are the same encoder."""
    torch.manual_seed(0)
    with_head = BertForMaskedLM(helpers.tiny_config("bert"))
    with_head.save_pretrained(tmp_path / "head")
    encoder = BertModel(helpers.tiny_config("bert"))
    encoder.save_pretrained(tmp_path / "bare")
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): p.detach()
        for name, p in encoder.named_parameters()
    }
    old["bert.embeddings.position_ids"] = torch.arange(130)[None]
    save_file(old, tmp_path / "bare/model.safetensors", metadata={"format": "pt"})
    for name in ("head", "bare"):
        helpers.make_tokenizer("wordpiece", tmp_path / name)
    run([tmp_path / "head", tmp_path / "bare"], tmp_path / "mix", "--weights", "0.25", "0.75")
    loaded, info = AutoModel.from_pretrained(tmp_path / "mix", output_loading_info=True)
    assert type(loaded) is BertModel and not info["unexpected_keys"]
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pooler"}  # which the first model has not
    for name, parameter in with_head.bert.named_parameters():
        wanted = 0.25 * parameter + 0.75 * encoder.get_parameter(name)
        torch.testing.assert_close(loaded.get_parameter(name), wanted, rtol=0, atol=1e-6, msg=name)
    said = capsys.readouterr().err
    assert "left out of" in said and "cls.predictions" in said and "position_ids" not in said
