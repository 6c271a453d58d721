"""What both training commands do around their loops: folders, seeds, the plan of steps, the summary, errors."""

from __future__ import annotations

import logging
import math
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from bge_ds.checkpoint import checkpoint, filesystem
from bge_ds.config.arguments import TrainArguments, changed, describe, steps_from
from bge_ds.data import dataloader
from bge_ds.data.sampling.mixture import SameDatasetBatchSampler
from bge_ds.data.sampling.sampler import Sampler, mix64
from bge_ds.data.sampling.token_batching import TokenBatchSampler
from bge_ds.deepspeed_engine import ds_config as configs
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.distributed.communication_profile import Pace
from bge_ds.health import exit_codes, failure_detector
from bge_ds.kernels import triton_support
from bge_ds.modeling import compilation
from bge_ds.modeling.encoder import can_run_unpadded, unpadded_families
from bge_ds.training.metrics import RunLog, peak_memory, peak_rate, slow_precision
from bge_ds.training.nonfinite import Diverged, SkippedSteps

TOKEN_BUCKET = 1024
_OURS = ("metrics.jsonl", "runs", filesystem.LOCK)


def command(train: Callable[[TrainArguments], None], args: TrainArguments) -> int:
    """Run a training command, all its ranks watched; the exit status, one of `statuses`.

    A user's mistake becomes one line, on the first rank of each host.
    """
    status = exit_codes.FAILED
    try:
        failure_detector.join(args.join_timeout)
        train(args)
        status = exit_codes.DONE
    except (Preempted, Diverged) as stop:
        status = exit_codes.PREEMPTED if isinstance(stop, Preempted) else exit_codes.DIVERGED
        if is_first_on_host():
            print(stop, file=sys.stderr, flush=True)
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        status = exit_codes.MISTAKE
        if is_first_on_host():
            print(f"error: {error}", file=sys.stderr, flush=True)
            if logging.getLogger("bge_ds").isEnabledFor(logging.DEBUG) or isinstance(error, NotImplementedError):
                traceback.print_exc()
        failure_detector.fail(status, str(error))
    except BaseException as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            failure_detector.await_cause()  # such as a collective's "connection closed", which does not say why
        if failure_detector.several():
            traceback.print_exc()  # the process ends before Python would print it
        failure_detector.fail(status, f"{type(error).__name__}: {error}")
        raise
    finally:
        collectives.leave()
        failure_detector.leave(keep_ignoring=status == exit_codes.PREEMPTED)
    return status


class Preempted(Exception):
    """A signal has stopped the run, after a step that all ranks have done; the words for the user."""


def stop(args: TrainArguments, step: int) -> None:
    """End a run that a signal stops after `step`, where it has saved what it can."""
    if args.save_only_model:
        then = "nothing to go on from was saved (--save_only_model)"
    else:
        then = f"saved {args.output_dir}/checkpoint-{step}; start again with --resume_from_checkpoint auto to go on"
    raise Preempted(f"stopped by {failure_detector.stopper()} after step {step}; {then}")


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
    if args.kernels == "fused" and args.command.endswith("finetune"):
        raise ValueError(
            "--kernels fused: fine-tuning takes fused kernels wherever they run; use auto, or torch to leave them out"
        )
    triton_support.allow(args.kernels)
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
            "into it all the same, or --resume_from_checkpoint auto to go on"
        )


def _only_a_start(held: list[str], args: TrainArguments) -> bool:
    """A run asked to resume that was stopped before its first checkpoint left nothing but its log."""
    return bool(args.resume_from_checkpoint) and all(
        n in _OURS or n.endswith((filesystem.PARTIAL, filesystem.OLD)) for n in held
    )


def seed_step(seed: int, step: int, micro: int, piece: int = 0) -> None:
    """Dropout's generators as a function of (seed, step, micro step, rank, piece of its texts).

    A resumed run needs no random state, and a piece computed twice gives the same vectors twice.
    """
    torch.manual_seed(int(mix64(seed, step, micro, collectives.rank(), piece)) >> 1)


@dataclass(frozen=True)
class StepPlan:
    """Which steps a run takes, and after which of them it logs, saves and evaluates; a step counts when it is done (from 1).

    total: steps of the run. epoch_steps: steps an epoch's texts fill (a fraction in general; with a token budget, the mean
    over the run). eval_after: the first step that may be evaluated. save_last: the run's last step is saved too.
    """

    total: int
    epoch_steps: float
    log_every: int | None
    log_epochs: bool
    log_first: bool
    save_every: int | None
    save_epochs: bool
    save_last: bool = False
    eval_every: int | None = None
    eval_epochs: bool = False
    eval_after: float = 0.0

    @classmethod
    def make(cls, args: TrainArguments, order: Sampler | TokenBatchSampler) -> StepPlan:
        if args.max_steps > 0:
            total, epochs = args.max_steps, order.epochs(args.max_steps)
        else:
            total, epochs = order.steps(args.num_train_epochs, args.dataloader_drop_last), args.num_train_epochs
        if total < 1 and isinstance(order, SameDatasetBatchSampler):
            raise ValueError(
                f"no set's rows fill a batch of {order.global_batch} in {args.num_train_epochs:g} epochs; lower "
                "--per_device_train_batch_size or raise --num_train_epochs, or drop --same_dataset_within_batch"
            )
        if total < 1:
            flag = "per_device_train_tokens" if args.per_device_train_tokens else "per_device_train_batch_size"
            raise ValueError(f"{len(order)} rows do not fill one step with --dataloader_drop_last; lower --{flag}")
        by_epoch = args.eval_strategy == "epoch"
        epoch_steps = order.filled_steps(epochs) / epochs
        plan = cls(
            total=total,
            epoch_steps=epoch_steps,
            log_every=steps_from(args.logging_steps, total) if args.logging_strategy == "steps" else None,
            log_epochs=args.logging_strategy == "epoch",
            log_first=args.logging_first_step,
            save_every=None if args.save_every is None else steps_from(args.save_every, total),
            save_epochs=args.save_strategy == "epoch",
            # Whatever the model has become last is a candidate too: without it, a run might end with nothing to choose from.
            save_last=args.load_best_model_at_end and args.save_strategy != "best",
            eval_every=steps_from(args.eval_steps, total) if args.eval_strategy == "steps" else None,
            eval_epochs=by_epoch,
            eval_after=args.eval_delay * (epoch_steps if by_epoch else 1),
        )
        if args.load_best_model_at_end:
            plan.check_judged()
        return plan

    def check_judged(self) -> None:
        """Refuse checkpoints that no evaluation judges; those before `eval_after` are no candidates."""
        for step in range(max(1, math.ceil(self.eval_after)), self.total + 1):
            if self.saves(step) and not self.evaluates(step):
                raise ValueError(
                    f"--load_best_model_at_end: the checkpoint of step {step} would not be evaluated, so the best would not "
                    "be known; give save and eval the same strategy, and make --save_steps a multiple of --eval_steps"
                )

    def epoch(self, step: int) -> float:
        return step / self.epoch_steps

    def _ends_epoch(self, step: int) -> bool:
        # A billionth of slack: step / epoch_steps of a whole epoch may come out a rounding below it.
        return int(self.epoch(step) + 1e-9) > int(self.epoch(step - 1) + 1e-9)

    def logs(self, step: int) -> bool:
        every = self.log_every is not None and (step % self.log_every == 0 or step == self.total)
        by_epoch = self.log_epochs and (self._ends_epoch(step) or step == self.total)
        return every or by_epoch or (self.log_first and step == 1)

    def saves(self, step: int) -> bool:
        every = self.save_every is not None and step % self.save_every == 0
        by_epoch = self.save_epochs and (self._ends_epoch(step) or step == self.total)
        return every or by_epoch or (self.save_last and step == self.total)

    def evaluates(self, step: int) -> bool:
        """The last step is evaluated always: it is what the run ends with."""
        if self.eval_every is None and not self.eval_epochs:
            return False
        due = self._ends_epoch(step) if self.eval_epochs else step % self.eval_every == 0
        return step == self.total or (due and step >= self.eval_after - 1e-9)


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


def build_engine(args: TrainArguments, model: torch.nn.Module, plan: StepPlan):
    """(engine, its effective config): DeepSpeed around the model, with AdamW and transformers' schedule."""
    config, source = configs.read_config(args.deepspeed)
    warmup = steps_from(args.warmup_steps, plan.total)
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
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
        warmup_steps=warmup,
    )
    config = configs.merge_config(config, source, values, _monitors(args))

    def schedule(optimizer):
        return transformers.get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=plan.total,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs or {},
        )

    groups = engines.parameter_groups(model, args.weight_decay)
    return engines.build(model, config, groups, adam=adam, optim=args.optim, schedule=schedule), config


def _monitors(args: TrainArguments) -> dict[str, dict]:
    folder = args.logging_dir or str(Path(args.output_dir) / "runs")
    name = args.run_name or Path(args.output_dir).name
    sections = {
        "tensorboard": {"enabled": True, "output_path": folder, "job_name": name},
        "wandb": {"enabled": True, "project": name},
        "csv": {"enabled": True, "output_path": folder, "job_name": name},
    }
    return {"csv_monitor" if kind == "csv" else kind: sections[kind] for kind in args.report_to}


def summary(args: TrainArguments, plan: StepPlan, order, engine, config: dict, facts: list[tuple[str, object]]) -> str:
    """What the run is about to do, for a person: facts, memory, the settings that differ from the default, all settings."""
    model = engine.module
    elements, trainable = engines.count_elements(model), engines.count_elements(model, trainable=True)
    memory = configs.memory_estimate(elements, trainable, config, collectives.world_size())
    zero = config.get("zero_optimization", {}).get("stage", 0)
    batch = f"a rank x {collectives.world_size()} ranks x {args.gradient_accumulation_steps} accumulation"
    if args.per_device_train_tokens is None:
        batch = f"{order.global_batch} = {args.per_device_train_batch_size} {batch}"
    else:
        batch = f"{args.per_device_train_tokens} tokens {batch}, {len(order) / plan.epoch_steps:.1f} texts a step on average"
    rows = [
        ("parameters", f"{elements / 1e6:.1f} M, {trainable / 1e6:.1f} M trained"),
        ("engine", f"ZeRO {zero}, {str(engines.precision(engine)).removeprefix('torch.')}, {engines.optimizer_name(engine)}"),
        ("batch", batch),
        ("steps", f"{plan.total} ({plan.epoch(plan.total):.2f} epochs of {len(order)} rows)"),
        *facts,
        ("memory a rank", f"{sum(memory.values()) / 2**20:,.0f} MiB and activations ("
                          + ", ".join(f"{k} {v / 2**20:,.0f}" for k, v in memory.items()) + ")"),
    ]  # fmt: skip
    if collectives.rank() == 0 and (words := slow_precision(next(model.parameters()).device, engines.precision(engine))):
        rows.insert(2, ("warning", words))
    differing = changed(args)
    lines = [f"  {name:<18}{value}".replace("\n", "\n" + " " * 20) for name, value in rows]
    lines += ["settings that differ from the default"]
    lines += [f"  {name} = {value!r} (default {default!r})" for name, value, default in differing]
    others = ", ".join(f"{name}={value!r}" for name, value in describe(args) if name not in {d[0] for d in differing})
    lines += ["other settings", textwrap.fill(others, 118, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(lines)


def open_log(args: TrainArguments, engine, first_step: int, plan: StepPlan) -> RunLog:
    return RunLog(
        Path(args.output_dir) / "metrics.jsonl",
        first_step=first_step,
        total_steps=plan.total,
        show_bar=not args.disable_tqdm and sys.stderr.isatty(),
        write_events=engine.monitor.write_events,
    )


def load_steps(args: TrainArguments, data, order, collate: Callable, device: torch.device, first: int, end: int, **more):
    """This rank's batches of steps first..end-1, each a list over the accumulation steps; `more` goes to `collate`."""
    return dataloader.steps(
        data.folders,
        order,
        collate,
        first_step=first,
        end_step=end,
        accumulation=args.gradient_accumulation_steps,
        rank=collectives.rank(),
        world=collectives.world_size(),
        workers=args.dataloader_num_workers,
        prefetch=args.dataloader_prefetch_factor,
        pin_memory=args.dataloader_pin_memory and device.type == "cuda",
        context=args.dataloader_multiprocessing_context,
        **more,
    )


def rates(
    args: TrainArguments,
    engine,
    device: torch.device,
    sums: dict[str, float],
    tokens_seen: int,
    nonfinite: SkippedSteps,
    pace: Pace,
) -> dict[str, float]:
    """What both commands log of a stretch of steps besides their losses; on every rank, rates are those of all ranks."""
    rate = sums["flops"] / sums["seconds"] / collectives.world_size()
    record = {
        "tokens_per_second": sums["tokens"] / sums["seconds"],
        **pace.read(),
        "mfu": rate / peak_rate(device, engines.precision(engine)),
        "padding_saved": 1 - sums["tokens"] / sums["padded_tokens"],
        "seconds_per_step": sums["seconds"] / sums["steps"],
        "peak_memory_bytes": peak_memory(device),
        **nonfinite.read(),
    }
    if args.include_num_input_tokens_seen != "no":
        record["num_input_tokens_seen"] = sum(collectives.gather_counts(tokens_seen, device))
    return record


def empty_cache(args: TrainArguments, step: int, device: torch.device) -> None:
    """torch_empty_cache_steps; on a CPU there is nothing to give back."""
    if args.torch_empty_cache_steps and step % args.torch_empty_cache_steps == 0 and device.type == "cuda":
        torch.cuda.empty_cache()


def is_first_on_host() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def silent(_: str) -> None:
    """For ranks that have nothing to say."""
