"""Ranks of different speeds agree on one last step, whatever the order in which they hear of it."""

from __future__ import annotations

import random
import threading

import pytest

from bge_ds.health.preemption import CommonStep


def test_one_rank_stops_after_the_step_it_is_at():
    stop = CommonStep(1)
    assert stop.done(1) is None
    stop.by = "SIGTERM to rank 0"
    assert stop.done(2) == 2


def test_a_rank_that_was_past_the_proposal_gets_a_later_one():
    """And what it answered to the earlier one counts for nothing afterwards."""
    first, second = CommonStep(2), CommonStep(2)
    assert first.done(5) is None and second.done(9) is None
    proposal = first.propose()
    assert proposal > 5
    assert first.answer(1, second.hold(proposal), proposal) is False
    later = first.propose()
    assert later > 9
    assert first.answer(1, 9, proposal) is None  # late
    assert first.answer(1, second.hold(later), later) is True
    first.agree()
    second.agree()
    assert first.answer(1, 9, later) is None
    assert (first.done(6), second.done(10)) == (later, later)


@pytest.mark.parametrize("seed", range(20))
def test_threads_that_go_on_stepping_stop_at_one_step(seed):
    """Four main threads at speeds of their own, messages that take their time: all end after one step, none before it."""
    chance, world = random.Random(seed), 4
    stops = [CommonStep(world) for _ in range(world)]
    speeds = [chance.uniform(0, 2e-4) for _ in range(world)]
    last, ended, pause = [0] * world, [False] * world, threading.Event()

    def train(rank):
        for step in range(1, 100_000):
            last[rank] = step
            if (agreed := stops[rank].done(step)) is not None and step >= agreed:
                ended[rank] = step == agreed
                return
            pause.wait(speeds[rank])

    threads = [threading.Thread(target=train, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    pause.wait(0.005)
    verdict = False
    while verdict is False:
        proposal = stops[0].propose()
        for rank in chance.sample(range(1, world), world - 1):
            pause.wait(chance.uniform(0, 1e-3))
            verdict = stops[0].answer(rank, stops[rank].hold(proposal), proposal)
    assert verdict is True
    for rank in chance.sample(range(world), world):
        pause.wait(chance.uniform(0, 1e-3))
        stops[rank].agree()
    for thread in threads:
        thread.join(30)
    assert all(ended) and len(set(last)) == 1, last
