"""Runs a training command under failure detection and turns what happens into an exit code and a message."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable

import torch

from bge_ds.config.arguments import TrainArguments
from bge_ds.distributed import collectives
from bge_ds.health import exit_codes, failure_detector
from bge_ds.training.nonfinite import Diverged


class Preempted(Exception):
    """A signal has stopped the run, after a step that all ranks have done; the words for the user."""


def run_command(train: Callable[[TrainArguments], None], args: TrainArguments) -> int:
    """Run a training command, all its ranks watched; the exit status, one of `statuses`.

    A user's mistake becomes one line, on the first rank of each host.
    """
    status = exit_codes.FAILED
    try:
        failure_detector.join(args.join_timeout)
        train(args)
        status = exit_codes.DONE
    except (Preempted, Diverged) as stop:
        status = exit_codes.PREEMPTED if isinstance(stop, Preempted) else exit_codes.DIVERGED
        if is_first_on_host():
            print(stop, file=sys.stderr, flush=True)
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        status = exit_codes.MISTAKE
        if is_first_on_host():
            print(f"error: {error}", file=sys.stderr, flush=True)
            if logging.getLogger("bge_ds").isEnabledFor(logging.DEBUG) or isinstance(error, NotImplementedError):
                traceback.print_exc()
        failure_detector.fail(status, str(error))
    except BaseException as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            failure_detector.await_cause()  # such as a collective's "connection closed", which does not say why
        if failure_detector.several():
            traceback.print_exc()  # the process ends before Python would print it
        failure_detector.fail(status, f"{type(error).__name__}: {error}")
        raise
    finally:
        collectives.leave()
        failure_detector.leave(keep_ignoring=status == exit_codes.PREEMPTED)
    return status


def stop_preempted(args: TrainArguments, step: int) -> None:
    """End a run that a signal stops after `step`, where it has saved what it can."""
    if args.save_only_model:
        then = "nothing to resume from was saved (--save_only_model)"
    else:
        then = f"saved {args.output_dir}/checkpoint-{step}; start again with --resume_from_checkpoint auto to resume"
    raise Preempted(f"stopped by {failure_detector.stopper()} after step {step}; {then}")


def is_first_on_host() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def silent(_: str) -> None:
    """For ranks that have nothing to say."""
