"""The doctor's test across ranks: it finds nothing where all is well, at every ZeRO stage, and it finds a wrong gather."""

from __future__ import annotations

import json

import helpers
import pytest

from bge_ds.meeting import LARGEST_DIFFERENCE

SCRIPT = """
import json, sys
import torch
from bge_ds import selftest
from bge_ds.distributed import collectives
if sys.argv[2] == "own_rows_only":  # a gather whose backward forgets what the other ranks' losses say of a row
    def backward(ctx, grad):
        first = collectives.rank() * ctx.rows
        return grad[first : first + ctx.rows]
    collectives._AllGatherRows.backward = staticmethod(backward)
result = selftest.run({"stage": int(sys.argv[1])}, use_cpu=True, timeout_s=120)
if collectives.rank() == 0:
    print("RESULT", json.dumps(result))
"""


def result(stage: int, gather: str = "right", ranks: int = 2) -> dict:
    printed = helpers.run_ranks(SCRIPT, ranks, str(stage), gather)
    return json.loads(printed.split("RESULT", 1)[1].splitlines()[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_right_ranks_pass(stage):
    """Two ranks' step is that of one process with the whole batch, at every stage, with room to the bound."""
    found = result(stage)
    assert found["ranks"] == 2 and found["stage"] == stage
    assert 0 <= found["difference"] < LARGEST_DIFFERENCE / 10
    assert found["bytes_per_second"] == pytest.approx((16 << 20) / found["seconds"])


def test_a_wrong_gather_is_found():
    """A backward of the gather that drops the other ranks' share is far outside the bound."""
    assert result(1, "own_rows_only")["difference"] > 100 * LARGEST_DIFFERENCE


def test_one_rank_is_tested_too():
    """Alone there is no one to talk to, and the engine's step must still be plain torch's."""
    found = result(0, ranks=1)
    assert found["difference"] < LARGEST_DIFFERENCE and "seconds" not in found
