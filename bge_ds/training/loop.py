"""The training loop: every training command runs `train` with its own objective.

Shapes and names: a step is one optimizer step of all ranks; it has `gradient_accumulation_steps` micro batches on each rank.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from bge_ds.checkpoint import checkpoint
from bge_ds.config.arguments import TrainArguments
from bge_ds.data import dataloader
from bge_ds.data.sampling.sampler import mix64
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.evaluation import during_training
from bge_ds.evaluation.during_training import Evaluation
from bge_ds.health import failure_detector
from bge_ds.modeling.encoder import describe_execution
from bge_ds.training import data_order, hub, resume, setup
from bge_ds.training.command import stop_preempted
from bge_ds.training.metrics import RunLog
from bge_ds.training.objective import Engine, Objective, Values
from bge_ds.training.recorder import Recorder
from bge_ds.training.step_plan import Order, StepPlan
from bge_ds.training.summary import summary


def train(make_objective: Callable[[TrainArguments], Objective], args: TrainArguments) -> None:
    """Train, log, evaluate, save. Raises ValueError for whatever the user can fix, before the first step where possible."""
    started = time.perf_counter()
    setup.set_up(args)
    objective = make_objective(args)
    eval_sets = objective.open_evaluation()
    device = engines.start(use_cpu=args.use_cpu, backend=args.ddp_backend, timeout_s=args.ddp_timeout)
    setup.check_compilation(args, objective.model_config, device)
    taken = resume.take_up(objective)
    args = objective.args
    torch.manual_seed(args.seed)
    model = objective.build_model(device)
    setup.compile_layers(args, objective.backbone(model))
    order = data_order.make_order(args, objective.data)
    plan = StepPlan.make(args, order)
    objective.check()
    engine, config = setup.build_engine(args, model, plan)

    agreement = resume.agreement(objective, plan) | {checkpoint.FROZEN: engines.mark_of_frozen(engine)}
    first_step, tokens_seen = resume.resume(args, taken, engine, agreement)
    log = open_log(args, engine, first_step, plan)
    facts = objective.facts(describe_execution(objective.model_config, device, engines.precision(engine)))
    facts.append(("sets", data_order.table(args, objective.data, order, plan.total)))
    log.say(f"{objective.title}\n{summary(args, plan, order, engine, config, facts)}")
    for warning in objective.warnings(eval_sets, plan.epoch(plan.total)) if collectives.rank() == 0 else []:
        log.say(f"warning: {warning}")
    if taken:
        log.say("\n".join([*taken.notes, f"resumed from {taken.path} at step {first_step}"]))
    steps = load_steps(objective, order, device, first_step, plan.total)
    evaluator, evaluated = None, engine.module
    if eval_sets:
        evaluator, evaluated = objective.evaluator(eval_sets, device), objective.evaluated(engine.module)
    evaluations = during_training.prepare(args, evaluator, evaluated, plan, log, taken.path if taken else None)
    asked = resume.asked_batch(args, taken)
    recorder = Recorder(objective, engine, log, taken, agreement, asked, tokens_seen, started, plan.warmup)

    engine.train()
    recorder.begin_step()
    for step, (micro_batches, counts_R) in enumerate(steps, start=first_step + 1):
        recorder.batch_loaded()
        learning_rate = engine.get_lr()[0]
        micro_batches = [batch.to(device) for batch in micro_batches]
        applied, values = train_step(objective, engine, step, micro_batches, counts_R)
        recorder.end_step(step, applied, values, micro_batches)
        if args.torch_empty_cache_steps and step % args.torch_empty_cache_steps == 0:
            torch.cuda.empty_cache()  # nothing on a CPU
        if plan.logs(step):
            recorder.write(step, plan.epoch(step), learning_rate, micro_batches[-1])
            engine.train()
        improved = evaluations.at(step, recorder.meter)
        stops = failure_detector.last_step(step) == step < plan.total
        if plan.saves(step) or improved or (stops and not args.save_only_model):
            recorder.save(step, evaluations.judge(step), evaluations.scores_at(step))
            engine.train()
        if stops:
            stop_preempted(args, step)
        recorder.begin_step()

    save = evaluations.result(partial(objective.save, engine, scores=evaluations.scores_at(plan.total)))
    finish(objective, save, evaluations, recorder)


def train_step(objective: Objective, engine: Engine, step: int, micro_batches: list, counts_R: list) -> tuple[bool, Values]:
    """(whether the optimizer took the step, the values of its micro batches added up)."""
    total: Values = {}
    applied = False
    for micro, (batch, share) in enumerate(zip(micro_batches, objective.shares(micro_batches, counts_R), strict=True)):
        seed = partial(seed_dropout, objective.args.seed, step, micro)
        values = objective.backward(engine, batch, share, seed)
        applied = engines.take_step(engine)
        total = {name: total[name] + value for name, value in values.items()} if total else values
    return applied, total


def seed_dropout(seed: int, step: int, micro: int, piece: int = 0) -> None:
    """Dropout's generators as a function of (seed, step, micro batch, rank, piece of its texts).

    A resumed run needs no random state, and a piece computed twice gives the same vectors twice.
    """
    torch.manual_seed(int(mix64(seed, step, micro, collectives.rank(), piece)) >> 1)


def load_steps(objective: Objective, order: Order, device: torch.device, first: int, end: int) -> Iterator[tuple[list, list]]:
    """(this rank's micro batches, the counts of every rank) of steps first..end-1."""
    args = objective.args
    collate, options = objective.collate(order.seed)
    steps = dataloader.steps(
        objective.data.folders,
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
        **options,
    )
    return collectives.exchange_ahead(steps, objective.counts_to_exchange, device)


def open_log(args: TrainArguments, engine: Engine, first_step: int, plan: StepPlan) -> RunLog:
    return RunLog(
        Path(args.output_dir) / "metrics.jsonl",
        first_step=first_step,
        total_steps=plan.total,
        show_bar=not args.disable_tqdm and sys.stderr.isatty(),
        write_events=engine.monitor.write_events,
    )


def finish(objective: Objective, save: Callable[[Path], float], evaluations: Evaluation, recorder: Recorder) -> None:
    """The final model in its place, the last message, the upload. save: writes the model into a folder."""
    args, output = objective.args, Path(objective.args.output_dir)
    difference, files = place_model(objective, save, output)
    recorder.finish(evaluations.say_result(difference, objective.gives))
    if args.push_to_hub and collectives.rank() == 0:  # the other ranks need not wait for it
        recorder.log.say(f"uploaded to {hub.push(args, objective.model_folder(output), files)}")


def place_model(objective: Objective, save: Callable[[Path], float], output: Path) -> tuple[float, list[str]]:
    """The final model into the output folder: written beside it, checked, then moved.

    Returns the difference that `save` found and, on rank 0, the files of `Objective.model_folder`.
    """
    files: list[str] = []

    def place(aside: Path) -> None:
        folder = objective.model_folder(aside)
        files.extend(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
        objective.place(aside, output)

    return checkpoint.write_aside(output, save, place), files
