"""Ranks whose chosen steps are not finite, or left out.

Arguments: JSON of plans: a command and its flags, the steps whose first micro batch has NaN in the embeddings of the last
rank, and the steps left out, in which nothing is computed at all. Prints the exit status of each run.
"""

import json
import sys

import torch

from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.objectives import contrastive
from bge_ds.training import command as commands
from bge_ds.training import loop, setup
from programs.train import COMMANDS

plan, now, last = {}, {"step": 0, "micro": 0}, []
seed_dropout, take_step, build, backward = loop.seed_dropout, engines.take_step, setup.build_engine, contrastive.backward


def note_and_seed(seed, step, micro, piece=0):
    now.update(step=step, micro=micro)
    seed_dropout(seed, step, micro, piece)


def poison(module, inputs, output):
    if now["step"] in plan["poisoned"] and now["micro"] == 0 and collectives.rank() == collectives.world_size() - 1:
        return output * float("nan")


def left_out() -> bool:
    return now["step"] in plan["left_out"]


def build_and_hook(args, model, steps):
    engine, config = build(args, model, steps)
    next(m for m in engine.module.modules() if isinstance(m, torch.nn.Embedding)).register_forward_hook(poison)
    own = engine.backward
    engine.backward = lambda loss, **more: None if left_out() else own(loss, **more)
    return engine, config


def backward_or_last(engine, batch, args, objective, seed, shares):
    seed(0)
    if not left_out():
        last[:] = [backward(engine, batch, args, objective, seed, shares)]
    return last[0]


def main(plans: str) -> None:
    sys.stderr = sys.stdout
    loop.seed_dropout, setup.build_engine, contrastive.backward = note_and_seed, build_and_hook, backward_or_last
    engines.take_step = lambda engine: False if left_out() else take_step(engine)
    leave, collectives.leave = collectives.leave, lambda: None
    for given in json.loads(plans):
        plan.clear()
        plan.update(given)
        train, kind = COMMANDS[plan["name"]]
        print("status", commands.run_command(train, kind.build(**plan["args"], use_cpu=True)))
    collectives.leave = leave
