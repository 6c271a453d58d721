"""What a run needs before its first step: logging, the output folder, compilation, the engine."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from bge_ds.checkpoint import checkpoint, filesystem
from bge_ds.config.arguments import TrainArguments
from bge_ds.deepspeed_engine import ds_config as configs
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.kernels import triton_support
from bge_ds.modeling import compilation
from bge_ds.modeling.encoder import can_run_unpadded, unpadded_families
from bge_ds.training import hub
from bge_ds.training.command import silent
from bge_ds.training.objective import Engine
from bge_ds.training.step_plan import StepPlan

TOKEN_BUCKET = 1024
_OURS = ("metrics.jsonl", "runs", filesystem.LOCK)


def set_up(args: TrainArguments) -> None:
    """Logging, deterministic kernels, whether the output folder may be used and has what is to be resumed. Writes nothing."""
    level = args.log_level if os.environ.get("RANK", "0") == "0" else args.log_level_replica
    number = logging.INFO if level == "passive" else getattr(logging, level.upper())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("bge_ds").setLevel(number)
    quiet = logging.WARNING if level == "passive" else number
    transformers.logging.set_verbosity(quiet)
    transformers.logging.disable_progress_bar()
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(quiet)
    if args.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if args.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    triton_support.allow(args.kernels)
    if args.token:
        os.environ["HF_TOKEN"] = args.token  # where every fetch and upload looks for it
    output = Path(args.output_dir)
    resume = checkpoint.find(args.resume_from_checkpoint, output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output} is a file; give a folder")
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(f"--output_dir {output}: {there} is read-only to this user; give a folder that can be written to")
    held = sorted(p.name for p in output.iterdir()) if output.is_dir() else []
    goes_on = resume is not None and resume.absolute().parent.resolve() == output.resolve()
    if held and not goes_on and not args.overwrite_output_dir and not _only_a_start(held, args):
        shown = ", ".join(held[:4]) + (", ..." if len(held) > 4 else "")
        raise ValueError(
            f"--output_dir {output} is not empty (it holds {shown}); give another folder, --overwrite_output_dir to train "
            "into it all the same, or --resume_from_checkpoint auto to resume"
        )
    hub.check(args)


def _only_a_start(held: list[str], args: TrainArguments) -> bool:
    """A run asked to resume that was stopped before its first checkpoint left nothing but its log."""
    return bool(args.resume_from_checkpoint) and all(
        n in _OURS or n.endswith((filesystem.PARTIAL, filesystem.OLD)) for n in held
    )


def check_compilation(args: TrainArguments, config: transformers.PretrainedConfig, device: torch.device) -> None:
    """Refuse --torch_compile where it does not work, before anything is loaded."""
    if not args.torch_compile:
        return
    if not can_run_unpadded(config):
        raise ValueError(
            f"--torch_compile: {config.model_type} is not one of the families that run without padding, and a padded batch "
            f"has another shape at each step; leave it out, or take a model of {unpadded_families()}"
        )
    zero, source = configs.read_config(args.deepspeed)
    if zero.get("zero_optimization", {}).get("stage", 0) >= 3:
        # Measured with DeepSpeed 0.19.8 and torch 2.13: a graph ends at each module's hooks, and with gradient checkpointing
        # or GradCache the second pass fails on weights that are sharded by then.
        raise ValueError(
            f"--torch_compile does not work at ZeRO 3 ({source}), which gathers and frees weights inside of the layers; take "
            "--deepspeed zero2, or leave --torch_compile out"
        )
    if (why := compilation.obstacle(device.type, args.torch_compile_backend or "inductor")) is not None:
        raise ValueError(f"--torch_compile: {why}, or leave --torch_compile out")


def compile_layers(args: TrainArguments, backbone: torch.nn.Module) -> None:
    """--torch_compile, before the engine is built around the model."""
    if args.torch_compile:
        bucket, backend = args.token_bucket or TOKEN_BUCKET, args.torch_compile_backend or "inductor"
        compilation.compile_layers(backbone, token_bucket=bucket, backend=backend)


def build_engine(args: TrainArguments, model: torch.nn.Module, plan: StepPlan) -> tuple[Engine, dict]:
    """(engine, its effective config): DeepSpeed around the model, with AdamW and transformers' schedule."""
    config, source = configs.read_config(args.deepspeed)
    adam: dict[str, Any] = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    values = configs.auto_values(
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world=collectives.world_size(),
        clip=args.max_grad_norm,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        elements=engines.count_elements(model),
        trainable=engines.count_elements(model, trainable=True),
        learning_rate=args.learning_rate,
        betas=adam["betas"],
        epsilon=args.adam_epsilon,
        weight_decay=args.weight_decay,
        total_steps=plan.total,
        warmup_steps=plan.warmup,
    )
    say = print if collectives.rank() == 0 else silent
    config = configs.merge_config(config, source, values, _monitors(args), say)

    kwargs = args.lr_scheduler_kwargs or {}
    assert isinstance(kwargs, dict)  # parsed

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return transformers.get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=plan.warmup,
            num_training_steps=plan.total,
            scheduler_specific_kwargs=kwargs,
        )

    groups = engines.parameter_groups(model, args.weight_decay)
    return engines.build(model, config, groups, adam=adam, optim=args.optim, schedule=schedule), config


def _monitors(args: TrainArguments) -> dict[str, dict]:
    folder = args.logging_dir or str(Path(args.output_dir) / "runs")
    name = args.run_name or Path(args.output_dir).name
    files = {"enabled": True, "output_path": folder, "job_name": name}
    sections = {"tensorboard": files, "csv_monitor": files, "wandb": {"enabled": True, "project": name}}
    return {section: sections[section] for section in ("csv_monitor" if kind == "csv" else kind for kind in args.report_to)}
