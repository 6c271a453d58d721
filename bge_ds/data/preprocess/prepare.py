"""The folders of shards that a trainer reads: those that it is given, or made once from its files and kept in a cache."""

import contextlib
import os
import shlex
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import xxhash

from bge_ds.data.files import PARTIAL
from bge_ds.data.preprocess import input_files, validate, word_segmentation
from bge_ds.data.preprocess.build import build
from bge_ds.data.preprocess.instructions import PLAIN, SYMMETRIC
from bge_ds.data.preprocess.workers import LENGTHS, SETTINGS, Job, PreprocessSettings
from bge_ds.data.shards import digests, integrity
from bge_ds.data.shards.manifest_file import MANIFEST, SCHEMA_VERSION, Manifest, read_manifest
from bge_ds.data.shards.shard_reader import open_folder


def make_settings(kind: str, on_error: str = "raise", **given: Any) -> PreprocessSettings:
    """PreprocessSettings of a kind, with the defaults of the trainers where a value is None."""
    known = {name: value for name, value in given.items() if value is not None}
    return PreprocessSettings(kind=kind, on_error=on_error, **(SETTINGS[kind] | known))


def cache_folder(cache_dir: str | None) -> Path:
    """Where shards made from files are kept: below --cache_dir, else BGE_DS_CACHE, else ~/.cache/bge_ds."""
    base = Path(cache_dir) / "bge_ds" if cache_dir else Path(os.environ.get("BGE_DS_CACHE") or "~/.cache/bge_ds")
    return base.expanduser()


def keep_rows(rows: Iterable[Mapping[str, Any]], base: Path, name: str = "train_data") -> Path:
    """A file of JSON lines with these rows, named by its content; every process of a host may write it at the same time.

    Raises ValueError, with the row's number from 0, for a row that is not a mapping or cannot be written as JSON.
    name: what the rows are called in its message.
    """
    base.mkdir(parents=True, exist_ok=True)
    digest, count = xxhash.xxh3_128(), 0
    with tempfile.NamedTemporaryFile(dir=base, prefix="rows-", suffix=PARTIAL, delete=False) as out:
        try:
            for count, row in enumerate(rows, start=1):
                if not isinstance(row, Mapping):
                    raise ValueError(f"{name}: row {count - 1} is {type(row).__name__}, not a dictionary of columns")
                try:
                    line = orjson.dumps(dict(row), option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
                except TypeError as error:
                    raise ValueError(f"{name}: row {count - 1} cannot be written as JSON ({error})") from None
                digest.update(line)
                out.write(line)
            if not count:
                raise ValueError(f"{name} holds no rows")
        except BaseException:
            Path(out.name).unlink()
            raise
    path = base / f"rows-{digest.hexdigest()}.jsonl"
    os.replace(out.name, path)
    return path


def prepare(
    kind: str,
    train_data: str | list[str],
    tokenizer: Any,
    *,
    query_instruction: str | None = None,
    passage_instruction: str | None = None,
    explicit: frozenset[str] = frozenset(),
    cache_dir: str | None = None,
    on_error: str = "raise",
    verify_data: bool = True,
    say: Callable[[str], None] = print,
    **lengths_and_words: Any,
) -> Path:
    """The folder of shards for `train_data`: itself when it is one, else JSON lines preprocessed once into a cache.

    Every process of a host may call it at the same time: one builds, the others wait. The cache folder is named by a
    hash of the input's bytes, the tokenizer and all settings, so an entry is never out of date. `explicit` names the
    flags that the user gave: only those are held against a folder of shards. verify_data: every shard must have the hash
    that its manifest says. lengths_and_words: of `SETTINGS`. Raises ValueError for what cannot serve.
    """
    inputs = [str(path) for path in ([train_data] if isinstance(train_data, str | Path) else train_data)]
    settings = make_settings(
        kind,
        on_error,
        query_instruction_for_retrieval=query_instruction,
        passage_instruction_for_retrieval=passage_instruction,
        **lengths_and_words,
    )
    core = validate.core(tokenizer)
    base = cache_folder(cache_dir)
    if len(inputs) == 1 and (Path(inputs[0]) / MANIFEST).is_file():
        check_fits(Path(inputs[0]), settings, core, explicit)
        if verify_data:
            integrity.check_hashes(Path(inputs[0]), base)
        return Path(inputs[0])
    settings.check(validate.BatchTokenizer(core, settings.word_segmenter))
    found = input_files.find_sources(inputs)
    held = digests.of_sources(found, base)
    made_by = [SCHEMA_VERSION, core.fingerprint, word_segmentation.version(settings.word_segmenter)]
    digest = xxhash.xxh3_128_hexdigest(orjson.dumps([*made_by, asdict(settings), held]))
    return _build_once(base / f"{kind}-{digest}", found, (settings, core), say)


def prepare_all(kind: str, paths: list[str], tokenizer: Any, apart: bool = False, **how: Any) -> list[Path]:
    """The folders of shards for several entries: one each; all of them as one input where none is a folder of shards.

    apart: one each in any case, as weights need it. how: see `prepare`."""
    apart = apart or any((Path(path) / MANIFEST).is_file() for path in paths)
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
                open_folder(folder)
                integrity.check_hashes(folder, folder.parent)
                say(f"using the cache {folder}")
                return folder
        manifest = build(folder, inputs, job, overwrite=True, say=say)
    finally:
        lock.release()
    what = "texts" if job[0].kind == "pretrain" else "groups"
    say(f"preprocessed {manifest.counts[what]:,} {what} into {folder}")
    return folder


def check_fits(folder: Path, settings: PreprocessSettings, core: validate.TokenizerCore, explicit: frozenset[str]) -> None:
    """Raises ValueError where shards do not serve a run: another kind, tokenizer or instruction, or too short rows."""
    manifest = read_manifest(folder)
    if manifest.kind != settings.kind:
        remedy = _remedy(manifest, settings, core)
        raise ValueError(f"{folder} holds {manifest.kind} shards, {settings.kind} ones are needed: {remedy}")
    made = manifest.tokenizer
    if made.fingerprint != core.fingerprint:
        raise ValueError(
            f"{folder} was made with another tokenizer: {made.name} (fingerprint {made.fingerprint[:12]}), this"
            f" run's is {core.name} ({core.fingerprint[:12]}): {_remedy(manifest, settings, core)}"
        )
    for name, value in settings.named().items():
        if name not in explicit:
            continue
        held = getattr(manifest, name)
        held = SETTINGS[settings.kind][name] if held is None else held  # None in older shards
        if name in LENGTHS:
            if value > held:
                raise ValueError(
                    f"{name} {value} is longer than the {held} that {folder} was cut to: give {name} {held} or less, or "
                    f"{_remedy(manifest, settings, core)}"
                )
        elif value != held and (name != "query_instruction_format" or open_folder(folder).distinct("prompt")):
            raise ValueError(
                f"{name} {value!r} differs from the {held!r} in {folder}: leave the flag out, or "
                f"{_remedy(manifest, settings, core)}"
            )

    if manifest.kind == "finetune" and manifest.passages_by_type != settings.passages_by_type:
        _check_types(folder, settings, _remedy(manifest, settings, core))


def _check_types(folder: Path, settings: PreprocessSettings, remedy: str) -> None:
    """Raises ValueError where passages begin, or do not begin, with the instruction of their query against the run's wish."""
    if types := sorted(open_folder(folder).distinct("type") & set(SYMMETRIC)):
        wanted, held = ("must", "do not") if settings.passages_by_type else ("must not", "do")
        raise ValueError(
            f"{folder} holds groups of type {types[0]}, whose passages {wanted} begin with the instruction of their query "
            f"(they {wanted.replace('must', 'do')} with --same_dataset_within_batch), and here {held}: {remedy}"
        )


def _remedy(manifest: Manifest, settings: PreprocessSettings, core: validate.TokenizerCore) -> str:
    flags = [f"--{name} {shlex.quote(str(value))}" for name, value in settings.named().items() if value and value != PLAIN]
    inputs = " ".join(shlex.quote(source.path) for source in manifest.sources[:3])
    inputs = inputs if len(manifest.sources) <= 3 and manifest.kind == settings.kind else "PATH..."
    start = f"python -m bge_ds.preprocess {settings.kind} --input {inputs} --output NEW_FOLDER --tokenizer"
    return "preprocess again: " + " ".join([start, shlex.quote(core.name), *flags])
