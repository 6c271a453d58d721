"""Going on from a checkpoint, on as many ranks as there are now; saving the next ones, and what that costs."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bge_ds.checkpoint import checkpoint, optimizer_files
from bge_ds.config.arguments import TrainArguments
from bge_ds.config.run_config import with_values
from bge_ds.deepspeed_engine import optimizer_state
from bge_ds.distributed import collectives
from bge_ds.training.data_order import smallest_batch, split_weights
from bge_ds.training.metrics import Meter, RunLog
from bge_ds.training.nonfinite import SkippedSteps

if TYPE_CHECKING:
    from bge_ds.checkpoint.state_file import Best
    from bge_ds.training.objective import Engine, Objective, Scores
    from bge_ds.training.step_plan import StepPlan


def take_up(objective: Objective) -> checkpoint.ResumePoint | None:
    """The checkpoint that all ranks resume from, or None; the batch of a rank is set so that the global one stays.

    To be called on every rank after `engines.start`, before anything is derived from the batch.
    """
    args = objective.args
    point = checkpoint.select(args.resume_from_checkpoint, Path(args.output_dir))
    if point is not None:
        objective.args = fit_batch(args, point)
    return point


def _batch(args: TrainArguments) -> tuple[str, str, str]:
    """(the flag that makes up for another number of ranks, its product with them in the agreement, that product in words)."""
    if args.per_device_train_tokens:
        return "gradient_accumulation_steps", "micro_batches_a_step", "micro batches a step"
    return "per_device_train_batch_size", "global_micro_batch", "global batch"


def asked_batch(args: TrainArguments, point: checkpoint.ResumePoint | None) -> dict[str, int]:
    """The batch as the command gave it: the same command is then understood on any number of ranks."""
    flag = _batch(args)[0]
    return point.state.asked if point and point.refitted else {flag: getattr(args, flag)}


def fit_batch(args: TrainArguments, point: checkpoint.ResumePoint) -> TrainArguments:
    """The arguments with the share of the checkpoint's global batch that the number of ranks now leaves each rank.

    Raises ValueError where the ranks cannot share it, where the command asks for another batch, and where the number of ranks
    decides more than the shares.
    """
    flag, product, words = _batch(args)
    ranks, before = collectives.world_size(), point.state.ranks
    total, given = point.state.agreement.get(product), getattr(args, flag)
    if total is None:
        return args  # of another command or kind of batch, which the agreement will say
    if ranks != before and (reason := args.rank_dependence()):
        raise ValueError(f"{point.path} was written by {before} ranks and cannot resume exactly on {ranks}: {reason}")
    if given * ranks == total:
        return args
    if given != point.state.asked.get(flag):
        raise ValueError(
            f"--{flag} {given} on {ranks} ranks makes a {words} of {given * ranks}, and {point.path} was written with "
            f"{total} ({total // before} on {before} ranks); give the command as it was, or start a new run"
        )
    if total % ranks:
        possible = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise ValueError(f"{point.path}: {ranks} ranks cannot share its {words} of {total} evenly; take {possible} ranks")
    point.refitted = True
    point.notes.append(
        f"resumed on {ranks} ranks ({before} before): --{flag} {given} -> {total // ranks} keeps the {words} of {total}"
    )
    return with_values(args, **{flag: total // ranks})


def agreement(objective: Objective, plan: StepPlan) -> dict:
    """What a resumed run must share with the stopped one to continue exactly as if it had not stopped.

    The number of ranks and the ZeRO stage are not among it: the batches are the same for any.
    """
    common = (
        "seed", "data_seed", "learning_rate", "bf16", "fp16", "train_sampling_strategy", "lr_scheduler_type", "warmup_steps",
        "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon",
        "mixing_temperature",
    )  # fmt: skip
    args = objective.args
    flag, product, _ = _batch(args)
    smallest = smallest_batch(args, objective.data)  # half a rank's share, rounded: other ranks may round otherwise
    return {
        "command": args.command,
        "data_fingerprint": objective.data.fingerprint,
        "train_weights": split_weights(args.train_data)[1],
        "total_steps": plan.total,
        product: getattr(args, flag) * collectives.world_size(),
        **({} if flag == "gradient_accumulation_steps" else {"gradient_accumulation_steps": args.gradient_accumulation_steps}),
        **({} if smallest is None else {"symmetric_batch": smallest}),
        **{name: getattr(args, name) for name in (*common, *objective.resume_names)},
    }


def resume(args: TrainArguments, point: checkpoint.ResumePoint | None, engine: Engine, agreement: dict) -> tuple[int, int]:
    """(steps done, tokens this rank counts as seen): of the checkpoint, loaded into the engine, or (0, 0).

    Locks the output folder from here on. Another run's checkpoints in it would pass for this one's newest, and be kept in place
    of this one's.
    """
    output = Path(args.output_dir)
    if not args.save_only_model:
        next(optimizer_state.fragments(engine), None)  # what cannot be saved is said now, not hours later
    of_another = point is None or point.path.absolute().parent.resolve() != output.resolve()
    checkpoint.prepare_output(output, drop=of_another and args.overwrite_output_dir)
    if point is None:
        return 0, 0
    checkpoint.check_agreement(point, agreement)
    optimizer_files.load(engine, point.path / "resume")
    return point.state.step, point.state.tokens_seen if collectives.rank() == 0 else 0


def restore_meter(meter: Meter, nonfinite: SkippedSteps, point: checkpoint.ResumePoint | None) -> None:
    """What the checkpoint's ranks had added since their last line of the log, and the steps skipped until then.

    Another number of ranks adds up anew; the skipped steps are the same on all.
    """
    if point is None:
        return
    meters = point.state.meters
    if meters[0]:
        nonfinite.go_on(meters[0]["skipped"])
    if len(meters) == collectives.world_size() and (own := meters[collectives.rank()]):
        meter.go_on(own)


class Saver:
    """Writes a run's checkpoints and counts the seconds. started: of the run, by time.perf_counter."""

    def __init__(
        self, objective: Objective, engine: Engine, agreement: dict, asked: dict, log: RunLog, meter: Meter,
        nonfinite: SkippedSteps, started: float,
    ):  # fmt: skip
        self.objective, self.args, self.engine, self.agreement, self.asked = objective, objective.args, engine, agreement, asked
        self.log, self.meter, self.nonfinite, self.started = log, meter, nonfinite, started
        self.seconds = self.unwritten = 0.0
        self.saves = 0

    def save(self, step: int, tokens_seen: int, best: Best | None, scores: Scores) -> Path:
        """Write checkpoint-`step`, on every rank; its time is not that of the steps."""
        began = time.perf_counter()
        saved = checkpoint.save(
            self.engine, Path(self.args.output_dir), step, tokens_seen, self.agreement,
            partial(self.objective.save, self.engine, scores=scores),
            keep=self.args.save_total_limit, only_model=self.args.save_only_model, best=best, asked=self.asked,
            meter=self.meter.keep() | {"skipped": self.nonfinite.keep()},
        )  # fmt: skip
        if self.objective.publishes_checkpoints:
            output = Path(self.args.output_dir)
            place = partial(self.objective.place, output=output)
            checkpoint.write_aside(output, partial(checkpoint.copy_model, saved.path), place)
        seconds = time.perf_counter() - began
        self.seconds, self.unwritten, self.saves = self.seconds + seconds, self.unwritten + seconds, self.saves + 1
        self.meter.leave_out(seconds)
        cost = f"{seconds:.1f} s, {saved.size / 2**20:,.1f} MiB ({self._share()} of the run so far)"
        self.log.say(f"step {step}: saved {saved.path} in {cost}")
        return saved.path

    def _share(self) -> str:
        return f"{self.seconds / (time.perf_counter() - self.started):.1%}"

    def record(self) -> dict[str, float]:
        """For the next record: the seconds of the checkpoints since the last one, where there were any."""
        seconds, self.unwritten = self.unwritten, 0.0
        return {"checkpoint_seconds": seconds} if seconds else {}

    def say_total(self) -> str:
        if not self.saves:
            return "no checkpoint was saved"
        return f"{self.saves} checkpoint{'s' * (self.saves != 1)} took {self.seconds:.1f} s, {self._share()} of the run"
