"""Ranks that run the commands one after the other; after each, its exit status and how many graphs are compiled by now.

Arguments: JSON of [[command, flags]].
"""

import json
import sys

from torch._dynamo.utils import counters

from bge_ds.distributed import collectives
from bge_ds.training import command as commands
from programs.train import COMMANDS


def main(runs: str) -> None:
    sys.stderr = sys.stdout
    leave, collectives.leave = collectives.leave, lambda: None
    for command, flags in json.loads(runs):
        train, kind = COMMANDS[command]
        status = commands.run_command(train, kind.build(**flags, use_cpu=True))
        print("status", status, "graphs", counters["stats"]["unique_graphs"])
    collectives.leave = leave
