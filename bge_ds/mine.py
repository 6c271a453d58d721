"""Hard negatives for training data: `python -m bge_ds.mine --model_name_or_path M --input groups.jsonl --output mined.jsonl`.

The passages most similar to a query are searched exactly; those in a range of ranks that are no positives become its `neg`.
Under `deepspeed` or `torchrun` the ranks share the work. Killed and started again, it continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import typing
from pathlib import Path

from bge_ds.config.embedding_flags import add_embedding_flags
from bge_ds.config.parser import CommandParser, exit_status, positive_int, to_bool
from bge_ds.evaluation import DEFAULT_LENGTHS
from bge_ds.mining.selection import Rules

if typing.TYPE_CHECKING:
    from bge_ds.mining.work import Report

# What FlagEmbedding's hn_mine calls a flag -> its name here.
ALIASES = {
    "input_file": "input", "output_file": "output", "embedder_name_or_path": "model_name_or_path",
    "pooling_method": "sentence_pooling_method", "embedder_query_max_length": "query_max_len",
    "embedder_passage_max_length": "passage_max_len",
}  # fmt: skip
# Flags of hn_mine that are refused: the value that asks for what happens anyway, and what to do instead.
REFUSED = {
    "use_fp16": ("False", "give --bf16"),
    "devices": (None, "start one rank a device, by deepspeed --include or CUDA_VISIBLE_DEVICES"),
    "embedder_model_class": ("encoder-only-base", "pooling and prompts are what the model's files say"),
    "query_instruction_format_for_retrieval": ("{}{}", "an instruction stands before the query"),
    "examples_for_task": (None, "models that take examples are not supported"),
    "examples_instruction_format": ("{}{}", "models that take examples are not supported"),
    "trust_remote_code": ("False", "code of a model is never executed"),
}
RULES, RULE_NAMES = Rules(), [field.name for field in dataclasses.fields(Rules)]


def parser() -> argparse.ArgumentParser:
    p = CommandParser(prog="bge_ds.mine", description=__doc__.split("\n")[0].split(": ")[0], allow_abbrev=False)
    add = p.add_argument
    add("--model_name_or_path", required=True, help="folder or hub name of the model")
    add("--input", required=True, nargs="+", metavar="PATH",
        help="files of `query`, `pos` and `neg`, folders, quoted globs, hub data sets; or folders of shards")  # fmt: skip
    add("--output", required=True, type=Path, metavar="PATH",
        help="JSON lines to write; .gz and .zst are compressed. Of shards: a folder of shards")  # fmt: skip
    add("--candidate_pool", nargs="+", metavar="PATH",
        help="files of `text`, which become negatives (default: all passages of the input)")  # fmt: skip
    add("--range_for_sampling", type=_range, default="10-210", metavar="FIRST-LAST",
        help="ranks that negatives come from: the FIRST best passages are skipped, those up to LAST taken")  # fmt: skip
    add("--negative_number", type=positive_int, default=RULES.negative_number, help="negatives of each query")
    add("--sampling", choices=("random", "top"), default=RULES.sampling, help="which of the range: any, or the best")
    add("--absolute_margin", type=float, metavar="X", help="a negative scores at most the lowest positive's score - X")
    add("--relative_margin", type=float, metavar="X",
        help="a negative scores at most the lowest positive's score - X times its absolute value; 0.05 is usual")  # fmt: skip
    add("--max_score", type=float, metavar="X", help="a negative scores at most X")
    add("--min_score", type=float, metavar="X", help="a negative scores at least X; random ones may score less")
    add("--no_fill", action="store_true", help="leave a query with fewer negatives, not fill up with random texts")
    add("--seed", type=int, help=f"of sampling and filling ({RULES.seed})")
    add("--index", choices=("exact", "faiss"), default="exact",
        help="faiss: approximate, all vectors in an inverted file; the recall is measured")  # fmt: skip
    add("--probes", type=positive_int, help="with --index faiss: lists searched for a query (an eighth, at least 8)")
    add("--search_batch_size", type=positive_int, help="queries scored at a time; fewer take less memory (512)")
    add("--use_gpu_for_searching", type=to_bool, nargs="?", const=True, metavar="True|False",
        help="a GPU is used where there is one; this makes it an error if there is none")  # fmt: skip
    add("--work", type=Path, metavar="FOLDER",
        help="keep the vectors here, to mine again by other rules (default: beside --output, removed at the end)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace --output, and the unfinished work of another job")
    for name, default in DEFAULT_LENGTHS.items():
        add(f"--{name}", type=positive_int, help=f"tokens, prompt and special tokens included ({default})")
    add_embedding_flags(p)
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # which launchers add
    for name in REFUSED:
        add(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    return p


def _range(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+-\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST-LAST, such as 10-210")
    first, _, last = text.partition("-")
    return int(first), int(last)


def own_names(argv: list[str]) -> list[str]:
    """The words of a command line with this command's names for the flags of hn_mine."""
    aliases = "|".join(ALIASES)
    return [re.sub(rf"^--({aliases})(?=$|=)", lambda found: f"--{ALIASES[found[1]]}", word) for word in argv]


def check(args: argparse.Namespace) -> None:
    """Refuse what the flags alone make wrong. Raises ValueError."""
    for name, (passes, remedy) in REFUSED.items():
        if (given := getattr(args, name)) is not None and given != [passes]:
            raise ValueError(f"--{name} {' '.join(given)}".rstrip() + f" is a flag of hn_mine without effect here: {remedy}")
    if args.seed is not None and args.sampling == "top" and args.no_fill:
        raise ValueError("--seed has no effect with --sampling top and --no_fill, as nothing is random: drop it")
    if args.use_gpu_for_searching and args.use_cpu:
        raise ValueError("--use_gpu_for_searching and --use_cpu exclude each other: drop one of them")


def run(args: argparse.Namespace) -> None:
    check(args)
    args.seed = RULES.seed if args.seed is None else args.seed
    rules = Rules(**{name: getattr(args, name) for name in RULE_NAMES})
    from bge_ds.mining.run import Options, mine  # torch is loaded here: --help needs none of it

    if args.use_gpu_for_searching:
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--use_gpu_for_searching: there is no GPU here; drop it")
    names = {field.name for field in dataclasses.fields(Options)} & vars(args).keys()
    if (report := mine(Options(rules=rules, **{name: getattr(args, name) for name in names}))) is not None:
        print(table(args.output, report, rules))


def table(output: Path, report: Report, rules: Rules) -> str:
    """What a user is told at the end."""
    counts, wanted, (first, last) = report.counts, rules.negative_number, rules.range_for_sampling
    rows = [f"wrote {output}: {counts['groups']:,} groups, up to {wanted} negatives each of {counts['pool']:,} passages"]
    rows += [f"  dropped as {name}: {count:,}" for name, count in report.dropped.items() if count]
    if counts["short"]:
        rows.append(f"  {counts['short']:,} groups had too few in ranks {first}-{last}; {counts['filled']:,} texts are random")
    if counts["fewer"]:
        rows.append(f"  {counts['fewer']:,} groups got fewer than {wanted}")
    if counts["neg_scores_dropped"]:
        rows.append(f"  {counts['neg_scores_dropped']:,} groups lost neg_scores, which were those of the old negatives")
    if report.recall is not None:
        rows.append(f"  faiss found {report.recall:.1%} of the {last} best passages, measured against exact search")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 2 after a one-line message about a mistake of the user."""
    args = parser().parse_args(own_names(sys.argv[1:] if argv is None else argv))
    return exit_status(lambda: run(args), "the same command continues from what is finished")


if __name__ == "__main__":
    sys.exit(main())
