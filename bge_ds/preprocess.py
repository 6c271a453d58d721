"""Preprocessing: texts -> Arrow shards, once.

python -m bge_ds.preprocess finetune --input train.jsonl --output shards --tokenizer BAAI/bge-small-en
python -m bge_ds.preprocess merge part1 part2 --output shards
python -m bge_ds.preprocess inspect shards
python -m bge_ds.preprocess verify shards
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from bge_ds.config.parser import exit_status, to_bool
from bge_ds.data.preprocess import input_files, inspection, merge, output_folder, table_files, validate, word_segmentation
from bge_ds.data.preprocess.build import Share, build, tell
from bge_ds.data.preprocess.prepare import make_settings
from bge_ds.data.preprocess.workers import LENGTHS, SETTINGS
from bge_ds.data.shards import integrity, shard_reader
from bge_ds.data.shards.manifest_file import Manifest

_HOW: dict[str, dict[str, Any]] = {
    "query_instruction_format": {"help": "how a line's own prompt is joined with its query (default {}{})"},
    "passages_by_type": {
        "type": to_bool, "nargs": "?", "const": True, "metavar": "True|False",
        "help": "for finetune --same_dataset_within_batch: passages of lines of type symmetric_sts and symmetric_clustering "
                "begin as their query does",
    },
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def add(self, name: str, **how: Any) -> None:
        """A flag, spelled with underscores or with hyphens."""
        self.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **how)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m bge_ds.preprocess", description="Texts to Arrow shards.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for kind, settings in SETTINGS.items():
        one = commands.add_parser(kind, allow_abbrev=False, help=f"make shards for bge_ds.{kind}")
        add = one.add
        kinds = ", ".join(input_files.KNOWN)
        add("input", nargs="+", required=True, help=f"files ({kinds}), folders, quoted globs, {table_files.HUB_SYNTAX}")
        add("output", required=True, help="folder to write; it appears when all is done")
        add("tokenizer", required=True, help="folder or hub name; must be the trained model's")
        for name, default in settings.items():
            if name in LENGTHS:
                add(name, type=int, default=default, help=f"tokens, special tokens included (default {default})")
            elif name == "word_segmenter":
                said = "finds the words of Chinese texts, which are masked whole; none: each character is a word"
                add(name, choices=word_segmentation.SEGMENTERS, default=default, help=said)
            else:
                add(name, default=default, **_HOW.get(name, {"help": "put before the text as it is, no separator added"}))
        add("columns", nargs="+", default=[], metavar="FIELD=COLUMN", help="what the input calls a field, e.g. text=content")
        if kind == "finetune":
            add("additional_special_tokens", nargs="+", default=[], metavar="TOKEN", help="as finetune is given them")
            add("corpus", nargs="+", default=[], help="files of _id, title, text, whose passages pos_ids and neg_ids name")
        add("num_proc", type=int, default=0, help="worker processes (default: one for each core)")
        add("partition", default="1/1", metavar="I/N", help="make part I of N alone, for merge (I counts from 1)")
        add("sample", type=int, default=0, metavar="N", help="a quick look: the first N lines of each input alone")
        add("on_error", choices=("raise", "skip"), default="raise", help="what a bad line does (default raise)")
        add("skip_unknown", action="store_true", help="pass over files of unknown kinds in folders")
        add("shard_bytes", type=int, default=shard_reader.SHARD_BYTES, help="bytes of input a shard (default 256 MiB)")
        add("overwrite", action="store_true", help="replace the shards in --output")
        add("cache_dir", help="where tokenizers from the hub are kept")
    one = commands.add_parser("merge", allow_abbrev=False, help="join all parts of a run with --partition, moving no data")
    one.add_argument("parts", nargs="+", type=Path, help="the folders that the runs with --partition wrote")
    one.add_argument("--output", type=Path, required=True, help="folder to write")
    one.add_argument("--overwrite", action="store_true", help="replace the shards in --output")
    one = commands.add_parser("inspect", help="print what a folder of shards holds")
    one.add_argument("folder", type=Path, help="folder of shards")
    one.add_argument("--sample", type=int, default=3, help="rows to decode (default 3)")
    one.add_argument("--histogram", type=Path, metavar="FILE", help="draw the lengths into a .png or .svg file")
    one = commands.add_parser("verify", help="check every hash")
    one.add_argument("folder", type=Path, help="folder of shards")
    return parser


def _make(args: argparse.Namespace, alone: bool) -> None:
    named = {name: getattr(args, name) for name in SETTINGS[args.command]}
    for name, least in {"num_proc": 0, "shard_bytes": 1, "sample": 0, **dict.fromkeys(LENGTHS, 1)}.items():
        if getattr(args, name, least) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: give {least} or more")
    corpus = getattr(args, "corpus", [])
    columns = _columns(args.columns, args.command, bool(corpus))
    share = _share(args.partition, args.sample)
    output_folder.check_output(Path(args.output), args.overwrite)
    found = input_files.find_sources(args.input, args.skip_unknown)
    entries = input_files.find_sources(corpus, args.skip_unknown) if corpus else []
    tokenizer = validate.load_tokenizer(args.tokenizer, args.cache_dir, only_texts=alone)
    validate.add_special_tokens(tokenizer, getattr(args, "additional_special_tokens", []))
    core = validate.core(tokenizer)
    settings = make_settings(args.command, args.on_error, columns=columns, **named)
    made = build(
        Path(args.output), found, (settings, core), corpus_inputs=entries, share=share,
        num_proc=args.num_proc, shard_bytes=args.shard_bytes, overwrite=args.overwrite,
    )  # fmt: skip
    if share.of > 1:
        print(f"wrote {args.output}: part {share.part} of {share.of}, to be merged when all are made")
    else:
        _say_written(Path(args.output), made)


def _columns(given: list[str], kind: str, by_id: bool) -> tuple[tuple[str, str], ...]:
    fields = (*validate.KEYS["by_id"], *validate.KEYS["corpus"]) if by_id else validate.KEYS[kind]
    pairs = [tuple(pair.split("=", 1)) for pair in given]
    for pair, text in zip(pairs, given, strict=True):
        if len(pair) != 2 or pair[0] not in fields or not pair[1]:
            raise ValueError(f"--columns {text}: give FIELD=COLUMN, FIELD one of {', '.join(fields)}")
    if len({field for field, _ in pairs}) < len(pairs):
        raise ValueError(f"--columns {' '.join(given)}: each field once")
    return tuple(sorted(pairs))


def _share(partition: str, sample: int) -> Share:
    part, _, of = partition.partition("/")
    if not (part.isdecimal() and of.isdecimal()):
        raise ValueError(f"--partition {partition}: give i/n with i from 1 to n, e.g. 1/4")
    return Share(int(part), int(of), sample)


def _merge(args: argparse.Namespace) -> None:
    manifest = merge.merge(args.parts, args.output, args.overwrite)
    tell(args.output, manifest, manifest.tokenizer.name, print)
    _say_written(args.output, manifest)


def _say_written(output: Path, manifest: Manifest) -> None:
    counts = ", ".join(f"{value:,} {name}" for name, value in manifest.counts.items())
    print(f"wrote {output}: {counts}, {len(manifest.shards)} shards")


def main(argv: list[str] | None = None, alone: bool = False) -> int:
    """The command. alone: the process loads no model after it, see `validate.load_tokenizer`.

    Returns the exit status: 0, or 2 after one line `error: ...` on stderr."""
    again = "the same command continues from the segments that are finished"
    return exit_status(lambda: _run(_parser().parse_args(argv), alone), again)


def _run(args: argparse.Namespace, alone: bool) -> None:
    if args.command == "inspect":
        inspection.inspect(args.folder, args.sample, args.histogram)
    elif args.command == "verify":
        if problems := integrity.verify_folder(args.folder):
            raise ValueError("; ".join(problems))
        print(f"{args.folder}: every shard is as it was written")
    elif args.command == "merge":
        _merge(args)
    else:
        _make(args, alone)


def run() -> int:
    """The command as a process of its own."""
    return main(alone=True)


if __name__ == "__main__":
    sys.exit(run())
