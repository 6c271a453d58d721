"""A teacher's scores for training groups: `python -m bge_ds.score --model_name_or_path M --input F.jsonl --output G.jsonl`.

Each line gets `pos_scores` and `neg_scores`, for `bge_ds.finetune --knowledge_distillation`; scores can also filter passages.
Under `deepspeed` or `torchrun` the ranks share the work. Killed and started again, it continues.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from bge_ds.config.embedding_flags import add_embedding_flags
from bge_ds.config.parser import CommandParser, exit_status, positive_int, to_bool


def parser() -> argparse.ArgumentParser:
    p = CommandParser(prog="bge_ds.score", description=__doc__.split("\n")[0].split(": ")[0], allow_abbrev=False)
    add = p.add_argument
    switch = {"type": to_bool, "nargs": "?", "const": True, "metavar": "True|False"}
    add("--model_name_or_path", "--reranker_name_or_path", required=True, metavar="MODEL",
        help="folder or hub name of the teacher: a cross-encoder or an embedder")  # fmt: skip
    add("--input", "--input_file", required=True, nargs="+", metavar="PATH",
        help="files of `query`, `pos`, `neg`, folders, quoted globs or hub data sets")  # fmt: skip
    add("--output", "--output_file", required=True, type=Path, metavar="FILE", help="JSON lines; packed where it ends in .gz")
    add("--teacher", choices=("cross-encoder", "embedder"), help="what the model is (default: what its files say)")
    add("--min_pos_score", type=_finite, metavar="X", help="drop positives below it, and groups that are left without one")
    add("--max_neg_score", type=_finite, metavar="X", help="drop negatives above it")
    add("--normalize", dest="sigmoid", default=False, help="scores through a sigmoid; filters apply to the result", **switch)
    add("--max_len", "--reranker_max_length", type=positive_int, help="tokens of a pair (512)")
    add("--query_max_len", "--reranker_query_max_length", type=positive_int,
        help="tokens of a query (3/4 of --max_len; of an embedder 64)")  # fmt: skip
    add("--passage_max_len", type=positive_int, help="tokens of a passage (--max_len; of an embedder 256)")
    add("--query_instruction_for_rerank", dest="query_instruction", metavar="TEXT",
        help='prefix of queries in pairs (default: none; decoders "A: ")')  # fmt: skip
    add("--passage_instruction_for_rerank", dest="passage_instruction", metavar="TEXT",
        help='prefix of passages in pairs (default: none; decoders "B: ")')  # fmt: skip
    add("--prompt", metavar="TEXT", help="what a decoder is asked after the pair (default: FlagEmbedding's prompt)")
    add("--columns", nargs="+", default=[], metavar="FIELD=COLUMN", help="what the input calls a field, e.g. pos=positive")
    add("--overwrite", action="store_true", help="replace --output, also where another job wrote it")
    add_embedding_flags(p)
    add("--reranker_batch_size", dest="batch_size", type=positive_int, default=argparse.SUPPRESS, help="as --batch_size")
    add("--use_bf16", dest="bf16", default=argparse.SUPPRESS, help="as --bf16", **switch)
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # which launchers add
    return p


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def run(args: argparse.Namespace) -> None:
    from bge_ds.scoring.run import Options, score  # torch is loaded here: --help needs none of it

    given = {name: value for name, value in vars(args).items() if name not in ("local_rank", "normalize", "sigmoid")}
    made = score(Options(**given, normalize=args.sigmoid, normalize_embeddings=args.normalize))
    if made is not None:
        n = {name: f"{count:,}" for name, count in made.counts.items()}
        print(f"wrote {args.output}: {n['groups']} groups, {n['pairs']} pairs scored")
        if args.min_pos_score is not None or args.max_neg_score is not None:
            print(
                f"dropped {n['pos_dropped']} positives, {n['neg_dropped']} negatives, and {n['groups_dropped']} groups for "
                f"want of positives; {n['groups_without_neg']} groups have no negative left"
            )


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 2 after a one-line message about a mistake of the user."""
    args = parser().parse_args(argv)
    return exit_status(lambda: run(args), "the same command continues from the blocks that are finished")


if __name__ == "__main__":
    sys.exit(main())
