"""What a run derives from its arguments, in the order in which it becomes known; each stage derives its values once.

1. From the arguments alone: their `check()` brings values into the form that holds.
2. From the shards: `fill_from_shards` takes the lengths and instructions that the user did not give.
3. From the number of ranks and the checkpoint: `fit_batch` (training/resume.py) sets each rank's part of the global batch.
4. From the order of the data: `StepPlan.make` (training/step_plan.py) resolves everything that is counted in steps.

Parsed arguments cannot be assigned to: stages 2 and 3 give new arguments of the same class.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from bge_ds.config.arguments import TrainArguments

_Arguments = TypeVar("_Arguments", bound=TrainArguments)


def with_values(args: _Arguments, **values: Any) -> _Arguments:
    """The same arguments with other values; what the user gave (`explicit`) stays what it was."""
    made = dataclasses.replace(args, **values)
    made.explicit = args.explicit
    return made.frozen()


def fill_from_shards(args: _Arguments, manifest: object, names: tuple[str, ...]) -> _Arguments:
    """Those of `names` that the user did not give, as the shards have them."""
    return with_values(args, **{name: getattr(manifest, name) for name in names if name not in args.explicit})
