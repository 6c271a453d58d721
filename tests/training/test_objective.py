"""A new objective needs no copy of set-up, resuming, logging or saving."""

import inspect
import json

import helpers
import pytest
import torch
from programs import toy_objective
from safetensors.torch import load_file

from bge_ds.data.preprocess import prepare


@pytest.mark.parametrize("stage", [1, 3])
def test_a_toy_objective_trains_checkpoints_and_resumes_exactly(tmp_path, stage):
    """Under 60 lines of its own, two ranks: losses and weights after a resume equal those of a run that was not stopped.

    Without it, an objective could come to need parts of the loop that only the two shipped ones bring."""
    base = helpers.make_training_folder(tmp_path / "base")
    prepare.prepare_all(
        "pretrain", [str(base / "texts.jsonl")], toy_objective.validate.load_tokenizer(str(base / "model"), None), False,
        max_seq_length=40, word_segmenter="none", explicit=frozenset(), cache_dir=str(base / "cache"), on_error="raise",
        verify_data=True, say=print,
    )  # fmt: skip
    (manifest,) = (base / "cache").rglob("manifest.json")
    flags = {
        "model_name_or_path": str(base / "model"), "train_data": str(manifest.parent), "deepspeed": f"zero{stage}",
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_seq_length": 40, "use_cpu": True,
        "dataloader_num_workers": 0,
    }  # fmt: skip
    helpers.run_ranks("toy_objective", 2, tmp_path, json.dumps(flags))

    whole, resumed = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "resumed")
    )
    told = [{name: record[name] for name in ("step", "loss", "grad_norm", "learning_rate")} for record in whole]
    assert len(told) == 6 and told[5]["loss"] < told[0]["loss"]
    assert [{name: record[name] for name in told[0]} for record in resumed] == told[3:]
    expected, found = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "resumed"))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    classes = (toy_objective.ToyObjective, toy_objective.Averages)
    assert sum(len(inspect.getsource(of).splitlines()) for of in classes) < 60
