"""The steps of a run: how many, how many of them warm up, and after which it logs, saves and evaluates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bge_ds.config.arguments import TrainArguments, steps_from
from bge_ds.data.sampling.mixture import SameDatasetBatchSampler
from bge_ds.data.sampling.sampler import Sampler
from bge_ds.data.sampling.token_batching import TokenBatchSampler

Order = Sampler | TokenBatchSampler


@dataclass(frozen=True)
class StepPlan:
    """Everything that is counted in steps, resolved once from the arguments and the order of the data; steps count from 1.

    total: steps of the run. warmup: those in which the learning rate rises. epoch_steps: steps an epoch's texts fill (a
    fraction in general; with a token budget, the mean over the run). eval_after: the first step that may be evaluated.
    save_last: the run's last step is saved too.
    """

    total: int
    warmup: int
    epoch_steps: float
    log_every: int | None
    log_epochs: bool
    log_first: bool
    save_every: int | None
    save_epochs: bool
    save_last: bool
    eval_every: int | None
    eval_epochs: bool
    eval_after: float

    @classmethod
    def make(cls, args: TrainArguments, order: Order) -> StepPlan:
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
            warmup=steps_from(args.warmup_steps, total),
            epoch_steps=epoch_steps,
            log_every=steps_from(args.logging_steps, total) if args.logging_strategy == "steps" else None,
            log_epochs=args.logging_strategy == "epoch",
            log_first=args.logging_first_step,
            save_every=None if args.save_every is None else steps_from(args.save_every, total),
            save_epochs=args.save_strategy == "epoch",
            # Whatever the model has become last is a candidate too: without it, a run might end with nothing to choose from.
            save_last=args.save_strategy == "epoch" or (args.load_best_model_at_end and args.save_strategy != "best"),
            eval_every=None if args.eval_steps is None else steps_from(args.eval_steps, total),
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

    def _due(self, step: int, every: int | None, epochs: bool, last: bool) -> bool:
        return (every is not None and step % every == 0) or (epochs and self._ends_epoch(step)) or (last and step == self.total)

    def logs(self, step: int) -> bool:
        last = self.log_every is not None or self.log_epochs
        return self._due(step, self.log_every, self.log_epochs, last) or (self.log_first and step == 1)

    def saves(self, step: int) -> bool:
        return self._due(step, self.save_every, self.save_epochs, self.save_last)

    def evaluates(self, step: int) -> bool:
        """The last step is evaluated always: it is what the run ends with."""
        if step == self.total:
            return self.eval_every is not None or self.eval_epochs
        return step >= self.eval_after - 1e-9 and self._due(step, self.eval_every, self.eval_epochs, last=False)
