"""Adapters in a backbone: what trains, what is computed, and what comes out merged."""

from __future__ import annotations

import json
import sys

import helpers
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from bge_ds.config.arguments import FinetuneArguments
from bge_ds.kernels.packed import pack
from bge_ds.modeling import lora
from bge_ds.modeling.encoder import Encoder

SETTINGS = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": [], "name_or_path": "base"}
IDS = helpers.random_texts([5, 17, 40, 3, 1, 17])


@pytest.fixture(scope="module", params=["bert", "roberta"])
def base_path(request, tmp_path_factory):
    pytest.importorskip("peft")
    return helpers.make_model(request.param, tmp_path_factory.mktemp(request.param))


def adapted(path, **changes) -> Encoder:
    """An encoder whose adapters have learnt something: peft starts them at a product of zero."""
    model = Encoder.load(str(path), "mean")
    torch.manual_seed(0)
    lora.add_adapters(model.backbone, **{**SETTINGS, **changes})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return model


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.backbone.named_parameters()}


def test_merged_weights_are_the_adapted_model(base_path):
    """The stock model, with the merged weights and padded, gives the vectors of the padding-free model with adapters."""
    model = adapted(base_path)
    live = model.encode_ids(IDS)
    stock = Encoder.load(str(base_path), "mean", attention="sdpa")
    assert (stock.encode_ids(IDS) - live).abs().max() > 0.05  # the adapters matter
    before = weights_of(model)
    merged = lora.merge(model.backbone, before)
    assert merged.keys() == dict(stock.backbone.named_parameters()).keys()
    stock.backbone.load_state_dict(merged)
    difference = (stock.encode_ids(IDS) - live).abs().max().item()
    print(f"largest difference {difference:.1e}")
    assert difference < 2e-6
    assert all(torch.equal(w, before[n]) for n, w in weights_of(model).items())  # the live model is as it was


def test_the_adapter_folder_is_peft_s(base_path, tmp_path):
    """peft loads the folder onto the stock base model and gives the same vectors."""
    import peft

    model = adapted(base_path, target_modules=["query", "intermediate.dense"])
    lora.save_adapter(model.backbone, weights_of(model), tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 2 * 2
    loaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base_path), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["inference_mode"] and config["base_model_name_or_path"] == "base" and config["lora_alpha"] == 8
    stock = Encoder(loaded.merge_and_unload(), "mean")
    stock.backbone.set_attn_implementation("sdpa")
    assert (stock.encode_ids(IDS) - model.encode_ids(IDS)).abs().max() < 2e-6


def test_only_adapters_train(base_path):
    """All linear layers but the pooler's get one; everything else is frozen; the products start at zero."""
    model = Encoder.load(str(base_path), "mean")
    start = model.encode_ids(IDS)
    lora.add_adapters(model.backbone, **SETTINGS)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 6 and all("lora_" in name and "pooler" not in name for name in trained)
    assert torch.equal(model.encode_ids(IDS), start)
    model.train()
    model(pack(IDS)[0]).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_reach_the_adapters(base_path, reentrant):
    """Gradient checkpointing gives every adapter the gradient that it has without, though no input needs one."""
    gradients = []
    for recompute in (False, True):
        model = adapted(base_path)
        if recompute:
            model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        model(pack(IDS)[0]).pow(3).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert min(g.abs().max() for g in plain.values()) > 1e-4
    assert all(torch.allclose(plain[n], recomputed[n], rtol=1e-5, atol=1e-7) for n in plain)


def test_an_unknown_layer_is_an_error_with_the_right_ones(base_path):
    """A name that fits no linear layer is named with those that do; a layer whose output is unused is none of them."""
    for wrong in (["q_proj"], ["query", "q_proj"], ["pooler.dense"], ["embeddings"]):
        model = Encoder.load(str(base_path))
        with pytest.raises(ValueError, match=rf"--target_modules {wrong[-1]}: \w+ has no .*it has dense, key, query, value"):
            lora.add_adapters(model.backbone, **{**SETTINGS, "target_modules": wrong})


def test_without_peft_the_remedy_is_named(base_path, monkeypatch):
    """The package is an extra: its absence stops the run before training, with the command that mends it."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install bge_ds\[lora\]"):
        lora.add_adapters(Encoder.load(str(base_path)).backbone, **SETTINGS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_rank": 8}, "--lora_rank 8 has no effect without --use_lora"),
        ({"lora_alpha": 8.0}, "--lora_alpha 8.0 has no effect without --use_lora"),
        ({"lora_dropout": 0.0}, "--lora_dropout 0.0 has no effect without --use_lora"),
        ({"target_modules": ["query", "key"]}, "--target_modules query key has no effect without --use_lora"),
        ({"use_lora": True, "fix_position_embedding": True}, "--fix_position_embedding has no effect with --use_lora"),
        ({"use_lora": True, "lora_rank": 0}, "--lora_rank is 0; it must be a whole number of at least 1"),
        ({"use_lora": True, "lora_dropout": 1.0}, "--lora_dropout is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_flags_without_effect_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        FinetuneArguments.build(output_dir="out", train_data="data", model_name_or_path="model", **flags)
