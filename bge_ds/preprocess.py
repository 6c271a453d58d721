"""Preprocessing: texts -> Arrow shards, once. Also what a trainer calls when it is given JSON lines.

python -m bge_ds.preprocess finetune --input train.jsonl --output shards --tokenizer BAAI/bge-small-en
python -m bge_ds.preprocess merge part1 part2 --output shards
python -m bge_ds.preprocess inspect shards
python -m bge_ds.preprocess verify shards
"""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson
import xxhash

from bge_ds.data.preprocess import input_files, inspection, merge, output_folder, table_files, validate, word_segmentation
from bge_ds.data.preprocess.build import Share, build, tell
from bge_ds.data.preprocess.workers import INSTRUCTIONS, LENGTHS, WORDS, Job, Settings
from bge_ds.data.shards import digests, integrity, shard_reader

# ----------------------------------------------------------------------------------------------- what a trainer calls


def make_settings(kind: str, on_error: str = "raise", **given: Any) -> Settings:
    """Settings of a kind, with the defaults of the trainers where a value is None."""
    values: dict[str, Any] = dict(LENGTHS[kind]) | {name: "" for name in INSTRUCTIONS[kind]}
    values |= dict.fromkeys(WORDS[kind], word_segmentation.NONE)
    values |= {name: value for name, value in given.items() if value is not None and name in values}
    return Settings(kind=kind, on_error=on_error, **values)


def prepare(
    kind: str,
    train_data: str | list[str],
    tokenizer: Any,
    *,
    max_seq_length: int | None = None,
    query_max_len: int | None = None,
    passage_max_len: int | None = None,
    query_instruction: str | None = None,
    passage_instruction: str | None = None,
    word_segmenter: str | None = None,
    explicit: frozenset[str] = frozenset(),
    cache_dir: str | None = None,
    on_error: str = "raise",
    verify_data: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """The folder of shards for `train_data`: itself when it is one, else JSON lines preprocessed once into a cache.

    Every process of a host may call it at the same time: one builds, the others wait. The cache folder is named by a
    hash of the input's bytes, the tokenizer and all settings, so an entry is never out of date. `explicit` names the
    flags that the user gave: only those are held against a folder of shards. verify_data: every shard must have the hash
    that its manifest says. Raises ValueError for what cannot serve.
    """
    inputs = [str(path) for path in ([train_data] if isinstance(train_data, str | Path) else train_data)]
    settings = make_settings(
        kind,
        on_error,
        max_seq_length=max_seq_length,
        query_max_len=query_max_len,
        passage_max_len=passage_max_len,
        query_instruction_for_retrieval=query_instruction,
        passage_instruction_for_retrieval=passage_instruction,
        word_segmenter=word_segmenter,
    )
    core = validate.core(tokenizer)
    base = Path(cache_dir) / "bge_ds" if cache_dir else Path(os.environ.get("BGE_DS_CACHE") or "~/.cache/bge_ds")
    base = base.expanduser()
    if len(inputs) == 1 and (Path(inputs[0]) / shard_reader.MANIFEST).is_file():
        check_fits(Path(inputs[0]), settings, core, explicit)
        if verify_data:
            integrity.check_hashes(Path(inputs[0]), base)
        return Path(inputs[0])
    settings.check(validate.Encoder(core, settings.word_segmenter))
    found = input_files.find_sources(inputs)
    held = digests.of_sources(found, base)
    made_by = [shard_reader.SCHEMA_VERSION, core.fingerprint, word_segmentation.version(settings.word_segmenter)]
    digest = xxhash.xxh3_128_hexdigest(orjson.dumps([*made_by, asdict(settings), held]))
    return _build_once(base / f"{kind}-{digest}", found, (settings, core), say)


def prepare_all(kind: str, paths: list[str], tokenizer: Any, apart: bool = False, **how: Any) -> list[Path]:
    """The folders of shards for several entries: one each; all of them as one input where none is a folder of shards.

    apart: one each in any case, as weights need it. how: see `prepare`."""
    apart = apart or any((Path(path) / shard_reader.MANIFEST).is_file() for path in paths)
    return [prepare(kind, part, tokenizer, **how) for part in (paths if apart else [paths])]


def _build_once(folder: Path, inputs: list[input_files.Source], job: Job, say: Callable[[str], None]) -> Path:
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process to preprocess into {folder}")
        lock.acquire()
    try:
        if folder.exists():
            with contextlib.suppress(ValueError):  # damaged since: made anew
                shard_reader.open_folder(folder)
                integrity.check_hashes(folder, folder.parent)
                say(f"using the cache {folder}")
                return folder
        manifest = build(folder, inputs, job, overwrite=True, say=say)
    finally:
        lock.release()
    rows = manifest["counts"]["texts" if job[0].kind == "pretrain" else "groups"]
    say(f"preprocessed {rows:,} {'texts' if job[0].kind == 'pretrain' else 'groups'} into {folder}")
    return folder


def check_fits(folder: Path, settings: Settings, core: validate.TokenizerCore, explicit: frozenset[str]) -> None:
    """Raises ValueError where shards do not serve a run: another kind, tokenizer or instruction, or too short rows."""
    manifest = shard_reader.read_manifest(folder)
    if manifest["kind"] != settings.kind:
        remedy = _remedy(manifest, settings, core)
        raise ValueError(f"{folder} holds {manifest['kind']} shards, {settings.kind} ones are needed: {remedy}")
    made = manifest["tokenizer"]
    if made["fingerprint"] != core.fingerprint:
        raise ValueError(
            f"{folder} was made with another tokenizer: {made['name']} (fingerprint {made['fingerprint'][:12]}), this"
            f" run's is {core.name} ({core.fingerprint[:12]}): {_remedy(manifest, settings, core)}"
        )
    for name, value in settings.named().items():
        if name not in explicit:
            continue
        if name in LENGTHS[settings.kind]:
            if value > manifest[name]:
                raise ValueError(
                    f"{name} {value} is longer than the {manifest[name]} that {folder} was cut to:"
                    f" give {name} {manifest[name]} or less, or {_remedy(manifest, settings, core)}"
                )
        elif value != manifest.get(name, word_segmentation.NONE if name in WORDS[settings.kind] else ""):
            raise ValueError(
                f"{name} {value!r} differs from the {manifest.get(name, word_segmentation.NONE)!r} in {folder}: leave the flag "
                f"out, or {_remedy(manifest, settings, core)}"
            )


def _remedy(manifest: dict[str, Any], settings: Settings, core: validate.TokenizerCore) -> str:
    flags = [f"--{name} {shlex.quote(str(value))}" for name, value in settings.named().items() if value]
    inputs = " ".join(shlex.quote(source["path"]) for source in manifest["sources"][:3])
    inputs = inputs if len(manifest["sources"]) <= 3 and manifest["kind"] == settings.kind else "PATH..."
    start = f"python -m bge_ds.preprocess {settings.kind} --input {inputs} --output NEW_FOLDER --tokenizer"
    return "preprocess again: " + " ".join([start, shlex.quote(core.name), *flags])


# ---------------------------------------------------------------------------------------------------------- commands


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m bge_ds.preprocess", description="Texts to Arrow shards.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for kind, lengths in LENGTHS.items():
        one = commands.add_parser(kind, allow_abbrev=False, help=f"make shards for bge_ds.{kind}")

        def add(name: str, one: argparse.ArgumentParser = one, **how: Any) -> None:
            spellings = [f"--{name}", f"--{name.replace('_', '-')}"] if "_" in name else [f"--{name}"]
            one.add_argument(*spellings, **how)

        kinds = ", ".join(input_files.KNOWN)
        add("input", nargs="+", required=True, help=f"files ({kinds}), folders, quoted globs, {table_files.HUB_SYNTAX}")
        add("output", required=True, help="folder to write; it appears when all is done")
        add("tokenizer", required=True, help="folder or hub name; must be the trained model's")
        for name, default in lengths.items():
            add(name, type=int, default=default, help=f"tokens, special tokens included (default {default})")
        for name in INSTRUCTIONS[kind]:
            add(name, default="", help="put before the text as it is, no separator added")
        if kind == "pretrain":
            said = "finds the words of Chinese texts, which are masked whole; none: each character is a word"
            add("word_segmenter", choices=word_segmentation.SEGMENTERS, default=word_segmentation.NONE, help=said)
        add("columns", nargs="+", default=[], metavar="FIELD=COLUMN", help="what the input calls a field, e.g. text=content")
        if kind == "finetune":
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
    for name, least in (("num_proc", 0), ("shard_bytes", 1), ("sample", 0), *((name, 1) for name in LENGTHS[args.command])):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: give {least} or more")
    corpus = getattr(args, "corpus", [])
    columns = _columns(args.columns, args.command, bool(corpus))
    share = _share(args.partition, args.sample)
    output_folder.check_output(Path(args.output), args.overwrite)
    found = input_files.find_sources(args.input, args.skip_unknown)
    entries = input_files.find_sources(corpus, args.skip_unknown) if corpus else []
    core = validate.core(validate.load_tokenizer(args.tokenizer, args.cache_dir, only_texts=alone))
    names = (*LENGTHS[args.command], *INSTRUCTIONS[args.command], *WORDS[args.command])
    settings = make_settings(args.command, args.on_error, **{name: getattr(args, name) for name in names})
    made = build(
        Path(args.output), found, (replace(settings, columns=columns), core), corpus_inputs=entries, share=share,
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
    tell(args.output, manifest, manifest["tokenizer"]["name"], print)
    _say_written(args.output, manifest)


def _say_written(output: Path, manifest: dict[str, Any]) -> None:
    counts = ", ".join(f"{value:,} {name}" for name, value in manifest["counts"].items())
    print(f"wrote {output}: {counts}, {len(manifest['shards'])} shards")


def main(argv: list[str] | None = None, alone: bool = False) -> int:
    """The command. alone: the process loads no model after it, see `records.load_tokenizer`.

    Returns the exit status: 0, or 2 after one line `error: ...` on stderr."""
    try:
        args = _parser().parse_args(argv)
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
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted: the same command goes on with the segments that are finished", file=sys.stderr)
        return 130
    return 0


def run() -> int:
    """The command as a process of its own."""
    return main(alone=True)


if __name__ == "__main__":
    sys.exit(run())
