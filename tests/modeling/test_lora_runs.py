"""LoRA under the engine: resumed exactly, exported merged and as an adapter, at every ZeRO stage."""

from __future__ import annotations

import json

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

PASSAGES = [" ".join(helpers.SENTENCES[i % 6].split()[: 2 + i]) for i in range(9)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny BERT with dropout and groups of texts."""
    pytest.importorskip("peft")
    base = tmp_path_factory.mktemp("setting")
    helpers.make_model("bert", base / "model", dropout=0.1)
    helpers.make_tokenizer("wordpiece", base / "model")
    groups = [
        {"query": helpers.SENTENCES[i % 6][: 20 + i], "pos": [PASSAGES[i]], "neg": PASSAGES[:i] + PASSAGES[i + 1 :]}
        for i in range(9)
    ]
    (base / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    return base


def flags_of(setting, output, stage, **more) -> dict:
    return {
        "model_name_or_path": str(setting / "model"), "train_data": str(setting / "groups.jsonl"), "output_dir": str(output),
        "cache_dir": str(setting / "cache"), "deepspeed": f"zero{stage}", "per_device_train_batch_size": 2, "max_steps": 6,
        "save_steps": 3, "logging_steps": 1, "learning_rate": 5e-3, "warmup_steps": 2, "weight_decay": 0.1,
        "dataloader_num_workers": 0, "train_group_size": 3, "negatives_cross_device": True, "temperature": 0.05,
        "sentence_pooling_method": "mean", "use_lora": True, "lora_rank": 4, "lora_alpha": 16, **more,
    }  # fmt: skip


def train(ranks: int, runs: list[dict], errors: str = "raise") -> str:
    return helpers.run_ranks("train", ranks, json.dumps([("finetune", flags) for flags in runs]), errors)


def losses(folder) -> dict[int, tuple]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: (r["loss"], r["learning_rate"], r["grad_norm"]) for r in records}


def vectors_of(model, folder) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(PASSAGES, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**tokens).last_hidden_state[:, 0]


CASES = ["0", "1", "2", "2-bf16", "3", "3-bf16"]


@pytest.fixture(scope="module")
def resumed_runs(tmp_path_factory, setting):
    """Every case once to the end and once from the checkpoint in the middle, in one group of ranks."""
    base, runs = tmp_path_factory.mktemp("runs"), []
    for case in CASES:
        whole, more = base / case / "whole", {"bf16": "bf16" in case}
        middle = {"resume_from_checkpoint": str(whole / "checkpoint-3")}
        runs += [
            flags_of(setting, whole, case[0], **more),
            flags_of(setting, base / case / "resumed", case[0], **more, **middle),
        ]
    train(2, runs)
    return base


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_undisturbed(resumed_runs, setting, case):
    """Same losses, rates, norms and final weights to the last bit, though the checkpoint holds no frozen weight."""
    whole, resumed = resumed_runs / case / "whole", resumed_runs / case / "resumed"
    expected, found = losses(whole), losses(resumed)
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert found == {step: expected[step] for step in (4, 5, 6)}
    for file in ("model.safetensors", "lora_adapter/adapter_model.safetensors"):
        a, b = load_file(whole / file), load_file(resumed / file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
    before, after = (load_file(f / "lora_adapter/adapter_model.safetensors") for f in (whole / "checkpoint-3", whole))
    assert len(after) == 2 * 2 * 6 and not any(torch.equal(before[k], after[k]) for k in after)
    check_resume_files(whole / "checkpoint-3" / "resume", adapters=sum(w.numel() for w in after.values()))
    check_export(setting / "model", whole, bf16="bf16" in case)


def check_resume_files(folder, adapters: int) -> None:
    """What `resume/` holds is the adapters' masters and two moments; the frozen model has four times as many weights."""
    content = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    entries = {key: tensor for part in content for key, tensor in part.items() if tensor.dim()}
    assert len(content) == 2 and all("lora_" in key for key in entries)
    assert sum(tensor.numel() for tensor in entries.values()) == 3 * adapters


def check_export(base, folder, bf16: bool) -> None:
    """The merged model is the base model with the adapter that peft loads onto it; layers without one are the base's."""
    import peft

    merged = load_file(folder / "model.safetensors")
    start = {k.removeprefix("bert."): w for k, w in load_file(base / "model.safetensors").items()}
    kept = [k for k in start if k in merged and not ("layer." in k and k.endswith("weight") and "LayerNorm" not in k)]
    rounded = torch.bfloat16 if bf16 else torch.float32
    assert len(kept) > 20 and all(torch.equal(merged[k], start[k].to(rounded).float()) for k in kept)
    changed = [k for k in start if k in merged and k not in kept]
    assert len(changed) == 12 and not any(torch.equal(merged[k], start[k]) for k in changed)

    adapted = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder / "lora_adapter")
    difference = (vectors_of(adapted, folder) - vectors_of(AutoModel.from_pretrained(folder), folder)).abs().max().item()
    print(f"largest difference of merged and adapted {difference:.1e}")
    assert difference < (0.05 if bf16 else 1e-5)  # bf16: the base was rounded, in the merged model alone


def test_another_base_model_is_refused(tmp_path, setting):
    """The checkpoint holds no frozen weights, so resuming onto other ones would go on as another run; it is refused."""
    whole = tmp_path / "whole"
    train(1, [flags_of(setting, whole, 1, max_steps=3)])
    helpers.make_model("bert", tmp_path / "other", initializer_range=0.1)
    helpers.make_tokenizer("wordpiece", tmp_path / "other")
    changes = {
        "--model_name_or_path is not the model": {"model_name_or_path": str(tmp_path / "other")},
        "exactly (lora_rank: ": {"lora_rank": 8},
    }
    again = [
        {**flags_of(setting, tmp_path / f"{n}", 1, max_steps=3, resume_from_checkpoint=str(whole / "checkpoint-3")), **more}
        for n, more in enumerate(changes.values())
    ]
    errors = train(1, again, "print").splitlines()
    errors = [line for line in errors if "belongs to another run" in line]
    for words, error in zip(changes, errors, strict=True):
        assert words in error


def test_ranks_and_stages_train_alike(tmp_path, setting):
    """Without dropout, one rank and two ranks, sharded and not, learn the same, with recomputed activations too."""
    helpers.make_model("bert", tmp_path / "model")
    helpers.make_tokenizer("wordpiece", tmp_path / "model")
    plain = {"model_name_or_path": str(tmp_path / "model"), "lora_dropout": 0.0, "save_strategy": "no"}
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    fresh = {"gradient_checkpointing": True}
    runs = {
        1: {"one": (1, {"per_device_train_batch_size": 4})},
        2: {"two": (2, {}), "zero3": (3, {}), "fresh": (3, fresh), "reentrant": (2, reentrant)},
    }
    for ranks, kinds in runs.items():
        given = []
        for name, (stage, more) in kinds.items():
            flags = flags_of(setting, tmp_path / name, stage, **{**plain, **more})
            del flags["save_steps"]
            given.append(flags)
        train(ranks, given)
    first = losses(tmp_path / "one")
    for name in ("two", "zero3", "fresh", "reentrant"):
        other = losses(tmp_path / name)
        assert first.keys() == other.keys()
        assert all(np.allclose(first[step], other[step], rtol=1e-4) for step in first), name
