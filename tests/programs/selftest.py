"""Ranks that run the doctor's test at each stage, and at stage 1 with a wrong gather. Argument: JSON of the stages."""

import json

from bge_ds.distributed import collectives
from bge_ds.doctor import selftest


def own_rows_only(ctx, grad):
    """Forgets what the other ranks' losses say of a row."""
    first = collectives.rank() * ctx.rows
    return grad[first : first + ctx.rows]


def main(stages: str) -> None:
    results = [selftest.run({"stage": stage}, use_cpu=True, timeout_s=120) for stage in json.loads(stages)]
    collectives._AllGatherRows.backward = staticmethod(own_rows_only)
    results.append(selftest.run({"stage": 1}, use_cpu=True, timeout_s=120))
    if collectives.rank() == 0:
        print("RESULT", json.dumps(results))
