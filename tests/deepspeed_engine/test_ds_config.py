"""The DeepSpeed config: names, "auto", and conflicts between a file and the flags."""

from __future__ import annotations

import json

import pytest

from bge_ds.deepspeed_engine.ds_config import auto_values, memory_estimate, merge_config, read_config

SHIPPED = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


def values(**changes):
    given = dict(
        micro_batch=4, accumulation=2, world=2, clip=1.0, precision="fp32", elements=10_000_000, learning_rate=1e-5,
        betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0, total_steps=100, warmup_steps=10,
    )  # fmt: skip
    return auto_values(**{**given, **changes})


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_shipped_configs_fill_completely(name, precision):
    """Every "auto" of every shipped config is filled by our code; the precision is the flags'."""
    config, source = read_config(name)
    merged = merge_config(config, source, values(precision=precision))
    assert "auto" not in json.dumps(merged)
    assert merged["train_micro_batch_size_per_gpu"] == 4 and merged["gradient_accumulation_steps"] == 2
    assert {p for p in ("bf16", "fp16") if p in merged} == {precision} - {"fp32"}
    assert merged["zero_optimization"]["stage"] == int(name[4])


def test_a_users_file_for_the_old_trainer(tmp_path):
    """A config as people have it for transformers, optimizer and scheduler included, is filled from the flags."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                          "warmup_num_steps": "auto", "total_num_steps": "auto"}},
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"},
    }))  # fmt: skip
    merged = merge_config(*read_config(str(path)), values(precision="bf16"))
    assert merged["optimizer"]["params"] == {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert merged["scheduler"]["params"]["total_num_steps"] == 100
    assert merged["train_batch_size"] == 16 and merged["bf16"] == {"enabled": True}
    assert merged["zero_optimization"]["reduce_bucket_size"] == 5e8  # the user's own word


def test_loss_scaling_of_bf16_is_left_out_and_said(tmp_path):
    """FlagEmbedding's ds_stage1.json has it in both sections, and DeepSpeed refuses it in the one whose loss is not scaled."""
    scaling = {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 10, "hysteresis": 2}
    path, said = tmp_path / "ds.json", []
    path.write_text(json.dumps({"bf16": {**scaling, "immediate_grad_update": True}, "fp16": scaling}))
    merged = merge_config(*read_config(str(path)), values(precision="bf16"), say=said.append)
    assert merged["bf16"] == {"enabled": True, "immediate_grad_update": True}
    (line,) = said
    assert str(path) in line and line.endswith("loss_scale, initial_scale_power, hysteresis")
    half = merge_config(*read_config(str(path)), values(precision="fp16"), say=said.append)
    assert half["fp16"] == scaling | {"enabled": True} and len(said) == 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 32}, r"ds.json sets train_micro_batch_size_per_gpu to 32 and --per_device_train_b"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping to 0.5 and --max_grad_norm makes it 1.0"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled to true and --bf16 makes it false"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, r"optimizer.params.lr to 0.0003 and --learning_rate"),
        ({"amp": {"enabled": "auto"}}, r'nothing fills "auto" for amp.enabled'),
    ],
)
def test_conflicts_name_both_sides(tmp_path, section, message):
    """A setting that the file and a flag decide differently stops the run: neither is dropped in silence."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(section))
    with pytest.raises(ValueError, match=message):
        merge_config(*read_config(str(path)), values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"neither a file nor one of the shipped configs \(zero0, zero1"),
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ('{"elasticity": {"enabled": true}}', "changes the batch size"),
        ('{"zero_optimization": 3}', '"zero_optimization" is 3; it must be an object'),
        ('{"zero_optimization": {"stage": 5}}', '"zero_optimization.stage" is 5; it must be 0, 1, 2 or 3'),
        ('{"optimizer": {"type": "AdamW", "params": 1}}', '"optimizer.params" is 1; it must be an object'),
        ('{"bf16": true}', '"bf16" is true; it must be an object'),
        # DeepSpeed would train without ZeRO, and say nothing.
        ('{"zero_optimizaton": {"stage": 2}}', '"zero_optimizaton" has no effect; "zero_optimization" is what'),
    ],
)
def test_bad_config_files(tmp_path, content, message):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(str(path))


def test_names_that_deepspeed_knows_are_no_misspellings(tmp_path):
    """Every setting at the top of DeepSpeed's documentation of 0.19 passes; what is near to none is not ours to judge."""
    names = ["train_batch_size", "gradient_predivide_factor", "bfloat16", "amp", "autotuning", "compression_training",
             "data_efficiency", "sparse_attention", "comet", "pipeline", "compile", "dataloader_drop_last", "vocabulary_size",
             "seq_parallel_communication_data_type", "gradient_allreduce_op", "nebula", "hybrid_engine", "eigenvalue",
             "progressive_layer_drop", "curriculum_learning", "weight_quantization", "monitor_config"]  # fmt: skip
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({name: {} for name in names}))
    assert list(read_config(str(path))[0]) == names


def test_memory_estimate_follows_the_stages():
    """Each stage divides what it shards by the ranks: Adam in fp32 needs 16 bytes a parameter without ZeRO."""
    sizes = [sum(memory_estimate(1000, 1000, {"zero_optimization": {"stage": s}}, world=4).values()) for s in (0, 1, 2, 3)]
    assert sizes == [16000, 10000, 7000, 4000]
    half = memory_estimate(1000, 1000, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, world=1)
    assert sum(half.values()) == 16000


def test_auto_is_no_sharding_on_one_rank():
    """With one rank there is nothing to share, and the partitions would only be further copies."""
    assert read_config("auto")[0]["zero_optimization"]["stage"] == 0
