"""What a run derives from its arguments, its shards and the checkpoint it resumes from, in one place.

Arguments do not change after parsing: a derived value gives new arguments of the same class, in which the loop, the engine and
the data loader find what holds for this run.
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
