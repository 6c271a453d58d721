"""The doctor's test across ranks: it finds nothing where all is well, at every ZeRO stage, and it finds a wrong gather."""

from __future__ import annotations

import json

import helpers
import pytest

from bge_ds.doctor.network_checks import LARGEST_DIFFERENCE

SCRIPT = """
import json, sys
from bge_ds.doctor import selftest
from bge_ds.distributed import collectives

def own_rows_only(ctx, grad):  # forgets what the other ranks' losses say of a row
    first = collectives.rank() * ctx.rows
    return grad[first : first + ctx.rows]

results = [selftest.run({"stage": stage}, use_cpu=True, timeout_s=120) for stage in json.loads(sys.argv[1])]
collectives._AllGatherRows.backward = staticmethod(own_rows_only)
results.append(selftest.run({"stage": 1}, use_cpu=True, timeout_s=120))
if collectives.rank() == 0:
    print("RESULT", json.dumps(results))
"""


def results(ranks: int, stages: list[int]) -> list[dict]:
    """Of each stage, and of stage 1 with a wrong gather."""
    printed = helpers.run_ranks(SCRIPT, ranks, json.dumps(stages))
    return json.loads(printed.split("RESULT", 1)[1].splitlines()[0])


@pytest.fixture(scope="module")
def two_ranks() -> list[dict]:
    return results(2, [0, 1, 2, 3])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_right_ranks_pass(two_ranks, stage):
    """Two ranks' step is that of one process with the whole batch, at every stage, with room to the bound."""
    found = two_ranks[stage]
    assert found["ranks"] == 2 and found["stage"] == stage
    assert 0 <= found["difference"] < LARGEST_DIFFERENCE / 10
    assert found["bytes_per_second"] == pytest.approx((16 << 20) / found["seconds"])


def test_a_wrong_gather_is_found(two_ranks):
    """A backward of the gather that drops the other ranks' share is far outside the bound."""
    assert two_ranks[-1]["difference"] > 100 * LARGEST_DIFFERENCE


def test_one_rank_is_tested_too():
    """Alone there is no one to talk to, and the engine's step must still be plain torch's."""
    found = results(1, [0])[0]
    assert found["difference"] < LARGEST_DIFFERENCE and "seconds" not in found
