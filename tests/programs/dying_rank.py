"""Ranks that train; one of them does something to itself at a chosen moment of its run.

Arguments: JSON of flags, moment, rank, a signal's name or "raise", command.
"""

import json
import os
import signal
import sys

import torch

from bge_ds.health import failure_detector
from bge_ds.objectives import contrastive, retromae
from bge_ds.training import command as commands
from bge_ds.training import loop
from programs.train import COMMANDS


def at(place, name: str, victim: int, act: str, times: int = 1) -> None:
    """Act when the victim calls `place.name` for the n-th time."""
    real, calls = getattr(place, name), []

    def reached(*args, **kwargs):
        calls.append(name)
        if len(calls) == times and int(os.environ["RANK"]) == victim:
            if act == "raise":
                raise RuntimeError("out of luck")
            os.kill(os.getpid(), getattr(signal, act))
        return real(*args, **kwargs)

    setattr(place, name, reached)


def main(given: str, moment: str, victim: str, act: str, command: str) -> None:
    who = {"victim": int(victim), "act": act}
    module, objective = {
        "finetune": (contrastive, contrastive.ContrastiveObjective), "pretrain": (retromae, retromae.RetroMAEObjective)
    }[command]  # fmt: skip
    if moment == "join":
        at(failure_detector, "join", **who)
    elif moment == "rendezvous":
        at(torch.distributed, "init_process_group", **who)
    elif moment == "data":
        at(module, "open_shards", **who)
    elif moment == "step":
        at(loop, "seed_dropout", times=3, **who)  # in the middle of a step, whose collectives the others wait in
    elif moment == "save":
        at(objective, "save", **who)
    train, kind = COMMANDS[command]
    sys.exit(commands.run_command(train, kind.build(**json.loads(given), use_cpu=True)))
