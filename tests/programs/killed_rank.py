"""The command `python -m bge_ds.finetune` with a rank that kills itself, once a run, some time after a step or a save began.

Arguments: JSON of [rank, "step" or "save", step, delay in seconds], file that marks the kill as done, the command's own.
"""

import json
import os
import signal
import threading
from pathlib import Path

from bge_ds.checkpoint import checkpoint
from bge_ds.training import loop
from programs import command


def main(plan: str, done: str, *words: str) -> None:
    rank, moment, step, delay = json.loads(plan)
    mark = Path(done)

    def kill_soon():
        if os.environ["RANK"] == str(rank) and not mark.exists():
            mark.touch()
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    seed_step, save = loop.seed_dropout, checkpoint.save

    def seed(seed, number, *more):
        if moment == "step" and number >= step:
            kill_soon()
        seed_step(seed, number, *more)

    def saves(engine, output_dir, number, *more, **named):
        if moment == "save" and number >= step:
            kill_soon()
        return save(engine, output_dir, number, *more, **named)

    loop.seed_dropout, checkpoint.save = seed, saves
    command.main("finetune", *words)
