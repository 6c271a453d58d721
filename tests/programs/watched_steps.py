"""Ranks that step without talking to each other, so that nothing but the watch holds them together.

Arguments: what happens ("steps", or one of the names below), seconds of rank 0's step, seconds to join in.
"""

import json
import os
import socket
import sys
import time

from bge_ds.health import failure_detector, rendezvous


def join_again(join_s: float) -> None:
    failure_detector.join(join_s)
    print("joined again", flush=True)
    failure_detector.leave()


def reused(rank: int, join_s: float) -> None:
    """The place of rank 0 is taken by a program that listens and says nothing."""
    kept, silent = failure_detector.store(), socket.create_server(("", 0))
    if rank == 0:
        where = json.loads(kept.get(rendezvous.KEY))
        kept.set(rendezvous.KEY, json.dumps({**where, "port": silent.getsockname()[1]}))
    time.sleep(0 if rank == 0 else 1)
    failure_detector.leave()
    time.sleep(4 if rank == 0 else 0)
    join_again(join_s)


def step_on(rank: int, mode: str, step_s: float) -> None:
    for step in range(1, 1000):
        if mode in ("mistake", "one-mistake") and (mode == "mistake" or rank == 1) and step == 3:
            failure_detector.fail(2, "the data is wrong")
        time.sleep(step_s * (1 + rank))
        last = failure_detector.last_step(step)
        print("step", step, flush=True)
        if last == step:
            print("stopped by", failure_detector.stopper(), flush=True)
            time.sleep(1)  # as if it saved
            failure_detector.leave(keep_ignoring=True)
            sys.exit(75)
    failure_detector.leave()


def main(mode: str, step_s: str, join_s: str) -> None:
    rank = int(os.environ["RANK"])
    print("imported", flush=True)
    if mode == "late" and rank == 1:
        time.sleep(600)
    failure_detector.join(float(join_s))
    print("joined", flush=True)
    if mode == "startup":
        time.sleep(600)
    if mode == "again":
        time.sleep(0 if rank else 2)
        failure_detector.leave()
        join_again(float(join_s))
    elif mode == "reused":
        reused(rank, float(join_s))
    else:
        step_on(rank, mode, float(step_s))
