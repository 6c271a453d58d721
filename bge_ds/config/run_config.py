"""What a run derives from its arguments, in the order in which it becomes known; each stage derives its values once.

1. From the arguments alone: their `check()` brings values into the form that holds.
2. From the shards: `fill_from_shards` takes the lengths and instructions that the user did not give; a run from scratch takes
   the recipe for it (`fill_from_scratch`).
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


# The peak learning rate of random weights with so many features. It falls in proportion to the width, as Adam's steps should
# (Yang et al., arXiv:2203.03466); the value itself is measured at this width (docs/pretraining.md).
SCRATCH_RATE, SCRATCH_WIDTH, SCRATCH_WARMUP = 2e-3, 128, 0.1


def fill_from_scratch(args: _Arguments, width: int) -> _Arguments:
    """The recipe for random weights of `width` features, where the user did not say otherwise."""
    recipe: dict[str, float] = {"learning_rate": SCRATCH_RATE * min(1.0, SCRATCH_WIDTH / width)}
    if args.lr_scheduler_type != "constant":  # which has no warm-up
        recipe["warmup_steps"] = SCRATCH_WARMUP
    return with_values(args, **{name: value for name, value in recipe.items() if name not in args.explicit})
