"""The DeepSpeed configuration: a file, its "auto" values filled from the flags, and what it says of memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from bge_ds.distributed import collectives

_PACKAGE = Path(__file__).resolve().parent.parent
# Installed, the configs lie inside the package; in a checkout beside it.
_CONFIG_FOLDERS = (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs")
# Fewer than this many elements a bucket, and the cost of starting a reduction outweighs its overlap.
_SMALLEST_BUCKET = 1 << 20
# Sections of a config that hold settings, and single settings: what a misspelt name may have meant. DeepSpeed takes unknown
# names without a word at the top, and refuses them inside "zero_optimization", "bf16" and "fp16".
_SECTIONS = (
    "zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "checkpoint", "elasticity", "activation_checkpointing",
    "flops_profiler", "comms_logger", "tensorboard", "csv_monitor", "wandb", "data_types", "torch_autocast", "aio",
)  # fmt: skip
_SETTINGS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "gradient_predivide_factor", "prescale_gradients", "communication_data_type", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather", "dump_state",
)  # fmt: skip
# What DeepSpeed takes in "fp16" and refuses in "bf16", where FlagEmbedding's ds_stage1.json and others have it.
_LOSS_SCALING = (
    "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
    "min_loss_scale",
)  # fmt: skip
_BUCKET_MULTIPLE = 1 << 12  # DeepSpeed asks for multiples of its alignment, which is a small power of two


def read_config(name_or_path: str) -> tuple[dict, str]:
    """(config, where it came from) of a shipped config's name or a file's path; "auto" as for --deepspeed."""
    if name_or_path == "auto":
        name_or_path = "zero1" if collectives.world_size() > 1 else "zero0"
    shipped = {f.stem: f for folder in _CONFIG_FOLDERS if folder.is_dir() for f in sorted(folder.glob("*.json"))}
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise ValueError(
            f"--deepspeed {name_or_path}: neither a file nor one of the shipped configs ({', '.join(sorted(shipped))})"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--deepspeed {path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed {path}: holds a {type(config).__name__}, not an object of settings")
    _check_shape(config, str(path))
    if config.get("elasticity", {}).get("enabled"):
        raise ValueError(
            f'--deepspeed {path}: "elasticity" changes the batch size, and with it the number of negatives; remove it'
        )
    return config, str(path)


def _check_shape(config: dict, path: str) -> None:
    """Refuse what DeepSpeed would take without a word, or end at with a traceback."""
    for name, value in config.items():
        if name in _SECTIONS and not isinstance(value, dict):
            raise ValueError(f'--deepspeed {path}: "{name}" is {json.dumps(value)}; it must be an object of settings')
        if name in ("optimizer", "scheduler") and not isinstance(value.get("params", {}), dict):
            raise ValueError(f'--deepspeed {path}: "{name}.params" is {json.dumps(value["params"])}; it must be an object')
        known = (*_SECTIONS, *_SETTINGS)
        if name not in known and (meant := get_close_matches(name, known, 1, cutoff=0.85)):
            raise ValueError(f'--deepspeed {path}: "{name}" has no effect; "{meant[0]}" is what DeepSpeed knows')
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f'--deepspeed {path}: "zero_optimization.stage" is {json.dumps(stage)}; it must be 0, 1, 2 or 3')


def auto_values(
    *, micro_batch: int, accumulation: int, world: int, clip: float, precision: str, elements: int,
    learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float,
    total_steps: int, warmup_steps: int, trainable: int | None = None,
) -> dict[str, tuple[object, str]]:  # fmt: skip
    """What "auto" stands for: dotted config path -> (value, the flag that sets it; "" where the model does).

    elements, trainable: of the model; unset, all train. Gradients and updates are of the trained alone, and with them buckets.
    """
    bucket, prefetch = (
        -(-max(_SMALLEST_BUCKET, n // 8) // _BUCKET_MULTIPLE) * _BUCKET_MULTIPLE
        for n in (elements if trainable is None else trainable, elements)
    )
    return {
        "train_micro_batch_size_per_gpu": (micro_batch, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "gradient_accumulation_steps"),
        "train_batch_size": (micro_batch * accumulation * world, "per_device_train_batch_size"),
        "gradient_clipping": (clip, "max_grad_norm"),
        "bf16.enabled": (precision == "bf16", "bf16"),
        "fp16.enabled": (precision == "fp16", "fp16"),
        "zero_optimization.reduce_bucket_size": (bucket, ""),
        "zero_optimization.allgather_bucket_size": (bucket, ""),
        "zero_optimization.stage3_prefetch_bucket_size": (prefetch, ""),
        "zero_optimization.stage3_param_persistence_threshold": (min(100_000, elements // 100), ""),
        "optimizer.params.lr": (learning_rate, "learning_rate"),
        "optimizer.params.betas": (list(betas), "adam_beta1"),
        "optimizer.params.eps": (epsilon, "adam_epsilon"),
        "optimizer.params.weight_decay": (weight_decay, "weight_decay"),
        "scheduler.params.warmup_min_lr": (0.0, ""),
        "scheduler.params.warmup_max_lr": (learning_rate, "learning_rate"),
        "scheduler.params.warmup_num_steps": (warmup_steps, "warmup_steps"),
        "scheduler.params.total_num_steps": (total_steps, "max_steps"),
    }


def merge_config(
    config: dict, source: str, values: dict[str, tuple[object, str]], monitors: dict | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict:  # fmt: skip
    """The config with every "auto" filled and what only the flags know added.

    A setting that both the config and a flag decide must be the same in both: otherwise an error names the two.
    say: is told what DeepSpeed would refuse and is left out.
    """
    config = json.loads(json.dumps(config))
    needed = {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    for path, (value, flag) in values.items():
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section.get(parent, {})
        if section.get(key) == "auto" or (key not in section and path in needed):
            section[key] = value
        elif flag and key in section and section[key] != value:
            raise ValueError(
                f"{source} sets {path} to {json.dumps(section[key])} and --{flag} makes it {json.dumps(value)}; "
                f'write "auto" in the file or give the same value as the flag'
            )
    for name in ("bf16", "fp16"):
        if values[f"{name}.enabled"][0]:
            config.setdefault(name, {})["enabled"] = True
        else:
            config.pop(name, None)
    if scaling := [key for key in _LOSS_SCALING if key in config.get("bf16", {})]:
        config["bf16"] = {key: value for key, value in config["bf16"].items() if key not in scaling}
        say(f'{source}: left out of "bf16", whose loss is not scaled: {", ".join(scaling)}')
    left = [path for path, value in _leaves(config) if value == "auto"]
    if left:
        raise ValueError(
            f'{source}: nothing fills "auto" for {", ".join(left)}; give a value. "auto" works for {", ".join(values)}'
        )
    config.setdefault("steps_per_print", 1 << 60)
    for name, settings in (monitors or {}).items():
        config.setdefault(name, {}).update(settings)
    return config


def _leaves(config: dict, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def memory_estimate(elements: int, trainable: int, config: dict, world: int) -> dict[str, float]:
    """Bytes a rank needs for weights, gradients and optimizer state (activations not counted), from ZeRO's formulas."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    half = config.get("bf16", {}).get("enabled") or config.get("fp16", {}).get("enabled")
    width = 2 if half else 4
    return {
        "weights": width * elements / (world if stage >= 3 else 1),
        "gradients": width * trainable / (world if stage >= 2 else 1),
        "optimizer": (12 if half else 8) * trainable / (world if stage >= 1 else 1),
    }


def traffic_estimate(
    elements: int, trainable: int, config: dict, world: int, *, features: int = 0, passages: int = 0
) -> dict[str, float]:
    """Bytes that a rank sends (and receives) in an optimizer step of one micro batch and one pass, from formulas.

    features, passages: of the vectors that the ranks share (`negatives_cross_device`), passages a rank; in fp32, and 8 bytes
    of hash a passage. The gradient is reduced whole at ZeRO 0 to 2: DeepSpeed sums 1's and 2's buckets on all ranks by
    default, of which each keeps its part. At ZeRO 3 a weight is gathered for the forward pass and, where its next use is more
    than stage3_max_reuse_distance elements away, again for the backward pass (fewer times where prefetching has kept it).
    Scalars (norms, counts) are left out.
    """
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    half = config.get("bf16", {}).get("enabled") or config.get("fp16", {}).get("enabled")
    once = (2 if half else 4) * (world - 1) / world  # bytes of an element that goes once around, as in a gather
    # A forward pass and the backward pass that mirrors it: an element k from the end is used again 2 k elements later.
    kept = min(elements, zero.get("stage3_max_reuse_distance", 1_000_000_000) / 2)
    return {
        "gradients": once * trainable * (2 if stage <= 2 else 1),
        "weights": once * (0 if stage == 0 else trainable if stage <= 2 else 2 * elements - kept),
        "vectors": (world - 1) * passages * (4 * features + 8),
        "gradients of vectors": (world - 1) * passages * 4 * features,
    }
