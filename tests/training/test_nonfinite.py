"""A step that is not finite leaves no trace but its count, at every ZeRO stage; too many in a row end the run."""

from __future__ import annotations

import json
import math
import re

import helpers
import pytest
import torch
from safetensors.torch import load_file

from bge_ds.checkpoint import checkpoint
from bge_ds.health import exit_codes


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return helpers.make_training_folder(tmp_path_factory.mktemp("setting"))


def arguments(setting, name: str, output, **changes) -> dict:
    own = {"train_data": str(setting / "groups.jsonl"), "train_group_size": 3, "negatives_cross_device": True}
    if name == "pretrain":
        own = {"train_data": str(setting / "texts.jsonl"), "max_seq_length": 40, "gradient_accumulation_steps": 2}
    return {
        "model_name_or_path": str(setting / "model"), "output_dir": str(output), "cache_dir": str(setting / "cache"),
        "per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3,
        "warmup_steps": 4, "weight_decay": 0.1, "dataloader_num_workers": 0, **own, **changes,
    }  # fmt: skip


def records(folder) -> dict[int, dict]:
    return {r["step"]: r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


CASES = {
    "0": {}, "1": {}, "2": {}, "3": {}, "0-unclipped": {"max_grad_norm": 0.0}, "2-unclipped": {"max_grad_norm": 0.0},
    "0-bf16": {"bf16": True}, "1-bf16": {"bf16": True}, "2-bf16": {"bf16": True}, "3-bf16": {"bf16": True},
    "2_offload": {}, "3_offload": {},
    "0-pieces": {"sub_batch_size": 3}, "2-pieces": {"sub_batch_size": 3}, "3-pieces-bf16": {"sub_batch_size": 3, "bf16": True},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, setting, case):
    """NaN on one rank in the third of six steps: from there on the run is, to the last bit, the one in which that step was
    left out: weights, moments (later steps need them) and schedule. In pre-training the NaN is in the first of two
    micro batches. The step is counted, and no other."""
    plans, names = [], ["finetune", *(["pretrain"] if "pieces" not in case else [])]
    for name in names:
        for how in ("poisoned", "left_out"):
            args = arguments(setting, name, tmp_path / f"{name}_{how}", deepspeed="zero" + case.split("-")[0], **CASES[case])
            plans.append({"name": name, "args": args, "poisoned": [], "left_out": [], how: [3]})
    out = helpers.run_ranks("nonfinite", 2, json.dumps(plans))
    assert re.findall(r"status (\d+)", out) == ["0"] * 4 * len(names)  # two runs on two ranks
    for name in names:
        file = "model.safetensors" if name == "finetune" else "encoder_model/model.safetensors"
        poisoned, left_out = (records(tmp_path / f"{name}_{how}") for how in ("poisoned", "left_out"))
        assert poisoned[3]["loss"] is None
        for step in (1, 2, 4, 5, 6):
            for key in ("loss", "learning_rate", "grad_norm"):
                assert poisoned[step][key] == left_out[step][key], (step, key)
        assert poisoned[3]["learning_rate"] == poisoned[4]["learning_rate"] < poisoned[5]["learning_rate"]
        assert [poisoned[step]["nonfinite_steps"] for step in range(1, 7)] == [0, 0, 1, 0, 0, 0]
        assert [poisoned[step]["nonfinite_steps_total"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
        found, expected = (load_file(tmp_path / f"{name}_{how}" / file) for how in ("poisoned", "left_out"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)
        start = load_file(setting / "model" / "model.safetensors")
        assert all(torch.isfinite(found[k]).all() for k in found)
        assert any(not torch.equal(found[k], start[s]) for k in found for s in start if s.endswith(k))  # it did learn


@pytest.mark.parametrize("name", ["finetune", "pretrain"])
def test_too_many_in_a_row_end_the_run(tmp_path, setting, name):
    """Steps 3, 5 and 6 of 8 are not finite and --max_nonfinite_steps is 2: both ranks stop after step 6 with the exit status
    for it, the message names the checkpoint of step 4 and the rank at fault, and each rank has written its texts of step 6."""
    args = arguments(
        setting, name, tmp_path / "out", deepspeed="zero1", max_steps=8, max_nonfinite_steps=2, save_strategy="steps",
        save_steps=2, logging_steps=2,
    )  # fmt: skip
    plan = {"name": name, "args": args, "poisoned": [3, 5, 6, 7, 8], "left_out": []}
    out = helpers.run_ranks("nonfinite", 2, json.dumps([plan]))
    assert out.count(f"status {exit_codes.DIVERGED}") == 2, out
    assert f"the last checkpoint is {tmp_path / 'out' / 'checkpoint-4'}" in out
    # The vectors of the poisoned rank reach the other's loss where they are its negatives.
    assert f"the loss of rank {'0, 1' if name == 'finetune' else '1'} is not finite" in out
    assert "step 5: skipped, its loss or gradient is not finite (1 in a row)" in out
    found = records(tmp_path / "out")
    assert sorted(found) == [2, 4] and [found[step]["nonfinite_steps"] for step in (2, 4)] == [0, 1]
    assert math.isfinite(found[4]["loss"])  # of step 4 alone
    last = tmp_path / "out" / "checkpoint-4"
    assert checkpoint.newest(tmp_path / "out") == last
    texts = [json.loads(line)["text"] for line in (setting / "texts.jsonl").read_text().splitlines()]
    for rank in (0, 1):
        lines = (tmp_path / "out" / "nonfinite" / f"step-000006-rank-{rank}.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in lines]
        roles = [line["role"] for line in lines]
        assert roles == (["query"] * 2 + ["passage"] * 6 if name == "finetune" else ["text"] * 4)
        assert all(0 <= line["row"] < 9 for line in lines)
        if name == "finetune":  # two groups of three: the rows of the queries, each for its passages
            assert [line["row"] for line in lines[2:]] == [line["row"] for line in lines[:2] for _ in range(3)]
        else:
            assert [line["micro_batch"] for line in lines] == [0, 0, 1, 1]
            assert all(same(line["text"], texts[line["row"]]) for line in lines)


def test_steps_in_a_row_count_across_a_resume(tmp_path, setting):
    """Step 4 was skipped before the checkpoint, step 5 after it: two in a row, which --max_nonfinite_steps 2 ends as it ended
    the run that was not stopped. A run that dies time and again must not skip for ever."""
    common = {"deepspeed": "zero1", "max_steps": 8, "max_nonfinite_steps": 2, "save_strategy": "steps", "save_steps": 4}
    first = arguments(setting, "finetune", tmp_path / "first", **common)
    resume = str(tmp_path / "first" / "checkpoint-4")
    second = arguments(setting, "finetune", tmp_path / "second", resume_from_checkpoint=resume, **common)
    plans = [{"name": "finetune", "args": args, "poisoned": [4, 5], "left_out": []} for args in (first, second)]
    out = helpers.run_ranks("nonfinite", 2, json.dumps(plans))
    assert out.count(f"status {exit_codes.DIVERGED}") == 4, out
    assert out.count("step 5: 2 steps in a row were skipped as not finite") == 2  # once a run
    assert out.count("step 4: skipped") == 1 and f"resumed from {resume} at step 4" in out


def same(decoded: str, text: str) -> bool:
    """A decoded text is the original but for spaces, case and what the tiny vocabulary lacks."""
    words = decoded.replace("[CLS]", "").replace("[SEP]", "").split()
    return bool(words) and sum(word in text.lower() for word in words) >= 0.7 * len(words)
