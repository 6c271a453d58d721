"""--torch_compile under the engine: both commands train as without it, resume exactly, and save stock models."""

from __future__ import annotations

import json
import shutil

import helpers
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

# Without a C++ compiler the graphs run uncompiled: all but the code made of them.
BACKEND = "inductor" if shutil.which("g++") else "aot_eager"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny BERT with dropout (`model`), one without (`exact`), groups and texts."""
    base = helpers.make_training_folder(tmp_path_factory.mktemp("setting"))
    helpers.make_model("bert", base / "exact")
    helpers.make_tokenizer("wordpiece", base / "exact")
    return base


def arguments(setting, name, output, model="exact", **changes) -> dict:
    own = {"train_data": str(setting / "groups.jsonl"), "train_group_size": 3, "negatives_cross_device": True}
    if name == "pretrain":
        own = {"train_data": str(setting / "texts.jsonl"), "max_seq_length": 40}
    return {
        "model_name_or_path": str(setting / model), "output_dir": str(output), "cache_dir": str(setting / "cache"),
        "per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3,
        "dataloader_num_workers": 0, **own, **changes,
    }  # fmt: skip


def compiled(**more) -> dict:
    return {"torch_compile": True, "torch_compile_backend": BACKEND, "token_bucket": 128, **more}


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(ranks, *plans) -> list[int]:
    """The numbers of graphs after each run, on all ranks; fails where a run did."""
    out = helpers.run_ranks("statuses", ranks, json.dumps(plans))
    found = [line.split() for line in out.splitlines() if line.startswith("status ")]
    assert len(found) == ranks * len(plans) and all(words[1] == "0" for words in found), out
    return [int(words[3]) for words in found]


@pytest.mark.parametrize(
    ("stage", "name", "more"),
    [
        (0, "finetune", {}),
        (1, "finetune", {"sub_batch_size": 3, "gradient_checkpointing": True}),
        (2, "finetune", {"sub_batch_tokens": 60}),
        (1, "pretrain", {}),
        (2, "pretrain", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ],
)
def test_a_compiled_run_is_the_plain_run(tmp_path, setting, stage, name, more):
    """Two ranks, in pieces, with layers computed again: losses and norms of the gradient to rounding, padding counted alike,
    and the saved model is the stock one, names and all."""
    more = {"deepspeed": f"zero{stage}", **more}
    plans = [
        (name, arguments(setting, name, tmp_path / "plain", **more)),
        (name, arguments(setting, name, tmp_path / "compiled", **more, **compiled())),
    ]
    graphs = run(2, *plans)
    assert sorted(graphs)[:2] == [0, 0] and min(sorted(graphs)[2:]) > 0
    plain, found = records(tmp_path / "plain"), records(tmp_path / "compiled")
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    for mine, theirs in zip(found, plain, strict=True):
        # Fused sums are rounded elsewhere, and Adam's first steps turn a small gradient's rounding into a step's length.
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert mine["padding_saved"] == theirs["padding_saved"]
    assert len({r["loss"] for r in found}) == 4
    folder, auto = (tmp_path / "compiled", AutoModel) if name == "finetune" else (
        tmp_path / "compiled" / "encoder_model", AutoModelForMaskedLM)  # fmt: skip
    names = load_file(folder / "model.safetensors").keys()
    assert names == load_file(tmp_path / "plain" / folder.relative_to(tmp_path / "compiled") / "model.safetensors").keys()
    _, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_compiled_run_resumes_exactly(tmp_path, setting):
    """With dropout, in pieces, from step 2 in a process that has compiled nothing: the run that never stopped, to the bit."""
    more = {"sub_batch_size": 4, "save_strategy": "steps", "save_steps": 2, **compiled()}
    run(1, ("finetune", arguments(setting, "finetune", tmp_path / "whole", "model", **more)))
    resume = {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2")}
    run(1, ("finetune", arguments(setting, "finetune", tmp_path / "resumed", "model", **more, **resume)))
    losses, whole = ([r["loss"] for r in records(tmp_path / folder)] for folder in ("resumed", "whole"))
    assert losses == whole[2:] and len(losses) == 2
    found, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("resumed", "whole"))
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_what_does_not_compile_is_refused(tmp_path, setting):
    """ZeRO 3, whose hooks part the graphs and free the weights that they hold, and a padded backbone: nothing is written."""
    helpers.make_model("mpnet", tmp_path / "mpnet", vocab_size=360)
    helpers.make_tokenizer("bytes", tmp_path / "mpnet")
    plans = [
        ("finetune", arguments(setting, "finetune", tmp_path / "out", deepspeed="zero3", **compiled())),
        ("pretrain", arguments(setting, "pretrain", tmp_path / "out", deepspeed="zero3", **compiled())),
        ("finetune", arguments(setting, "finetune", tmp_path / "out", **compiled())
         | {"model_name_or_path": str(tmp_path / "mpnet")}),
    ]  # fmt: skip
    out = helpers.run_ranks("statuses", 1, json.dumps(plans))
    assert out.count("status 2") == 3 and not (tmp_path / "out").exists(), out
    assert out.count("error: --torch_compile does not work at ZeRO 3") == 2
    assert "error: --torch_compile: mpnet is not one of the families that run without padding" in out
