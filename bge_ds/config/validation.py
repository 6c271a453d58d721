"""What the values of flags may be, and which settings exclude each other: the checks behind ``arguments.py``.

Each check raises ValueError with the flag, its value, what is allowed and what to do. They take any object that has
the fields of ``TrainArguments``, which imports them.
"""

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bge_ds.data.preprocess.instructions import is_format

# The schedules of transformers' `get_scheduler` that need the step count alone -> the keys that they cannot do without.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": (),
    "cosine_with_restarts": (),
    "polynomial": (),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": (),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_deepspeed")
WRITERS = ("tensorboard", "wandb", "csv")

# (names of fields, what their number may be in words and as a test). NaN fails every comparison, so it passes none of them.
_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("per_device_train_batch_size gradient_accumulation_steps per_device_train_tokens token_bucket torch_empty_cache_steps "
     "save_total_limit dataloader_prefetch_factor ddp_timeout join_timeout train_group_size max_example_num_per_dataset "
     "sub_batch_size sub_batch_tokens lora_rank per_device_eval_batch_size eval_rerank_depth pad_to_multiple_of",
     "a whole number of at least 1", lambda v: v >= 1),
    ("learning_rate weight_decay max_grad_norm dataloader_num_workers max_nonfinite_steps bow_loss_weight eval_delay "
     "small_threshold drop_threshold",
     "a finite number of at least 0", lambda v: 0 <= v < math.inf),
    ("num_train_epochs adam_epsilon temperature lora_alpha mixing_temperature",
     "a finite number above 0", lambda v: 0 < v < math.inf),
    ("adam_beta1 adam_beta2 lora_dropout label_smoothing", "at least 0 and below 1", lambda v: 0 <= v < 1),
    ("encoder_mlm_probability decoder_mlm_probability", "above 0 and below 1", lambda v: 0 < v < 1),
    ("max_seq_length query_max_len passage_max_len max_len",
     "at least 3 tokens: two special ones and one of the text", lambda v: v >= 3),
    ("seed data_seed", "from 0 to 4294967295", lambda v: 0 <= v < 2**32),  # numpy takes no other
    ("false_negative_margin", "a finite number", math.isfinite),
    ("max_steps", "-1 (num_train_epochs decides) or at least 1", lambda v: v == -1 or v >= 1),
)  # fmt: skip


def require(condition: Any, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_ranges(args: Any) -> None:
    """Check every number against `_RANGES`; a field that this command lacks, or that is unset, is passed over."""
    for names, words, allowed in _RANGES:
        for name in names.split():
            value = getattr(args, name, None)
            require(value is None or allowed(value), f"--{name} is {value}; it must be {words}")


def check_effects(args: Any, *rules: tuple[str, str, Any], remedy: str = "add that") -> None:
    """Check that no setting is given in vain. rules: (names of fields, what gives them an effect, whether that is so)."""
    for names, needs, has_effect in rules:
        for name in names.split():
            value = getattr(args, name)
            shown = " ".join(value) if isinstance(value, list) else value
            require(
                has_effect or not args.asks(name),
                f"--{name} {shown} has no effect without {needs}; {remedy} or drop --{name}",
            )


def choose(args: Any, name: str, choices: tuple[str, ...], reasons: dict[str, str] | None = None) -> None:
    """Check that field `name` is one of `choices`; `reasons` says why a value known to transformers is not."""
    value = getattr(args, name)
    why = f" ({reasons[value]})" if reasons and value in reasons else ""
    require(value in choices, f"--{name} {value} is refused{why}; choose from {', '.join(choices)}")


def count_or_share(name: str, value: float) -> int | float:
    """A step count as int, or a share of all steps as a float below 1. Raises ValueError for 1.5, -1, NaN."""
    zero_allowed = name == "warmup_steps"
    require(
        math.isfinite(value) and value >= 0 and (value > 0 or zero_allowed) and (value < 1 or value == int(value)),
        f"--{name} is {value:g}; it must be a whole number of steps, or a share of all steps "
        f"{'from 0' if zero_allowed else 'above 0'} and below 1",
    )
    return int(value) if value >= 1 or value == 0 else float(value)


def writers(given: list[str] | str | None) -> list[str]:
    """The writers named by report_to, in their own order; `all` means those that are installed."""
    names = [given] if isinstance(given, str) else list(given or [])
    names = [part for name in names for part in name.split(",")]
    if "all" in names:
        return [name for name in WRITERS if name == "csv" or importlib.util.find_spec(name)]
    require("none" not in names or len(names) == 1, f"--report_to {' '.join(names)}: none excludes the others")
    for name in names:
        require(
            name in (*WRITERS, "none"),
            f"--report_to {name} is refused: DeepSpeed's monitor writes the metrics; choose from none, all, "
            f"{', '.join(WRITERS)}",
        )
    return [name for name in WRITERS if name in names]


def _json_object(name: str, value: dict | str | None) -> dict:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"--{name} {value} is not JSON ({error}); give an object such as '{{\"key\": 1}}'") from None
    if not (value is None or isinstance(value, dict)):
        raise ValueError(f"--{name} {value!r} is not a JSON object")
    return value or {}


def check_data(args: Any) -> None:
    """Check what is trained on and in which order; `train_data` becomes a list, `train_sampling_strategy` what is in effect."""
    entries = [args.train_data] if isinstance(args.train_data, str | Path) else args.train_data
    args.train_data = [str(Path(entry).expanduser()) if str(entry).startswith("~") else str(entry) for entry in entries]
    require(args.train_data and all(args.train_data), "--train_data is empty; give a path")
    if args.group_by_length:
        require(
            args.train_sampling_strategy == "group_by_length" or "train_sampling_strategy" not in args.explicit,
            f"--group_by_length and --train_sampling_strategy {args.train_sampling_strategy} exclude each other; keep one",
        )
        args.train_sampling_strategy = "group_by_length"
    evenness = "ranks already get equal shares of short and long texts; group_by_length evens out whole batches"
    choices = ("random", "sequential", "group_by_length")
    choose(args, "train_sampling_strategy", choices, {"batch_rebalance": evenness})
    require(
        args.train_sampling_strategy != "group_by_length" or args.per_device_train_tokens is None,
        "--group_by_length and --per_device_train_tokens exclude each other: micro batches of so many tokens are even as they "
        "are, and grouped ones would hold few long or many short texts; drop one of them",
    )


def check_optimizer(args: Any) -> None:
    """Check optimizer, schedule and recomputation; JSON texts become dicts, empty ones None."""
    own = 'an "optimizer" section in the file given to --deepspeed chooses another optimizer'
    choose(args, "optim", OPTIMIZERS, {args.optim: own})
    no_metric = "it follows a metric, and schedules here follow the step alone"
    choose(args, "lr_scheduler_type", tuple(SCHEDULES), dict.fromkeys(("reduce_lr_on_plateau", "greedy"), no_metric))
    args.lr_scheduler_kwargs = _json_object("lr_scheduler_kwargs", args.lr_scheduler_kwargs) or None
    needed = SCHEDULES[args.lr_scheduler_type]
    require(
        not needed or any(key in (args.lr_scheduler_kwargs or {}) for key in needed),
        f"--lr_scheduler_type {args.lr_scheduler_type} needs {' or '.join(needed)}: add --lr_scheduler_kwargs "
        f"'{{\"{needed[0] if needed else ''}\": ...}}'",
    )
    require(
        args.lr_scheduler_type != "constant" or not args.warmup_steps,
        f"--lr_scheduler_type constant has no warm-up, but --warmup_steps is {args.warmup_steps}; use constant_with_warmup",
    )
    kwargs = _json_object("gradient_checkpointing_kwargs", args.gradient_checkpointing_kwargs)
    for key, value in kwargs.items():
        require(
            key == "use_reentrant" and isinstance(value, bool),
            f"--gradient_checkpointing_kwargs {key}={value!r} is refused; the one key is use_reentrant, true or false",
        )
    require(
        not kwargs or args.gradient_checkpointing,
        "--gradient_checkpointing_kwargs is given, but --gradient_checkpointing is not; add it",
    )
    args.gradient_checkpointing_kwargs = kwargs or None


def check_evaluation(args: Any) -> None:
    """Check the settings of evaluations; `eval_strategy` and `eval_steps` become those in effect."""
    choose(args, "eval_strategy", ("no", "steps", "epoch"))
    args.eval_data = [str(Path(folder).expanduser()) for folder in args.eval_data]
    if not args.eval_data:
        names = (
            "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size load_best_model_at_end "
            "metric_for_best_model greater_is_better"
        )
        check_effects(args, (names, "--eval_data, the folders to search (BEIR's form)", False), remedy="add it")
        require(args.save_strategy != "best", "--save_strategy best needs --eval_data: no metric is computed without it")
        return
    if "eval_strategy" not in args.explicit:
        args.eval_strategy = "epoch" if args.save_strategy == "epoch" and args.eval_steps is None else "steps"
    require(args.eval_strategy != "no", "--eval_data is given and --eval_strategy no leaves it unused; drop one of them")
    by_steps = args.eval_strategy == "steps"
    check_effects(args, ("eval_steps", "--eval_strategy steps", by_steps))
    if by_steps:
        args.eval_steps = count_or_share("eval_steps", args.save_steps if args.eval_steps is None else args.eval_steps)
    require(
        args.greater_is_better is not False,
        "--greater_is_better False is refused: nDCG, MRR and Recall are the better the greater they are",
    )
    require(
        not args.load_best_model_at_end or args.save_strategy != "no",
        "--load_best_model_at_end chooses among checkpoints, and --save_strategy no writes none; give steps, epoch or best",
    )


def check_hub(args: Any) -> None:
    """Check what is uploaded when; an empty `hub_model_id` becomes None."""
    args.hub_model_id = args.hub_model_id or None
    check_effects(args, ("hub_model_id hub_private_repo", "--push_to_hub", args.push_to_hub))
    strategies = ("end",) if args.push_to_hub else ("end", "every_save")
    once = "the finished model is uploaded once; checkpoints stay here"
    choose(args, "hub_strategy", strategies, dict.fromkeys(("every_save", "checkpoint", "all_checkpoints"), once))


def check_license(name: str | None) -> None:
    """Check that a licence, where one is given, is named as the hub names them."""
    require(
        name is None or re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name),
        f"--license {name} is not a licence identifier of the Hugging Face hub; give one such as apache-2.0, mit or other",
    )


def check_groups(args: Any) -> None:
    """Check which parts of training on groups go together: pieces and adapters."""
    for flag in ("sub_batch_size", "sub_batch_tokens"):
        require(
            getattr(args, flag) is None or args.gradient_accumulation_steps == 1,
            f"--{flag} and --gradient_accumulation_steps {args.gradient_accumulation_steps} exclude each other: raise "
            "--per_device_train_batch_size instead, which takes no more memory with it (and adds in-batch negatives)",
        )
    require(
        args.sub_batch_size is None or args.sub_batch_tokens is None,
        "--sub_batch_size and --sub_batch_tokens exclude each other; keep one, the tokens where lengths differ",
    )
    check_effects(
        args,
        ("small_threshold drop_threshold", "--same_dataset_within_batch", args.same_dataset_within_batch),
        ("drop_threshold", "--small_threshold", args.small_threshold),
    )
    check_effects(args, ("lora_rank lora_alpha lora_dropout target_modules", "--use_lora", args.use_lora))


def check_formats(args: Any) -> None:
    """Check that the formats of instructions put the text last, and that a passage's has an instruction to join."""
    for of in ("query", "passage"):
        form = getattr(args, f"{of}_instruction_format")
        require(
            is_format(form),
            f"--{of}_instruction_format {form!r} must hold {{}} twice, first the instruction's, at the end the text's",
        )
    instruction = f"passage_instruction_for_{args.instructions_for}"  # a query's may be its line's prompt
    check_effects(args, ("passage_instruction_format", f"--{instruction}", getattr(args, instruction)))


def check_objective(args: Any) -> None:
    """Check which parts of contrastive fine-tuning go together."""
    require(
        not (args.bidirectional and not args.use_inbatch_neg),
        "--bidirectional compares positives with the other queries of the batch, which --use_inbatch_neg False excludes; "
        "drop one of them",
    )
    require(
        not (args.learnable_temperature and not args.normalize_embeddings),
        "--learnable_temperature needs --normalize_embeddings True: other inner products are not divided",
    )
    dims = args.mrl_dims = sorted(set(args.mrl_dims))
    require(
        bool(dims) == args.use_mrl,
        "--use_mrl and --mrl_dims belong together; give both, such as --use_mrl --mrl_dims 64 128 256",
    )
    require(not dims or dims[0] >= 1, f"--mrl_dims {dims} must be lengths of at least 1")
    require(
        not args.knowledge_distillation or args.train_group_size > 1,
        "--knowledge_distillation compares the passages of a group, and --train_group_size 1 leaves one; raise it",
    )
    check_effects(
        args,
        ("false_negative_margin_type", "--false_negative_margin", args.false_negative_margin is not None),
        # FlagEmbedding's scripts turn the one off by name and leave the other.
        ("kd_loss_type", "--knowledge_distillation", args.knowledge_distillation or "knowledge_distillation" in args.explicit),
    )
    require(
        not (args.use_lora and args.fix_position_embedding),
        "--fix_position_embedding has no effect with --use_lora, which trains nothing but the adapters; drop it",
    )


def check_token_budget(args: Any) -> None:
    """Check that a micro batch of so many tokens holds a text of any length."""
    budget, longest = args.per_device_train_tokens, args.max_seq_length
    require(
        budget is None or longest <= budget,
        f"--per_device_train_tokens {budget} does not hold one text of --max_seq_length {longest}; raise the former to at "
        f"least {longest}, or give --max_seq_length {budget} or less, which cuts longer texts",
    )


def check_conflicts(args: Any) -> None:
    """Check the settings that exclude each other and those that need another one to have an effect."""
    require(not (args.bf16 and args.fp16), "--bf16 and --fp16 exclude each other; keep one, bf16 where the GPU has it")
    require(not (args.use_cpu and args.tf32), "--tf32 sets a mode of GPUs, but --use_cpu is given; drop one of them")
    require(
        not (args.use_cpu and args.ddp_backend == "nccl"),
        "--ddp_backend nccl works between GPUs, but --use_cpu is given; use gloo or drop one of them",
    )
    config = args.deepspeed
    require(
        isinstance(config, str) and config.strip() and not config.lstrip().startswith("{"),
        "--deepspeed takes the name of a config (zero0, zero1, zero2, zero3 ...) or the path of a JSON file; "
        "put an object into a file",
    )
    require(
        not (args.save_only_model and args.resume_from_checkpoint),
        "--save_only_model and --resume_from_checkpoint exclude each other: a checkpoint of the model alone "
        "has nothing to resume from",
    )
    workers, saves = args.dataloader_num_workers > 0, args.save_strategy != "no"
    check_effects(
        args,
        ("logging_steps", "--logging_strategy steps", args.logging_strategy == "steps"),
        ("save_steps", "--save_strategy steps", saves and (args.save_strategy == "steps" or args.epochs_and_steps)),
        ("save_total_limit save_only_model", "a --save_strategy other than no", saves),
        # Uncompiled, a row takes any number of tokens: a fuller one would only cost.
        ("torch_compile_backend token_bucket", "--torch_compile", args.torch_compile),
        ("dataloader_prefetch_factor dataloader_multiprocessing_context", "--dataloader_num_workers above 0", workers),
    )
