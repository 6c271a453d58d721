"""Ranks that train on a process group with NCCL's rules; each writes what its run issued to `OUTPUT_DIR.RANK`.

Argument: JSON of [[command, flags]].
"""

import json
from pathlib import Path

import strict_backend

from bge_ds.distributed import collectives
from programs.train import train


def main(runs: str) -> None:
    strict_backend.install()
    for command, flags in json.loads(runs):
        strict_backend.record.clear()
        strict_backend.phases[:] = ["start"]
        train(command, flags)
        Path(f"{flags['output_dir']}.{collectives.rank()}").write_text(json.dumps(strict_backend.record))
