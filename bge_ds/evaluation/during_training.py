"""Evaluation while training: searches the `--eval_data` folders with the current model, and keeps track of the best checkpoint.

Shapes: Q queries, K kept passages a query, R ranks, N texts, D features.

Texts are divided into units of consecutive texts, and one rank encodes and searches each unit. So neither the batches nor any
bit of the result depend on the number of ranks. Each rank tokenizes its units once and keeps the best K of its own passages for
each query. These are merged, and every rank has the same ranking.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from bge_ds.checkpoint import checkpoint
from bge_ds.checkpoint.state_file import Best
from bge_ds.config.arguments import TrainArguments
from bge_ds.data import beir
from bge_ds.data.beir import RetrievalSet
from bge_ds.data.ragged import RaggedArrays
from bge_ds.distributed import collectives
from bge_ds.evaluation import retrieval
from bge_ds.kernels.packed import PackedTexts, chunk_bounds, pack, runs_of, split
from bge_ds.modeling.encoder import Encoder

if TYPE_CHECKING:
    from bge_ds.training.metrics import Meter, RunLog
    from bge_ds.training.setup import StepPlan

UNITS = 128  # least number of units of a large corpus: the ranks' shares then differ little
SMALLEST_UNIT, LARGEST_UNIT = 64, retrieval.BLOCK  # texts
METRIC = "eval_nDCG@10"  # the mean over the sets


class DistributedTexts:
    """A list of `count` texts in units, of which unit u is on rank u modulo R, tokenized."""

    def __init__(
        self, texts: Iterable[str], count: int, to_ids: Callable, largest_id: int, batch_tokens: int, device: torch.device
    ):
        rank, world = collectives.rank(), collectives.world_size()
        size = min(LARGEST_UNIT, max(SMALLEST_UNIT, -(-count // UNITS)))
        units = torch.arange(count).split(size)
        self.count, self.batch_tokens, self.device = count, batch_tokens, device
        self.order_N = torch.cat([unit for r in range(world) for unit in units[r::world]])  # rank by rank
        self.counts_R = [sum(map(len, units[r::world])) for r in range(world)]
        texts = iter(texts)
        self.units: list[tuple[int, RaggedArrays]] = []  # (index of the first text, token ids)
        for number, unit in enumerate(units):
            unit_texts = list(islice(texts, len(unit)))
            if number % world == rank:
                rows = RaggedArrays.of_lists(to_ids(unit_texts), np.min_scalar_type(largest_id))
                self.units.append((number * size, rows))
        own = sum(len(self._bounds(rows)) - 1 for _, rows in self.units)
        self.passes = collectives.largest(own, device)

    def _bounds(self, rows: RaggedArrays) -> list[int]:
        """Where to cut the rows, packed by length, into pieces of at most batch_tokens tokens (a longer row is alone)."""
        return chunk_bounds(runs_of(rows.lengths), None, self.batch_tokens)

    def encode(self, model: nn.Module) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of the first text, N x D fp32) of each unit of this rank.

        Under ZeRO-3 every forward issues collectives, so all ranks make as many passes as the one that needs most. An
        additional pass yields 0 x D.
        """
        done = 0
        for first, rows in self.units:
            texts, _ = pack(rows.split())
            pieces = split(texts, self._bounds(rows))
            done += len(pieces)
            yield first, torch.cat([self._forward(model, piece) for piece in pieces])[texts.place_N.to(self.device)]
        for _ in range(done, self.passes):
            yield self.count, self._forward(model, pack([np.zeros(1, np.int64)])[0])[:0]

    def _forward(self, model: nn.Module, texts: PackedTexts) -> torch.Tensor:
        return model(texts.to(self.device)).float()

    def encode_all(self, model: nn.Module) -> torch.Tensor:
        """The vectors of all texts, N x D fp32, on every rank."""
        own_ND = torch.cat([vectors_ND for _, vectors_ND in self.encode(model)])
        vectors_ND = collectives.all_gather_rows(own_ND, self.counts_R)
        out_ND = torch.empty_like(vectors_ND)
        out_ND[self.order_N.to(self.device)] = vectors_ND
        return out_ND


class Evaluator:
    """Searches each set with a model's vectors; to be called on every rank.

    Lengths are in tokens, prompts included; a batch holds at most batch_size full-length passages.
    """

    def __init__(
        self, sets: dict[str, RetrievalSet], tokenizer, device: torch.device, *,
        query_max_len: int, passage_max_len: int, query_prompt: str = "", passage_prompt: str = "", batch_size: int,
    ):  # fmt: skip
        # Threads tokenize here, and the loader's workers fork later: unset, the library would warn in each worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.sets, self.device = sets, device

        def distribute(texts: Iterable[str], count: int, prompt: str, length: int) -> DistributedTexts:
            def to_ids(unit: list[str]) -> list[list[int]]:
                return retrieval.tokenize(tokenizer, [prompt + text for text in unit], length)

            return DistributedTexts(texts, count, to_ids, len(tokenizer), batch_size * passage_max_len, device)

        self.texts: dict[str, tuple[DistributedTexts, DistributedTexts]] = {}  # queries and passages of each set
        for name, data in sets.items():
            queries = distribute(data.queries.values(), len(data.queries), query_prompt, query_max_len)
            passages = distribute(data.distinct(), len(data.firsts), passage_prompt, passage_max_len)
            self.texts[name] = queries, passages

    @torch.no_grad()  # not inference_mode: ZeRO-3 gathers weights in here that a later backward uses
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`eval_<set>_<measure>`, their means over the sets `eval_<measure>`, and `eval_seconds`; the same on every rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that the training step's kernels are not timed as evaluation
        started = time.perf_counter()
        training = model.training
        model.eval()
        found = {
            name: retrieval.measure(data, retrieval.ranking(data, self.rank(name, model).tolist()))
            for name, data in self.sets.items()
        }
        model.train(training)
        values = {f"eval_{name}_{measure}": v for name, measures in found.items() for measure, v in measures.items()}
        for measure in retrieval.NAMES:
            values[f"eval_{measure}"] = round(sum(measures[measure] for measures in found.values()) / len(found), 6)
        return values | {"eval_seconds": time.perf_counter() - started}

    def rank(self, name: str, model: nn.Module) -> torch.Tensor:
        """The indices of each query's best distinct texts, Q x K, best first."""
        queries, passages = self.texts[name]
        kept = min(retrieval.KEPT, passages.count)
        own_QK = retrieval.best_keys(queries.encode_all(model), passages.encode(model), kept)
        if collectives.world_size() > 1:
            missing = own_QK.new_full((len(own_QK), kept - own_QK.shape[1]), retrieval.NO_KEY)
            own_QK = torch.cat([own_QK, missing], dim=1)
            tiles = []
            for tile_QK in own_QK.split(retrieval.TILE):
                ranks_RQK = collectives.all_gather_rows(tile_QK).unflatten(0, (-1, len(tile_QK)))
                tiles.append(retrieval.best_of(ranks_RQK.transpose(0, 1).flatten(1), kept))
            own_QK = torch.cat(tiles)
        return retrieval.from_keys(own_QK)[1]


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
            loaded = Encoder.load(str(inner if inner.is_dir() else folder))
            _, rows = next(iter(self.evaluator.texts.values()))[1].units[0]
            if not loaded.encode_ids(rows.split()[:1]).isfinite().all():
                raise RuntimeError(f"the model of {self.best_folder} gives vectors that are not finite")
            return 0.0

        return collectives.on_first_rank(copy)

    def say_result(self, difference: float, gives: str) -> str:
        if self.returns_best:
            how = f"{self.best['metric']} {self.best['value']:.4f}"
            return f"it is that of {self.best_folder}, the best ({how}), and loads with transformers"
        return f"loaded back with transformers, its {gives} differ from the trained model's by at most {difference:.1e}"


def prepare(
    args: TrainArguments, sets: dict[str, RetrievalSet], tokenizer, model: nn.Module, device: torch.device,
    plan: StepPlan, log: RunLog, resumed: Path | None, **lengths_and_prompts,
) -> Evaluation:  # fmt: skip
    """The run's evaluations, with the texts tokenized and the one before the first step made (`--eval_on_start`)."""
    if not sets:
        return Evaluation(args, None, model, plan, log, METRIC)
    evaluator = Evaluator(sets, tokenizer, device, batch_size=args.per_device_eval_batch_size, **lengths_and_prompts)
    evaluation = Evaluation(args, evaluator, model, plan, log, metric_of(args, sets))
    sizes = [f"{name} ({len(data.queries)} queries, {len(data.passage_ids)} passages)" for name, data in sets.items()]
    log.say(f"evaluating on {', '.join(sizes)}; the best checkpoint is that of the highest {evaluation.metric}")
    if resumed is not None:
        evaluation.resume(resumed)
    elif args.eval_on_start:
        evaluation.evaluate(0)
    return evaluation
