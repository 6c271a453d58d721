"""Steps whose loss or gradient was not finite: counted, and too many in a row end the run, with its last texts written out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bge_ds.checkpoint import checkpoint
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bge_ds.training.objective import Engine

FOLDER = "nonfinite"


class Diverged(Exception):
    """Too many steps in a row were not finite; the message is for the user."""


class SkippedSteps:
    """Counts the steps that the engine skipped, and stops the run after `limit` in a row (0: no number stops it)."""

    def __init__(
        self, limit: int, output: Path, engine: Engine, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
    ):
        self.limit, self.output, self.engine, self.tokenizer, self.say = limit, output, engine, tokenizer, say
        self.in_a_row = self.since_read = 0

    def saw(self, step: int, applied: bool, losses: list[torch.Tensor], micro_batches: list) -> None:
        """Step `step` is over; on every rank. losses: this rank's, 0-dim. Raises Diverged, on all ranks alike."""
        if applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.since_read += 1
        if not self.engine.fp16_enabled():  # a loss scaler skips steps as it finds its scale
            self.say(f"step {step}: skipped, its loss or gradient is not finite ({self.in_a_row} in a row)")
        if self.limit and self.in_a_row >= self.limit:
            self._stop(step, losses, micro_batches)

    def keep(self) -> list[int]:
        """The counts, for a run that resumes from here."""
        return [self.in_a_row, self.since_read]

    def go_on(self, kept: Sequence[int]) -> None:
        self.in_a_row, self.since_read = kept

    def read(self) -> dict[str, int]:
        """For the log: the steps skipped since the last reading (fp16: what the loss scaler skipped so far), and in all."""
        found = {} if self.engine.fp16_enabled() else {"nonfinite_steps": self.since_read}
        self.since_read = 0
        return found | engines.skipped_steps(self.engine)

    def _stop(self, step: int, losses: list[torch.Tensor], micro_batches: list) -> None:
        file = self.output / FOLDER / f"step-{step:06d}-rank-{collectives.rank()}.jsonl"
        texts = f"Each rank's texts of this step are in {file.parent / f'step-{step:06d}-rank-*.jsonl'}"
        try:
            write_texts(file, micro_batches, self.tokenizer)
        except OSError as error:  # a full disk must not hide why the run ends
            texts = f"The texts of this step could not be written to {file} ({error})"
        # Also the sign that every rank has written: one that leaves takes the others with it.
        finite = collectives.gather_counts(int(torch.isfinite(torch.stack(losses)).all()), self.engine.device)
        where = [str(rank) for rank, is_finite in enumerate(finite) if not is_finite]
        whose = f"the loss of rank {', '.join(where)} is not finite" if where else "the losses are finite, the gradient is not"
        last = checkpoint.newest(self.output)
        raise Diverged(
            f"step {step}: {self.in_a_row} steps in a row were skipped as not finite (--max_nonfinite_steps {self.limit}); "
            f"{whose}. The weights are as they were before these steps; the last checkpoint is {last or 'none'}. {texts}. "
            "Lower --learning_rate or raise "
            "--warmup_steps, take --bf16 in place of --fp16, or look at these texts"
        )


def write_texts(file: Path, micro_batches: list, tokenizer: PreTrainedTokenizerBase) -> None:
    """One line a text: micro_batch, row of the training data, role (query, passage or text), and the text as decoded."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for micro, batch in enumerate(micro_batches):
            for row, role, ids in batch.decodable():
                line = {"micro_batch": micro, "row": row, "role": role, "text": tokenizer.decode(ids)}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
