"""The walk over transformers' names: each that a user of its Trainer may type is honoured or refused, never dropped."""

import ast
import dataclasses
from pathlib import Path

from test_arguments import BOTH, as_words, default_of, error, fields_of, ok
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

import bge_ds
from bge_ds.config.arguments import FinetuneArguments
from bge_ds.config.huggingface_names import ACCEPTED, ALIASES, REFUSED, refusal
from bge_ds.config.parser import _newer_defaults
from bge_ds.config.validation import SCHEDULES

INSTALLED = {f.name: f for f in dataclasses.fields(TrainingArguments)}
# Names of 4.x versions that are gone from 5.x, with their defaults there (4.57, and earlier for the second group).
OLD_NAMES = {
    "overwrite_output_dir": False, "per_gpu_train_batch_size": None, "per_gpu_eval_batch_size": None,
    "warmup_ratio": 0.0, "logging_dir": None, "save_safetensors": True, "no_cuda": False, "use_mps_device": False,
    "jit_mode_eval": False, "fp16_opt_level": "O1", "half_precision_backend": "auto", "tpu_num_cores": None,
    "tpu_metrics_debug": False, "past_index": -1, "fsdp_min_num_params": 0,
    "fsdp_transformer_layer_cls_to_wrap": None, "adafactor": False, "group_by_length": False,
    "use_legacy_prediction_loop": False, "include_inputs_for_metrics": False, "fp16_backend": "auto",
    "push_to_hub_model_id": None, "push_to_hub_organization": None, "push_to_hub_token": None, "mp_parameters": "",
    "torchdynamo": None, "ray_scope": "last", "include_tokens_per_second": False,
    "evaluation_strategy": "no", "evaluate_during_training": False, "use_ipex": False, "dispatch_batches": None,
    "split_batches": None, "sharded_ddp": "", "xpu_backend": None, "tp_size": 0, "trackio_space_id": "trackio",
}  # fmt: skip
# Defaults of ours that differ from the installed version's on purpose.
OWN_DEFAULTS = {"output_dir", "logging_steps", "save_strategy", "dataloader_num_workers", "deepspeed", "report_to",
                "hub_strategy"}  # fmt: skip


@BOTH
def test_every_name_of_the_trainer_has_one_place(cls):
    """A name that is in no table would be dropped or answered by chance; in two, which one wins is luck."""
    assert len(INSTALLED) > 90 and len(fields_of(cls)) > 60  # the walk walks over something
    for name in [*INSTALLED, *OLD_NAMES]:
        places = [name in table for table in (fields_of(cls), ALIASES, REFUSED)]
        assert places.count(True) == 1, name


@BOTH
def test_defaults_of_refused_names_pass_and_other_values_stop(cls, capsys):
    """Scripts spell out defaults, which must run; a value that asks for something must never be dropped in silence."""
    olds = {name: value for name, value in OLD_NAMES.items() if name in REFUSED}
    defaults = {name: default_of(INSTALLED[name]) for name in INSTALLED if name in REFUSED} | olds
    assert len(defaults) > 70
    words = [word for name, value in defaults.items() if as_words(value) for word in (f"--{name}", *as_words(value))]
    assert ok(cls, *words) == ok(cls)
    for name, default in defaults.items():
        assert refusal(name, as_words(default) or ["None"]) is None, name
    asking = [name for name in defaults if set(ACCEPTED.get(name, ())) != {True, False}]
    assert len(asking) > 60
    for name in asking:
        assert f"--{name} is refused: {REFUSED[name]}" in error(capsys, cls, f"--{name}", "something-else"), name


@BOTH
def test_honoured_names_keep_the_trainers_defaults(cls):
    """A script that leaves a flag out means the Trainer's default; where ours differs, it is on the list above."""
    ours, compared = fields_of(cls), 0
    for name in (INSTALLED.keys() & ours.keys()) - OWN_DEFAULTS:
        theirs = getattr(default_of(INSTALLED[name]), "value", default_of(INSTALLED[name]))
        assert default_of(ours[name]) == (False if theirs is None and ours[name].type is bool else theirs), name
        compared += 1
    assert compared > 40
    assert all(default_of(ours[name]) == OLD_NAMES[name] for name in OLD_NAMES.keys() & ours.keys())


def test_reasons_are_reasons():
    """An empty or copied-in-passing reason helps nobody; every accepted value belongs to a refused name."""
    assert all(len(reason) > 20 for reason in REFUSED.values())
    assert ACCEPTED.keys() <= REFUSED.keys() and not ALIASES.keys() & REFUSED.keys()


def test_a_name_that_only_a_newer_transformers_has_is_refused(monkeypatch, capsys):
    """A later transformers adds settings; they must stop a run too, except at their default."""
    monkeypatch.setattr("bge_ds.config.parser._newer_defaults", lambda: {"warp_drive": "off", "shields": False})
    assert "--warp_drive is refused: this setting of" in error(capsys, FinetuneArguments, "--warp_drive", "on")
    assert "--shields is refused" in error(capsys, FinetuneArguments, "--shields")
    assert ok(FinetuneArguments, "--warp-drive", "off", "--shields=False", "--bf16").bf16
    monkeypatch.undo()
    assert _newer_defaults().keys() == INSTALLED.keys()


def test_schedules_are_those_of_transformers_that_need_no_metric():
    """A schedule that transformers knows must be offered or refused by name."""
    assert set(SCHEDULES) == {s.value for s in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}


@BOTH
def test_every_setting_is_read_somewhere(cls):
    """A field that no code reads is a flag accepted and ignored."""
    package = Path(bge_ds.__file__).parent
    other = "objectives/retromae.py" if cls is FinetuneArguments else "objectives/contrastive.py"
    paths = [path for path in package.rglob("*.py") if path.parent.name != "config" and path != package / other]
    trees = [ast.parse(path.read_text()) for path in paths]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    constants = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    read |= {value for value in constants if isinstance(value, str)}
    elsewhere = {"save_steps", "local_rank"}  # through save_every; launchers set LOCAL_RANK to the same
    by_check = {"greater_is_better", "hub_strategy", "pad_to_multiple_of"} | (
        {"average_tokens_across_devices", "use_mrl"} if cls is FinetuneArguments else set()
    )
    unread = fields_of(cls).keys() - read - elsewhere - by_check
    assert not unread, sorted(unread)
