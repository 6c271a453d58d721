"""Flags: their spellings, the mistakes in them, what follows from them, and JSON files in their place."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

import bge_ds
from bge_ds.config.arguments import FinetuneArguments, PretrainArguments, RerankArguments, changed, describe, parse, steps_from
from bge_ds.config.parser import groups_of
from bge_ds.config.run_config import with_values
from bge_ds.data.preprocess.instructions import before
from bge_ds.training import setup

pytestmark = pytest.mark.core

REQUIRED = {
    PretrainArguments: ["--output_dir", "out", "--train_data", "data"],
    FinetuneArguments: ["--output_dir", "out", "--train_data", "data", "--model_name_or_path", "model"],
    RerankArguments: ["--output_dir", "out", "--train_data", "data", "--model_name_or_path", "model"],
}
ALL = pytest.mark.parametrize("cls", REQUIRED, ids=lambda cls: cls.command)
BOTH = pytest.mark.parametrize("cls", [PretrainArguments, FinetuneArguments], ids=lambda cls: cls.command)


def fields_of(cls):
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def ok(cls, *flags):
    return parse(cls, [*REQUIRED[cls], *map(str, flags)])


def error(capsys, cls, *flags, argv=None):
    """The message that `flags` end in; fails where they are taken."""
    with pytest.raises(SystemExit) as stop:
        parse(cls, [*REQUIRED[cls], *map(str, flags)] if argv is None else argv)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1
    return text


def default_of(field):
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def as_words(value):
    value = getattr(value, "value", value)
    return [] if value is None or value == [] else [str(value)]


# --- spellings --------------------------------------------------------------------------------------------------------


def test_the_contract_command_lines_parse():
    """The literal commands that users of the existing trainer type."""
    flags = (
        "--learning_rate 1e-5 --num_train_epochs 5 --normlized True --temperature 0.01 --query_max_len 32 "
        "--passage_max_len 128 --negatives_cross_device --local_rank=1"
    )
    args = ok(FinetuneArguments, *flags.split())
    assert (args.learning_rate, args.num_train_epochs, args.normalize_embeddings) == (1e-5, 5.0, True)
    assert (args.temperature, args.negatives_cross_device, args.local_rank) == (0.01, True, 1)
    assert {"normalize_embeddings", "temperature", "negatives_cross_device"} <= args.explicit
    assert not {"train_group_size", "normlized"} & args.explicit
    flags = "--learning_rate 2e-5 --num_train_epochs 5 --max_seq_length 512"
    args = ok(PretrainArguments, *flags.split())
    assert args.model_name_or_path == "bert-base-uncased" and "max_seq_length" in args.explicit


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--bf16"], "bf16", True),
        (["--bf16", "True"], "bf16", True),
        (["--bf16=no"], "bf16", False),
        (["--no_use_inbatch_neg"], "use_inbatch_neg", False),
        (["--no-use-inbatch-neg"], "use_inbatch_neg", False),
        (["--use_inbatch_neg", "False"], "use_inbatch_neg", False),
        (["--no_normlized"], "normalize_embeddings", False),
        (["--normalize-embeddings", "False"], "normalize_embeddings", False),
        (["--train-group-size", "4"], "train_group_size", 4),
        (["--local-rank", "3"], "local_rank", 3),
        (["--per_gpu_train_batch_size", "4"], "per_device_train_batch_size", 4),
        (["--no_cuda"], "use_cpu", True),
        (["--activation_checkpointing"], "gradient_checkpointing", True),
        (["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        (["--warmup_ratio", "0", "--warmup_steps", "7"], "warmup_steps", 7),
        (["--warmup_ratio", "0.1", "--warmup_steps", "0"], "warmup_steps", 0.1),
        (["--learning_rate", "1", "--learning_rate", "2"], "learning_rate", 2.0),
        (["--report_to", "wandb", "csv"], "report_to", ["wandb", "csv"]),
        (["--report_to", "none"], "report_to", []),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", "auto"),
        (["--resume_from_checkpoint", "True"], "resume_from_checkpoint", "auto"),
        (["--resume_from_checkpoint", "False"], "resume_from_checkpoint", None),
        (["--resume_from_checkpoint", "out/checkpoint-3"], "resume_from_checkpoint", "out/checkpoint-3"),
        (["--include_num_input_tokens_seen"], "include_num_input_tokens_seen", "all"),
        (["--include_num_input_tokens_seen", "False"], "include_num_input_tokens_seen", "no"),
        (["--tf32", "False"], "tf32", False),
        (["--save_steps", "0.25"], "save_steps", 0.25),
        (["--lr_scheduler_kwargs", '{"last_epoch": 2}'], "lr_scheduler_kwargs", {"last_epoch": 2}),
        (["--query_instruction_for_retrieval", ""], "query_instruction_for_retrieval", None),
        (["--query_instruction_for_retrieval", "-> "], "query_instruction_for_retrieval", "-> "),
        (["--output_dir", "~/x"], "output_dir", str(Path("~/x").expanduser())),
        (["--do_train", "--skip_memory_metrics", "False", "--overwrite_output_dir"], "overwrite_output_dir", True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else None,
)  # fmt: skip
def test_spellings(flags, name, value):
    """Each spelling that HfArgumentParser or the existing trainers take sets the same field to the same value."""
    args = ok(FinetuneArguments, *flags)
    assert getattr(args, name) == value and type(getattr(args, name)) is type(value)
    assert name in args.explicit


@ALL
def test_any_flag_may_be_given_its_own_default(cls):
    """What `describe` prints can be typed back: nothing contradicts a default."""
    defaults = {name: default_of(f) for name, f in fields_of(cls).items() if f"--{name}" not in REQUIRED[cls]}
    words = [word for name, value in defaults.items() if as_words(value) for word in (f"--{name}", *as_words(value))]
    if cls is FinetuneArguments:
        assert "--temperature" in words
    got = ok(cls, *words)
    assert got == ok(cls) and len(got.explicit) > 40 and not changed(got)


def test_negations_of_refused_switches_are_refused_too(capsys):
    """`--no_X` turns a default-on setting off, which is as much a request as turning one on."""
    assert "--dataloader_in_order is refused" in error(capsys, FinetuneArguments, "--no_dataloader_in_order")
    assert "--save_safetensors is refused" in error(capsys, FinetuneArguments, "--no-save-safetensors")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--normlized", "True", "--normalize_embeddings", "False"], ["--normlized", "--normalize_embeddings"]),
        (["--per_gpu_train_batch_size", "4", "--per_device_train_batch_size", "8"], ["--per_gpu", "--per_device"]),
        (["--warmup_ratio", "0.1", "--warmup_steps", "5"], ["--warmup_ratio", "--warmup_steps"]),
        (["--warmup_ratio", "1.5"], ["--warmup_ratio", "below 1"]),
        (["--learning_rat", "1"], ["unknown flag --learning_rat", "--learning_rate"]),
        (["--eval_stratgy", "no"], ["unknown flag", "--eval_strategy"]),
        (["--zzzz"], ["unknown flag --zzzz"]),
        (["--bf16", "--", "x"], ["x"]),
        (["--seed", "1", "2"], ["unexpected value '2'"]),
        (["--seed", "1.5"], ["--seed", "invalid int value"]),
        (["--seed", "-1"], ["--seed", "4294967295"]),
        (["--bf16", "perhaps"], ["--bf16", "perhaps"]),
        (["--bf16", "--fp16"], ["--bf16", "--fp16"]),
        (["--temperature", "0"], ["--temperature", "above 0"]),
        (["--temperature", "nan"], ["--temperature", "above 0"]),
        (["--temperature", "0.6"], ["--temperature 0.6", "--normalize_embeddings", "0.5"]),
        (["--temperature", "0.02", "--normlized", "False"], ["--temperature 0.02", "--normalize_embeddings False"]),
        (["--learning_rate", "inf"], ["--learning_rate", "finite"]),
        (["--train_group_size", "0"], ["--train_group_size", "at least 1"]),
        (["--train_group_size", "1", "--use_inbatch_neg", "False"], ["nothing to compare"]),
        (["--train_group_size", "1", "--per_device_train_batch_size", "1"], ["nothing to compare"]),
        (["--negatives_cross_device", "--no_use_inbatch_neg"], ["--negatives_cross_device", "--use_inbatch_neg False"]),
        (["--query_max_len", "2"], ["--query_max_len", "3"]),
        (["--sentence_pooling_method", "max"], ["max", "cls", "mean", "last_token"]),
        (["--max_steps", "0"], ["--max_steps", "-1"]),
        (["--num_train_epochs", "0"], ["--num_train_epochs"]),
        (["--logging_steps", "1.5"], ["--logging_steps", "whole number"]),
        (["--save_steps", "0"], ["--save_steps", "above 0"]),
        (["--save_strategy", "epoch", "--save_steps", "100"], ["--save_steps 100", "--save_strategy"]),
        (["--save_strategy", "no", "--save_total_limit", "2"], ["--save_total_limit 2", "--save_strategy"]),
        (["--save_strategy", "best"], ["best", "no metric", "--eval_data"]),
        (["--save_strategy", "worst"], ["worst", "no, steps, epoch, best"]),
        (["--eval_steps", "10"], ["--eval_steps 10", "--eval_data"]),
        (["--eval_strategy", "steps"], ["--eval_strategy steps", "--eval_data"]),
        (["--load_best_model_at_end"], ["--load_best_model_at_end", "--eval_data"]),
        (["--eval_data", "d", "--eval_strategy", "no"], ["--eval_data", "--eval_strategy no"]),
        (["--eval_data", "d", "--eval_strategy", "epoch", "--eval_steps", "5"], ["--eval_steps 5", "--eval_strategy steps"]),
        (["--eval_data", "d", "--eval_steps", "1.5"], ["--eval_steps", "whole number"]),
        (["--eval_data", "d", "--eval_delay", "-1"], ["--eval_delay", "at least 0"]),
        (["--eval_data", "d", "--greater_is_better", "False"], ["--greater_is_better False", "nDCG"]),
        (["--eval_data", "d", "--load_best_model_at_end", "--save_strategy", "no"], ["--load_best", "--save_strategy no"]),
        (["--do_eval"], ["--do_eval is refused", "--eval_data FOLDER"]),
        (["--logging_strategy", "epoch", "--logging_steps", "5"], ["--logging_steps 5", "--logging_strategy"]),
        (["--dataloader_num_workers", "0", "--dataloader_prefetch_factor", "2"], ["--dataloader_num_workers"]),
        (["--token_bucket", "512"], ["--token_bucket 512 has no effect", "--torch_compile"]),
        (["--torch_compile", "--token_bucket", "0"], ["--token_bucket is 0", "at least 1"]),
        (["--torch_compile_backend", "eager"], ["--torch_compile_backend eager has no effect", "--torch_compile"]),
        (["--torch_compile", "--torch_compile_mode", "reduce-overhead"], ["--torch_compile_mode is refused", "CUDA graphs"]),
        (["--save_only_model", "--resume_from_checkpoint", "auto"], ["--save_only_model", "--resume_from_checkpoint"]),
        (["--optim", "adafactor"], ["--optim adafactor", '"optimizer" section', "adamw_torch_fused"]),
        (["--lr_scheduler_type", "greedy"], ["greedy", "metric", "cosine"]),
        (["--lr_scheduler_type", "cosine_with_min_lr"], ["min_lr_rate", "--lr_scheduler_kwargs"]),
        (["--lr_scheduler_type", "constant", "--warmup_steps", "5"], ["constant_with_warmup"]),
        (["--lr_scheduler_kwargs", "{power: 2}"], ["--lr_scheduler_kwargs", "not JSON"]),
        (["--lr_scheduler_kwargs", "[1]"], ["--lr_scheduler_kwargs", "not a JSON object"]),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'], ["--gradient_checkpointing is not"]),
        (["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"offload": 1}'], ["offload", "reentrant"]),
        (["--train_sampling_strategy", "batch_rebalance"], ["batch_rebalance", "equal shares", "group_by_length"]),
        (["--group_by_length", "--train_sampling_strategy", "random"], ["--group_by_length", "random exclude each other"]),
        (["--mixing_temperature", "0"], ["--mixing_temperature is 0", "above 0"]),
        (["--report_to", "mlflow"], ["mlflow", "tensorboard"]),
        (["--report_to", "none", "csv"], ["none excludes"]),
        (["--deepspeed", "{}"], ["--deepspeed", "path"]),
        (["--use_cpu", "--ddp_backend", "nccl"], ["--use_cpu", "--ddp_backend nccl"]),
        (["--average_tokens_across_devices", "False"], ["--average_tokens_across_devices"]),
        (["--sub_batch_size", "0"], ["--sub_batch_size is 0", "at least 1"]),
        (["--sub_batch_size", "4", "--sub_batch_tokens", "4"], ["--sub_batch_size", "--sub_batch_tokens"]),
        (["--sub_batch_tokens", "4", "--gradient_accumulation_steps", "2"], ["--sub_batch_tokens", "--per_device_train_batch"]),
        (["--bidirectional", "--use_inbatch_neg", "False"], ["--bidirectional", "--use_inbatch_neg False"]),
        (["--use_mrl"], ["--use_mrl", "--mrl_dims"]),
        (["--mrl_dims", "8"], ["--use_mrl", "--mrl_dims"]),
        (["--use_mrl", "--mrl_dims", "0", "8"], ["--mrl_dims [0, 8]", "at least 1"]),
        (["--knowledge_distillation", "--train_group_size", "1"], ["--knowledge_distillation", "--train_group_size 1"]),
        (["--kd_loss_type", "m3_kd_loss"], ["--kd_loss_type m3_kd_loss", "--knowledge_distillation"]),
        (["--query_instruction_format", "{}: {} ?"], ["--query_instruction_format '{}: {} ?'", "at the end the text's"]),
        (["--query_instruction_format", "{instruction}{}"], ["must hold {} twice"]),
        (["--passage_instruction_format", "{}\\n{}"], ["no effect without --passage_instruction_for_retrieval"]),
        (["--small_threshold", "5"], ["--small_threshold 5 has no effect without --same_dataset_within_batch"]),
        (["--same_dataset_within_batch", "--drop_threshold", "5"], ["--drop_threshold 5", "without --small_threshold"]),
        (["--small_threshold", "-1"], ["--small_threshold is -1"]),
        (["--additional_special_tokens", "<a>", " "], ["--additional_special_tokens holds an empty token"]),
        (["--use_slow_tokenizer", "True"], ["--use_slow_tokenizer is refused"]),
        (["--shuffle_ratio", "0.1"], ["--shuffle_ratio is refused"]),
        (["--false_negative_margin_type", "relative"], ["--false_negative_margin_type", "no effect"]),
        (["--false_negative_margin", "nan"], ["--false_negative_margin is nan", "finite"]),
        (["--learnable_temperature", "--normalize_embeddings", "False"], ["--learnable_temperature", "--normalize_embed"]),
        (["--model_name_or_path", ""], ["--model_name_or_path"]),
        (["--kernels", "fused"], ["--kernels fused: fine-tuning takes fused kernels wherever they run", "use auto, or torch"]),
        (["--trust_remote_code", "True"], ["--trust_remote_code is refused"]),
        (["--hub_revision", "v1", "--do_eval", "True"], ["--hub_revision is refused", "--do_eval is refused"]),
        (["--hub_token", "secret"], ["--hub_token is refused", "set HF_TOKEN"]),
        (["--push_to_hub_organization", "us"], ["--hub_model_id ORGANISATION/NAME"]),
        (["--hub_model_id", "us/model"], ["--hub_model_id us/model has no effect without --push_to_hub"]),
        (["--hub_private_repo"], ["--hub_private_repo True has no effect without --push_to_hub"]),
        (["--push_to_hub", "--hub_strategy", "every_save"], ["--hub_strategy every_save is refused", "uploaded once"]),
        (["--hub_strategy", "checkpoint"], ["--hub_strategy checkpoint is refused", "checkpoints stay here"]),
        (["--license", "My Own"], ["--license My Own is not a licence identifier", "apache-2.0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)  # fmt: skip
def test_mistakes_name_the_culprit_and_the_remedy(capsys, flags, parts):
    """Each wrong or contradictory setting stops the run with one line that names every flag concerned."""
    text = error(capsys, FinetuneArguments, *flags)
    assert all(part in text for part in parts), text


def test_missing_required_flags_are_named(capsys):
    """A run without its data or folder must not start."""
    text = error(capsys, FinetuneArguments, argv=[])
    assert "--output_dir" in text and "--train_data" in text and "--model_name_or_path" in text


def test_pretraining_from_scratch_needs_configuration_and_tokenizer(capsys):
    """An empty model name means random weights; a configuration beside a real model would have no effect."""
    scratch = ["--model_name_or_path", "", "--config_name", "c", "--tokenizer_name", "t"]
    assert ok(PretrainArguments, *scratch).model_name_or_path == ""
    assert "needs --tokenizer_name" in error(capsys, PretrainArguments, *scratch[:4])
    assert "needs --config_name" in error(capsys, PretrainArguments, *scratch[:2])
    text = error(capsys, PretrainArguments, "--config_name", "c")
    assert "--config_name c" in text and "--model_name_or_path is bert-base-uncased" in text
    for flag in ("--encoder_mlm_probability 1", "--decoder_mlm_probability 0", "--max_seq_length 2"):
        assert flag.split()[0] in error(capsys, PretrainArguments, *flag.split())
    assert ok(PretrainArguments, "--average_tokens_across_devices", "False").average_tokens_across_devices is False


def test_a_micro_batch_is_of_tokens_or_of_texts(capsys):
    """Both sizes at once contradict each other, a budget must hold a text, and fine-tuning has no budget."""
    assert ok(PretrainArguments, "--per_device_train_tokens", 512).per_device_train_tokens == 512
    assert ok(PretrainArguments, "--per_device_train_tokens", 40).per_device_train_tokens == 40  # the shards' length decides
    text = error(capsys, PretrainArguments, "--per_device_train_tokens", 512, "--per_device_train_batch_size", 8)
    assert "--per_device_train_tokens and --per_device_train_batch_size exclude each other" in text
    text = error(capsys, PretrainArguments, "--per_device_train_tokens", 40, "--max_seq_length", 41)
    assert "--per_device_train_tokens 40" in text and "--max_seq_length 41" in text and "at least 41" in text
    assert "at least 1" in error(capsys, PretrainArguments, "--per_device_train_tokens", 0)
    assert "unknown flag" in error(capsys, FinetuneArguments, "--per_device_train_tokens", 512)


# --- values derived from others ---------------------------------------------------------------------------------------


def test_unnormalised_vectors_have_temperature_one():
    """The contract: normlized False resets the temperature to 1."""
    assert ok(FinetuneArguments, "--normlized", "False").temperature == 1.0
    assert ok(FinetuneArguments, "--normlized", "False", "--temperature", "1").temperature == 1.0
    assert ok(FinetuneArguments).temperature == 0.02


def test_when_checkpoints_are_written():
    """Pre-training saves at each epoch's end and, where save_steps is given, by steps too; fine-tuning by steps."""
    assert ok(PretrainArguments).save_strategy == "epoch" and ok(PretrainArguments).save_every is None
    assert ok(PretrainArguments, "--save_steps", 500).save_every == 500
    assert ok(PretrainArguments, "--save_strategy", "steps").save_every == 500
    assert ok(FinetuneArguments).save_every == 500
    assert ok(FinetuneArguments, "--save_strategy", "epoch").save_every is None
    assert ok(FinetuneArguments, "--save_strategy", "no").save_every is None


@BOTH
def test_when_evaluations_happen(cls):
    """Folders alone turn evaluation on, at the steps of the checkpoints; without folders nothing is evaluated."""
    assert ok(cls).eval_strategy == "no" and ok(cls).eval_data == []
    by_steps = ok(cls, "--eval_data", "a", "~/b", "--save_strategy", "steps", "--save_steps", 0.5)
    assert (by_steps.eval_strategy, by_steps.eval_steps) == ("steps", 0.5)
    assert by_steps.eval_data == ["a", str(Path("~/b").expanduser())]
    assert ok(cls, "--eval_data", "a", "--eval_steps", 20, "--save_strategy", "epoch").eval_steps == 20
    by_epoch = ok(cls, "--eval_data", "a", "--save_strategy", "epoch")
    assert (by_epoch.eval_strategy, by_epoch.eval_steps) == ("epoch", None)
    assert ok(cls, "--eval_data", "a", "--evaluation_strategy", "epoch").eval_strategy == "epoch"
    assert ok(cls, "--eval_data", "a", "--save_strategy", "best", "--greater_is_better").save_every is None


@pytest.mark.parametrize(
    ("value", "total", "steps"), [(0, 10, 0), (1, 10, 1), (500, 10, 500), (0.1, 100, 10), (0.1, 101, 11), (0.001, 3, 1)]
)
def test_steps_from(value, total, steps):
    """A share below 1 is rounded up, as the Trainer does; 1 is one step, not the whole run."""
    assert steps_from(value, total) == steps and isinstance(steps_from(value, total), int)


def test_report_to_all_names_what_is_installed(monkeypatch):
    """`all` must not promise a writer whose package is missing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    args = FinetuneArguments.build(output_dir="o", train_data="d", model_name_or_path="m", report_to=["all"])
    assert args.report_to == ["tensorboard", "csv"]


def test_build_checks_like_the_command_line():
    """Code that builds arguments gets ValueError for what a user gets `error:` for."""
    values = {"output_dir": "o", "train_data": "d", "model_name_or_path": "m"}
    args = FinetuneArguments.build(**values, normalize_embeddings=False)
    assert args.temperature == 1.0 and args.explicit == {*values, "normalize_embeddings"}
    with pytest.raises(ValueError, match="exclude each other"):
        FinetuneArguments.build(**values, bf16=True, fp16=True)


def test_describe_and_changed():
    """The start-up summary shows every setting in effect, and apart those that differ from the default."""
    args = ok(FinetuneArguments, "--bf16", "--seed", 42, "--normlized", "False", "--local_rank", 1)
    assert dict(describe(args)).keys() == fields_of(FinetuneArguments).keys() - {"local_rank", "token"}
    assert changed(args) == [("bf16", True, False), ("temperature", 1.0, 0.02), ("normalize_embeddings", False, True)]


# --- JSON files -------------------------------------------------------------------------------------------------------


def test_a_json_file_says_the_same_as_flags(tmp_path):
    """One .json file stands for the flags, in either spelling, also where a launcher adds its rank beside it."""
    settings = {
        "output_dir": "out", "train-data": "data", "model_name_or_path": "", "config_name": "c", "tokenizer_name": "t",
        "bf16": True, "learning_rate": 1e-4, "max_steps": 10, "report_to": ["csv"], "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"power": 2}, "resume_from_checkpoint": None, "no_cuda": True, "do_eval": False,
        "hub_token": None, "fsdp_config": None, "include_for_metrics": [], "disable_tqdm": None, "warmup_ratio": 0.1,
    }  # fmt: skip
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    flags = (
        "--output_dir out --train_data data --model_name_or_path= --config_name c --tokenizer_name t --bf16 "
        "--learning_rate 1e-4 --max_steps 10 --report_to csv --lr_scheduler_type polynomial --use_cpu "
        '--lr_scheduler_kwargs {"power":2} --warmup_steps 0.1'
    )
    want = parse(PretrainArguments, flags.split())
    for extra in ([], ["--local_rank=0"], ["--local-rank", "0"]):
        got = parse(PretrainArguments, [*extra, str(path)])
        assert dict(describe(got)) == dict(describe(want)) and got.explicit - {"local_rank"} == want.explicit
        assert got.local_rank == (0 if extra else -1)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"output_dir": "o",\n oops}', [":2: not JSON"]),
        ("[1]", ["one JSON object"]),
        ('{"seed": 1, "seed": 2}', ["seed stands twice"]),
        ('{"output_dir": "o", "train_data": "d", "seed": true}', ["--seed", "invalid int value"]),
        ('{"output_dir": "o", "train_data": "d", "seed": null}', ["seed is null"]),
        ('{"output_dir": "o", "train_data": "d", "sead": []}', ["unknown flag --sead", "--seed"]),
        ('{"output_dir": "o", "train_data": "d", "deepspeed": {"train_batch_size": 1}}', ["--deepspeed", "path"]),
        ('{"output_dir": "o", "train_data": "d", "do_eval": true}', ["--do_eval is refused"]),
        ('{"output_dir": "o"}', ["--train_data"]),
    ],
)
def test_mistakes_in_a_json_file_name_the_file(tmp_path, capsys, text, parts):
    """The same checks for a file, and the message says which file."""
    path = tmp_path / "settings.json"
    path.write_text(text)
    message = error(capsys, PretrainArguments, argv=[str(path)])
    assert str(path) in message and all(part in message for part in parts), message


def test_a_missing_json_file(tmp_path, capsys):
    """A path that cannot be read is the user's mistake, not a traceback; beside flags, a file is not taken at all."""
    missing = str(tmp_path / "none.json")
    assert "cannot be read" in error(capsys, PretrainArguments, argv=[missing])
    assert "a .json file stands alone" in error(capsys, PretrainArguments, argv=[missing, *REQUIRED[PretrainArguments]])


# --- the parser itself ------------------------------------------------------------------------------------------------


@ALL
def test_help_explains_every_flag(cls, capsys):
    """`--help` is the reference of the flags: each has a text, refused ones do not clutter it."""
    assert all(f.metadata.get("help") for f in fields_of(cls).values())
    shown = []
    for words in (["--help", "all"], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            parse(cls, words)
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    text, short = shown
    assert all(f"--{name} " in text for name in fields_of(cls))
    assert "hub_token" not in text and argparse.SUPPRESS not in text
    # One spelling each, required flags first; the short help leaves the rare ones out and says so.
    assert "--output-dir" not in text and "--normlized" not in text and short.index("Required:") < short.index("--seed")
    rare = [name for name, f in fields_of(cls).items() if f.metadata.get("rare")]
    assert len(rare) > 20 and not [name for name in rare if f"--{name} " in short]
    assert f"--help all shows {len(rare)} more flags" in short
    assert {name for name in fields_of(cls)} == {name for _, names in groups_of(cls) for name in names}


def test_parsed_arguments_cannot_be_assigned():
    """What a run derives lives in copies: code that assigns would make the summary and the agreement lie."""
    args = FinetuneArguments.build(output_dir="o", train_data=["d"], model_name_or_path="m")
    with pytest.raises(dataclasses.FrozenInstanceError, match="seed"):
        args.seed = 7
    changed_args = with_values(args, seed=7)
    assert (args.seed, changed_args.seed, changed_args.explicit) == (42, 7, args.explicit)
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed_args.seed = 8


def test_parsing_loads_nothing_heavy():
    """A typo is answered at once and on a machine without GPUs: parsing must not wait for torch."""
    code = (
        "import sys; from bge_ds.config.arguments import FinetuneArguments, parse\n"
        "parse(FinetuneArguments, '--output_dir o --train_data d --model_name_or_path m --seed 1'.split())\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()"
    )
    root = Path(bge_ds.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_instruction_becomes_what_stands_before_the_text():
    """That is what is trained and saved as the prompt; a line's own prompt is joined by the same format."""
    flags = ["--query_instruction_for_retrieval", "Find it.", "--query_instruction_format", r"<i>{}\n<q>{}"]
    flags += ["--passage_instruction_for_retrieval", "p: "]
    args = ok(FinetuneArguments, *flags)
    assert args.query_instruction_for_retrieval == "<i>Find it.\n<q>" and args.passage_instruction_for_retrieval == "p: "
    assert before(args.query_instruction_format, "x{}") == "<i>x{}\n<q>"
    assert ok(FinetuneArguments, "--query_instruction_format", "{}-{}").query_instruction_for_retrieval is None


def test_a_token_is_for_the_hub_alone(monkeypatch, tmp_path):
    """It reaches whatever fetches or uploads through the environment, and no summary, repr or list of settings."""
    monkeypatch.setenv("HF_TOKEN", "before")
    args = FinetuneArguments.build(output_dir=str(tmp_path / "o"), train_data="d", model_name_or_path="m", token="hf_secret")
    setup.set_up(args)
    assert huggingface_hub.get_token() == "hf_secret"
    assert "hf_secret" not in f"{args!r}{describe(args)}{changed(args)}"


def test_what_scripts_of_flagembedding_spell_out_is_accepted():
    """Off by name, or what happens anyway; what does nothing is said."""
    words = ["--trust_remote_code", "False", "--use_fast_tokenizer", "True", "--use_slow_tokenizer", "False"]
    words += [
        "--save_merged_lora_model",
        "True",
        "--only_merge_lora_model",
        "False",
        "--peft_model_path",
        "",
        "--use_flash_attn",
    ]
    words += ["--shuffle_ratio", "0.0", "--small_threshold", "0", "--drop_threshold", "0", "--pad_to_multiple_of", "8"]
    words += ["--kd_loss_type", "m3_kd_loss", "--knowledge_distillation", "False", "--cache_path", "~/c"]
    args = ok(FinetuneArguments, *words)
    assert args.cache_path == str(Path("~/c").expanduser())
    first, second = args.without_effect()
    assert first.startswith("--pad_to_multiple_of 8 has no effect") and "--kd_loss_type m3_kd_loss" in second
    assert ok(FinetuneArguments).without_effect() == []
