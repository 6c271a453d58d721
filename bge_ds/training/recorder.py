"""What a run records of itself: metrics between two log lines, times, skipped steps, checkpoints and their cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from bge_ds.checkpoint import checkpoint
from bge_ds.checkpoint.state_file import Best
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.distributed.communication_profile import Pace
from bge_ds.training.diagnosis import Signs
from bge_ds.training.metrics import Meter, RunLog, peak_memory, peak_rate
from bge_ds.training.nonfinite import SkippedSteps
from bge_ds.training.objective import Engine, Objective, Scores, Values, count_tokens
from bge_ds.training.resume import Saver, restore_meter


class Recorder:
    """The loop's one collaborator for everything that is not training: on every rank, called in the order of the methods.

    started: of the run, by time.perf_counter. tokens_seen: by this rank, in the steps before. asked: the batch as the command
    gave it (`resume.asked_batch`). warmup: steps of the run's warm-up.
    """

    def __init__(
        self, objective: Objective, engine: Engine, log: RunLog, taken: checkpoint.ResumePoint | None, agreement: dict,
        asked: dict, tokens_seen: int, started: float, warmup: int,
    ):  # fmt: skip
        args = objective.args
        self.objective, self.engine, self.log, self.args = objective, engine, log, args
        self.device, self.tokens_seen, self.started = engine.device, tokens_seen, started
        self.meter = Meter(self.device, args.logging_nan_inf_filter)
        self.skipped = SkippedSteps(args.max_nonfinite_steps, Path(args.output_dir), engine, objective.tokenizer, log.say)
        restore_meter(self.meter, self.skipped, taken)
        self.signs = Signs(warmup, args.max_grad_norm)
        self.pace = Pace(self.device, log.say)
        self.saver = Saver(objective, engine, agreement, asked, log, self.meter, self.skipped, started)

    def begin_step(self) -> None:
        """Before the next batch is asked for."""
        self.pace.begin()

    def batch_loaded(self) -> None:
        self.pace.loaded()

    def end_step(self, step: int, applied: bool, values: Values, micro_batches: list) -> None:
        """A step is done. applied: whether the optimizer took it. values: of `Objective.backward`, added up over micro batches.

        Raises Diverged where too many steps in a row were skipped.
        """
        tokens, padded_tokens = count_tokens(micro_batches)
        self.pace.end(tokens)
        self.tokens_seen += tokens
        losses = {name: torch.as_tensor(values[name]) for name in self.objective.loss_names}
        self.skipped.saw(step, applied, list(losses.values()), micro_batches)
        if not applied:  # losses that the objective does not use stay 0
            values = values | {name: loss.masked_fill(loss != 0, torch.nan) for name, loss in losses.items()}
        flops = sum(self.objective.flops(self.engine.module, batch) for batch in micro_batches)
        self.meter.add(**values, tokens=tokens, padded_tokens=padded_tokens, flops=flops)
        self.log.advance()

    def write(self, step: int, epoch: float, learning_rate: float, batch: Any) -> None:
        """One line of the log, for the steps since the last one. batch: this step's last micro batch."""
        sums = self.meter.read()
        sums["micro_batches"] = sums["steps"] * self.args.gradient_accumulation_steps * collectives.world_size()
        learned = self.objective.record(sums, self.engine.module, batch)
        record: dict[str, float | None] = {"step": step, "epoch": epoch, **learned, "learning_rate": learning_rate}
        record |= {"grad_norm": engines.gradient_norm(self.engine), **self.rates(sums), **self.saver.record()}
        self.log.write(record)
        for sign in self.signs.read(record, self.objective.chance(learned)):
            self.log.say(f"warning: {sign}")

    def rates(self, sums: dict[str, float]) -> dict[str, float]:
        """Speed, memory and skipped steps; rates are those of all ranks together."""
        rate = sums["flops"] / sums["seconds"] / collectives.world_size()
        record = {
            "tokens_per_second": sums["tokens"] / sums["seconds"],
            **self.pace.read(),
            **({"mfu": rate / peak} if (peak := peak_rate(self.device, engines.precision(self.engine))) else {}),
            "padding_saved": 1 - sums["tokens"] / sums["padded_tokens"],
            "seconds_per_step": sums["seconds"] / sums["steps"],
            "peak_memory_bytes": peak_memory(self.device),
            **self.skipped.read(),
        }
        if self.args.include_num_input_tokens_seen != "no":
            record["num_input_tokens_seen"] = sum(collectives.gather_counts(self.tokens_seen, self.device))
        return record

    def save(self, step: int, best: Best | None, scores: Scores) -> None:
        """Write checkpoint-`step`. best: of `Evaluation.judge`. scores: of `Evaluation.scores_at`."""
        self.saver.save(step, self.tokens_seen, best, scores)

    def finish(self, result: str) -> None:
        """The last message. result: what became of the model."""
        self.log.close()
        seconds = time.perf_counter() - self.started
        self.log.say(f"done in {seconds:.0f} s: {self.objective.result()}\n  {result}\n  {self.saver.say_total()}")
