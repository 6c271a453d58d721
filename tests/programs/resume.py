"""Ranks that run both commands, each once to the end and once from the checkpoint in the middle.

`save` also notes the live model's vectors of six passages. Arguments: folder of the runs, JSON of flags.
"""

import json

import numpy as np

from bge_ds.distributed import collectives
from bge_ds.objectives.contrastive import ContrastiveObjective
from programs.train import train


def main(folder: str, given: str) -> None:
    flags, write = json.loads(given), ContrastiveObjective.save

    def write_and_note(self, engine, out, scores):
        ids = [self.data.passage(row) for row in range(6)]
        live = engine.module.encode_ids(ids).numpy()
        if collectives.rank() == 0:
            np.save(f"{folder}/live.npy", live)
        return write(self, engine, out, scores)

    ContrastiveObjective.save = write_and_note
    for command in ("finetune", "pretrain"):
        if command not in flags:
            continue
        common = {**flags["common"], **flags[command]}
        train(command, {**common, "output_dir": f"{folder}/{command}_whole"})
        if not flags.get("only_whole"):
            middle = f"{folder}/{command}_whole/checkpoint-3"
            train(command, {**common, "output_dir": f"{folder}/{command}_resumed", "resume_from_checkpoint": middle})
