"""The command `python -m bge_ds.finetune` with a rank that does something to itself at the end of given steps, each once.

`deepspeed --module programs.unlucky`. TEST_PLAN in the environment: "STEP:SIGNAL ...", for rank 1.
"""

import os
import signal
import sys
from pathlib import Path

from bge_ds import finetune
from bge_ds.health import failure_detector

real = failure_detector.last_step


def last_step(step: int):
    plan = dict(entry.split(":") for entry in os.environ.get("TEST_PLAN", "").split() if entry)
    done = Path(f"done-{step}")
    if os.environ["RANK"] == "1" and str(step) in plan and not done.exists():
        done.touch()
        os.kill(os.getpid(), getattr(signal, plan[str(step)]))
    return real(step)


if __name__ == "__main__":
    failure_detector.last_step = last_step
    sys.exit(finetune.main())
