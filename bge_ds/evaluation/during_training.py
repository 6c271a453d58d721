"""Evaluation while training: when it happens, its log, the best checkpoint. What it measures is in `evaluators.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from bge_ds.checkpoint import checkpoint
from bge_ds.checkpoint.state_file import Best
from bge_ds.config.arguments import TrainArguments
from bge_ds.data import beir
from bge_ds.data.beir import RetrievalSet
from bge_ds.distributed import collectives
from bge_ds.evaluation import retrieval
from bge_ds.evaluation.evaluators import Evaluator

if TYPE_CHECKING:
    from bge_ds.training.metrics import Meter, RunLog
    from bge_ds.training.setup import StepPlan

METRIC = "eval_nDCG@10"  # the mean over the sets


def open_sets(args: TrainArguments) -> dict[str, RetrievalSet]:
    """Reads and checks the folders of `--eval_data`, before anything slow happens."""
    sets = beir.read_folders([Path(folder) for folder in args.eval_data], "--eval_data")
    if sets:
        metric_of(args, sets)
    return sets


def metric_of(args: TrainArguments, sets: dict[str, RetrievalSet]) -> str:
    """The full name of `--metric_for_best_model`, which may be given without `eval_`."""
    wanted = args.metric_for_best_model or METRIC
    names = [f"eval_{measure}" for measure in retrieval.NAMES]
    names += [f"eval_{name}_{measure}" for name in sets for measure in retrieval.NAMES]
    for name in names:
        if wanted in (name, name.removeprefix("eval_")):
            return name
    raise ValueError(f"--metric_for_best_model {wanted} is none of what is measured: {', '.join(names)}")


class Evaluation:
    """A run's evaluations: when they happen, their log, the best checkpoint, and which model becomes the result.

    A checkpoint is compared by the evaluation at its own step. Every rank has the same figures and makes the same decisions.
    evaluator: None without `--eval_data`; then nothing is evaluated.
    """

    def __init__(
        self, args: TrainArguments, evaluator: Evaluator | None, model: nn.Module, plan: StepPlan, log: RunLog, metric: str
    ):
        self.evaluator, self.model, self.plan, self.log, self.metric = evaluator, model, plan, log, metric
        self.save_best, self.load_best = args.save_strategy == "best", args.load_best_model_at_end
        self.output = Path(args.output_dir)
        self.best: Best | None = None  # step, metric and value of the best checkpoint
        self.best_folder = self.output
        self.latest: tuple[int, float] | None = None
        self.scores: tuple[int, dict[str, dict[str, float]]] = -1, {}  # step, set -> measure -> value

    def resume(self, path: Path) -> None:
        """Restores the best checkpoint as recorded in the one that the run resumes from."""
        found = checkpoint.read_best(path)
        if found is None:
            return
        if found[0]["metric"] != self.metric:
            self.log.say(f"warning: checkpoints were judged by {found[0]['metric']} so far, not by {self.metric}")
            return
        self.best, self.best_folder = found
        if self.load_best and not self.best_folder.is_dir():
            raise ValueError(
                f"--load_best_model_at_end: the best checkpoint so far, {self.best_folder}, is gone; put it back, resume from "
                "another checkpoint, or drop the flag"
            )

    def at(self, step: int, meter: Meter | None = None) -> bool:
        """Evaluates where the plan says so. True: a checkpoint is to be saved (`--save_strategy best`)."""
        if self.evaluator is None or not self.plan.evaluates(step):
            return False
        self.evaluate(step, meter)
        return self.save_best and self._improves()

    def evaluate(self, step: int, meter: Meter | None = None) -> None:
        """Evaluates and logs; `meter` excludes the time from that of the steps."""
        values = self.evaluator(self.model)
        self.latest = step, values[self.metric]
        self.scores = step, {of: {m: values[f"eval_{of}_{m}"] for m in retrieval.NAMES} for of in self.evaluator.sets}
        # With one set, its figures are the means.
        means = [f"eval_{measure}" for measure in retrieval.NAMES if len(self.evaluator.sets) == 1]
        self.log.write_evaluation({"step": step, **values}, [k for k in values if k not in (*means, "eval_seconds")])
        if meter is not None:
            meter.leave_out(values["eval_seconds"])

    def scores_at(self, step: int) -> dict[str, dict[str, float]]:
        """What was measured after just this step, by set and measure; {} where nothing was."""
        return self.scores[1] if self.scores[0] == step else {}

    def _improves(self) -> bool:
        return self.best is None or self.latest[1] > self.best["value"]

    def judge(self, step: int) -> Best | None:
        """Step, metric and value of the best checkpoint, including the one of `step` that is about to be written."""
        if self.latest is not None and self.latest[0] == step and self._improves():
            self.best = {"step": step, "metric": self.metric, "value": self.latest[1]}
            self.best_folder = self.output / f"checkpoint-{step}"
        return self.best

    @property
    def returns_best(self) -> bool:
        return self.load_best and self.best is not None

    def result(self, save: Callable[[Path], float]) -> Callable[[Path], float]:
        """The function that writes the final model into a folder: `save`, or a copy of the best checkpoint's model."""
        return self._copy_best if self.returns_best else save

    def _copy_best(self, folder: Path) -> float:
        def copy() -> float:
            checkpoint.check_model(self.best_folder)  # it may have been damaged since it was written
            checkpoint.copy_model(self.best_folder, folder)
            inner = folder / "encoder_model"
            self.evaluator.check_loaded(inner if inner.is_dir() else folder)
            return 0.0

        return collectives.on_first_rank(copy)

    def say_result(self, difference: float, gives: str) -> str:
        if self.returns_best:
            how = f"{self.best['metric']} {self.best['value']:.4f}"
            return f"it is that of {self.best_folder}, the best ({how}), and loads with transformers"
        return f"loaded back with transformers, its {gives} differ from the trained model's by at most {difference:.1e}"


def prepare(
    args: TrainArguments, evaluator: Evaluator | None, model: nn.Module, plan: StepPlan, log: RunLog, resumed: Path | None
) -> Evaluation:
    """The run's evaluations, the one before the first step made (`--eval_on_start`)."""
    if evaluator is None:
        return Evaluation(args, None, model, plan, log, METRIC)
    evaluation = Evaluation(args, evaluator, model, plan, log, metric_of(args, evaluator.sets))
    words = ", ".join(evaluator.describe(name) for name in evaluator.sets)
    log.say(f"evaluating on {words}; the best checkpoint is that of the highest {evaluation.metric}")
    if resumed is not None:
        evaluation.resume(resumed)
    elif args.eval_on_start:
        evaluation.evaluate(0)
    return evaluation
