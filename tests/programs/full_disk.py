"""Ranks that train until the disk is full: once told so beforehand, once told that there is room.

Arguments: JSON of flags, folder with the two small disks.
"""

import json
import shutil

from bge_ds.distributed import collectives
from programs.train import train


def main(given: str, disks: str) -> None:
    flags, honest = json.loads(given), shutil.disk_usage
    for name, usage in (("seen", honest), ("unseen", lambda path: type(honest(path))(1 << 40, 0, 1 << 40))):
        shutil.disk_usage = usage
        try:
            train("finetune", {**flags, "output_dir": f"{disks}/{name}/run"})
        except ValueError as error:
            print(f"{name}, rank {collectives.rank()}: {error}", flush=True)
