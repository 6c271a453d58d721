"""From a command line, or one JSON file, to an arguments dataclass.

Built on transformers' `HfArgumentParser`, so that flags read as they do for its Trainer: `--bf16`, `--bf16 True`,
`--no_use_inbatch_neg`, `--output-dir`. Three things are added: which settings the user gave (defaults alone never
contradict anything), every name of ``training_arguments.py`` with its own answer, and a near match for a name that
nobody knows. A user's mistake is one line on stderr and exit code 2, as argparse has it, but without pages of usage.
"""

import argparse
import dataclasses
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from bge_ds.config.huggingface_names import ALIASES, REFUSED, accepted, refusal, refusal_of_newer

Arguments = TypeVar("Arguments")
_LOCAL_RANK = re.compile(r"--local[-_]rank(=.*)?")


class _Parser(HfArgumentParser):
    source = ""  # the JSON file that the flags came from, for messages

    def error(self, message: str) -> NoReturn:
        print(f"error: {self.source}{message} (--help explains every flag)", file=sys.stderr)
        sys.exit(2)


def parse(cls: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """An instance of `cls` from `argv` (default: the command line): flags, or the path of one .json file of settings.

    `--local_rank`, which launchers add, may stand beside the file. The result's `explicit` holds the names of the
    fields that the user gave. A mistake prints `error: ...` and exits with code 2; `--help` exits with 0.
    """
    parser = _build_parser(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    unset = object()
    try:
        argv = _expand_json(cls, parser, list(sys.argv[1:] if argv is None else argv))
        # A namespace that already has every field keeps argparse from filling in defaults: what is still `unset`
        # afterwards was not given.
        given, rest = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
        values = {name: value for name, value in vars(given).items() if value is not unset}
        _refuse(values, rest, known=names)
        return cls.build(**_merge_aliases(values))
    except ValueError as error:
        parser.error(str(error))


def _build_parser(cls: type) -> _Parser:
    usage = f"deepspeed -m {cls.command} --flag value ... | deepspeed -m {cls.command} settings.json"
    parser = _Parser([cls], usage=usage, description=cls.__doc__, allow_abbrev=False)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hidden = {"default": argparse.SUPPRESS}
    for alias, (name, kind) in ALIASES.items():
        if name not in fields:
            continue
        shape = {"type": string_to_bool, "nargs": "?", "const": True} if kind is bool else {"type": kind}
        parser.add_argument(*_spellings(alias), dest=alias, help=f"another name of {name}", **shape, **hidden)
        if fields[name].default is True:
            off = {"dest": alias, "action": "store_const", "const": False, "help": argparse.SUPPRESS}
            parser.add_argument(*_spellings(f"no_{alias}"), **off, **hidden)
    for name in REFUSED.keys() - fields.keys():
        parser.add_argument(*_spellings(name), dest=name, nargs="*", help=argparse.SUPPRESS, **hidden)
        if True in accepted(name):
            off = {"dest": name, "action": "store_const", "const": ["false"], "help": argparse.SUPPRESS}
            parser.add_argument(*_spellings(f"no_{name}"), **off, **hidden)
    return parser


def _spellings(name: str) -> list[str]:
    return [f"--{name}", f"--{name.replace('_', '-')}"] if "_" in name else [f"--{name}"]


def _merge_aliases(values: dict[str, Any]) -> dict[str, Any]:
    """Values under the fields' own names. Raises ValueError where two names of one field disagree."""
    merged = {name: value for name, value in values.items() if name not in ALIASES and name not in REFUSED}
    for alias in ALIASES.keys() & values.keys():
        name, value = ALIASES[alias][0], values[alias]
        if alias == "warmup_ratio":
            if not 0 <= value < 1:
                raise ValueError(f"--warmup_ratio is {value:g}; it must be at least 0 and below 1")
            if not value or not merged.get(name):  # zero is the default of both, so it leaves the word to the other
                merged[name] = value or merged.get(name, 0)
                continue
        if merged.setdefault(name, value) != value:
            raise ValueError(f"--{alias} {value} and --{name} {merged[name]} set the same thing; keep one of them")
    return merged


def _refuse(values: dict[str, Any], rest: list[str], known: list[str]) -> None:
    """Raise ValueError for refused names that ask for something, and for words that no flag takes."""
    reasons = [refusal(name, values[name]) for name in values if name in REFUSED]
    newer = _newer_defaults() if rest else {}
    choices = [*known, *ALIASES, *REFUSED]
    while rest:
        flag, _, value = rest[0].partition("=")
        if not re.match(r"--?[A-Za-z_]", flag):
            reasons.append(f"unexpected value {rest.pop(0)!r}: no flag before it takes it (a .json file stands alone)")
            continue
        end = next((i for i, word in enumerate(rest[1:], 1) if word.startswith("--")), len(rest))
        words, rest = [*([value] if value or "=" in rest[0] else []), *rest[1:end]], rest[end:]
        name = flag.lstrip("-").replace("-", "_")
        if name in newer:
            reasons.append(refusal_of_newer(name, words, newer[name]))
            continue
        near = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(f'--{n}' for n in near)}?" if near else ""
        reasons.append(f"unknown flag {flag}{hint}")
    reasons = [reason for reason in reasons if reason]
    if reasons:
        raise ValueError("; ".join(reasons))


def _newer_defaults() -> dict[str, Any]:
    """Name -> default of every field of the installed TrainingArguments; imported only once a flag is unknown."""
    from transformers import TrainingArguments

    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(TrainingArguments)}


def _expand_json(cls: type, parser: _Parser, argv: list[str]) -> list[str]:
    """`argv` with a lone .json file replaced by the flags that say the same. Raises ValueError, naming the file."""
    launcher, own, words = [], [], iter(argv)
    for word in words:
        if match := _LOCAL_RANK.fullmatch(word):
            launcher += [word] if match[1] else [word, next(words, "")]
        else:
            own.append(word)
    if len(own) != 1 or not own[0].endswith(".json"):
        return argv
    path = own[0]
    parser.source = f"{path}: "
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        parser.source = f"{path}:{error.lineno}: "
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError("the file must hold one JSON object of settings, name to value")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    return [word for name, value in settings.items() for word in _as_flags(name, value, fields)] + launcher


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    settings = dict(pairs)
    if len(settings) != len(pairs):
        twice = sorted({name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1})
        raise ValueError(f"{', '.join(twice)} stands twice; keep one of them")
    return settings


def _as_flags(name: str, value: Any, fields: dict[str, dataclasses.Field]) -> list[str]:
    """One setting of a JSON file as words of a command line: null means unset, where a field can be."""
    if value is None:
        name = name.replace("-", "_")
        field = fields.get(ALIASES.get(name, (name, None))[0])
        unset = field is None or field.default_factory is not dataclasses.MISSING or field.default in (None, False)
        if field is not None and not unset:
            raise ValueError(f"{name} is null, which is not one of its values; leave it out to get its default")
        return [f"--{name}=none"] if field is None else []
    if isinstance(value, list):
        if not all(isinstance(item, str | int | float) for item in value):
            raise ValueError(f"{name} is a list of {value!r}; it must hold plain values")
        return [f"--{name}", *map(str, value)] if value else [f"--{name}="] if name not in fields else []
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
