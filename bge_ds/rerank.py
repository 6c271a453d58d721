"""Training a reranker: `deepspeed --num_gpus N -m bge_ds.rerank ...` (`--help` lists the flags)."""

from __future__ import annotations

import sys

from bge_ds.config.arguments import RerankArguments, parse


def train(args: RerankArguments) -> None:
    """One run, on every rank. Raises ValueError for mistakes of the user, before the first step where possible."""
    from bge_ds.objectives.reranking import RerankingObjective  # torch is loaded here: --help needs none of it
    from bge_ds.training import loop

    loop.train(RerankingObjective, args)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train; the exit code (`health/exit_codes.py`)."""
    args = parse(RerankArguments, argv)
    from bge_ds.training.command import run_command

    return run_command(train, args)


if __name__ == "__main__":
    sys.exit(main())
