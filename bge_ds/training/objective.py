"""What the training loop asks of an objective. Set-up, resuming, logging and saving are the loop's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from bge_ds.checkpoint import filesystem
from bge_ds.config.arguments import TrainArguments
from bge_ds.data.beir import RetrievalSet
from bge_ds.evaluation import during_training
from bge_ds.evaluation.evaluators import Evaluator
from bge_ds.kernels.packed import PackedTexts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Values = dict[str, torch.Tensor | float]  # of one micro batch or step, by name; tensors are 0-dim
Scores = dict[str, dict[str, float]]  # name of an evaluation set -> measure -> value; empty where none was made
Engine = Any  # deepspeed.DeepSpeedEngine; deepspeed has no types


class Objective:
    """One training objective: what a batch is, forward and backward of a micro batch, what to log, how to save.

    Its constructor takes the parsed arguments and sets the four attributes below. It runs on every rank before the ranks meet:
    no collectives. `args` may differ from what it was given in values taken from the shards (`config/run_config.py`).
    """

    title: ClassVar[str]  # first line of the summary
    gives: ClassVar[str] = "vectors"  # what `save` compares, in words
    loss_names: ClassVar[tuple[str, ...]] = ("loss",)  # of `backward`'s values: those that a skipped step makes NaN
    resume_names: ClassVar[tuple[str, ...]] = ()  # arguments that decide the weights, beside those of every objective
    publishes_checkpoints: ClassVar[bool] = False  # each checkpoint's model is also placed in the output folder

    args: TrainArguments
    tokenizer: PreTrainedTokenizerBase
    data: Any  # a reader of shards
    model_config: PretrainedConfig

    def build_model(self, device: torch.device) -> nn.Module:
        """The model that the engine wraps, on every rank, with torch's generator seeded."""
        raise NotImplementedError

    def backbone(self, model: nn.Module) -> nn.Module:
        """The part of the model whose layers --torch_compile compiles."""
        return model

    def check(self) -> None:
        """Refuse what only the number of ranks makes wrong; on every rank. Raises ValueError."""

    def facts(self, runs: str) -> list[tuple[str, str]]:
        """Rows of the summary. runs: how the backbone runs on this device, in words."""
        return [("model", runs), ("data", f"{len(self.data)} rows")]

    def warnings(self, eval_sets: Mapping[str, RetrievalSet], epochs: float) -> list[str]:
        """Lines after the summary, about what will hurt. eval_sets: --eval_data. epochs: of the whole run. On rank 0."""
        return []

    def collate(self, seed: int) -> tuple[Callable, dict[str, Any]]:
        """A function (shards, epochs_N, rows_N, **options) -> batch of one micro batch, and its options.

        A batch has `texts` (PackedTexts), `to(device)` and `rows_and_roles()`; loader processes call the function.
        """
        raise NotImplementedError

    def counts_to_exchange(self, micro_batches: list) -> list[int]:
        """Whole numbers of this rank's step that every rank must know; they are exchanged a step ahead."""
        return []

    def shares(self, micro_batches: list, counts_R: list[list[int]]) -> list:
        """What `backward` needs to know of all ranks, for each micro batch. counts_R: of every rank, or empty lists."""
        return [None] * len(micro_batches)

    def backward(self, engine: Engine, batch: Any, share: Any, seed: Callable[[int], None]) -> Values:
        """Forward and backward pass of a micro batch. seed(k) seeds dropout for its k-th piece.

        Returns values that the loop adds up over micro batches, steps and ranks, without waiting for the device.
        """
        raise NotImplementedError

    def flops(self, model: nn.Module, batch: Any) -> float:
        """Floating-point operations of the forward and backward pass of a micro batch, for MFU."""
        return 0.0

    def record(self, sums: dict[str, float], model: nn.Module, batch: Any) -> dict[str, float]:
        """What the log says: `loss` first. sums: of `backward`'s values over the logged steps and all ranks, and `steps`,
        `micro_batches` (of all ranks), `tokens`. batch: the last one. On every rank."""
        return {"loss": sums["loss"] / sums["micro_batches"]}

    def chance(self, record: dict[str, float]) -> float | None:
        """The loss of a model that has learned nothing, for `record`; None where that is not known."""
        return None

    def open_evaluation(self) -> dict[str, RetrievalSet]:
        """The sets of --eval_data, read and checked before anything slow happens; {} without."""
        return during_training.open_sets(self.args)

    def evaluator(self, sets: dict[str, RetrievalSet], device: torch.device) -> Evaluator:
        """What measures the model while training; on every rank."""
        raise ValueError("--eval_data: this objective has nothing to evaluate")

    def evaluated(self, model: nn.Module) -> nn.Module:
        """The part of the model that the evaluator is given."""
        return model

    def save(self, engine: Engine, folder: Path, scores: Scores) -> float:
        """Write the model into an existing empty folder and load it back; the largest difference found. On every rank.

        scores: what an evaluation of just this model has found, for its card.
        """
        raise NotImplementedError

    def place(self, written: Path, output: Path) -> None:
        """Move a model that `save` wrote beside the output folder into it, replacing the last one; on rank 0."""
        filesystem.merge_folder(written, output, last=())

    def model_folder(self, output: Path) -> Path:
        """Where in the output folder the model is that others load."""
        return output

    def result(self) -> str:
        """Where the model is, for the last message."""
        return f"the model is in {self.args.output_dir}"


def count_tokens(micro_batches: list) -> tuple[int, int]:
    """(tokens, tokens of rectangles with the same texts) of a step's micro batches."""
    texts: list[PackedTexts] = [batch.texts for batch in micro_batches]
    return sum(t.tokens for t in texts), sum(t.padded_tokens for t in texts)
