"""From a command line, or one JSON file, to an arguments dataclass.

Flags read as they do for transformers' Trainer: `--bf16`, `--bf16 True`, `--no_use_inbatch_neg`, `--output-dir`. Three things
are added: which settings the user gave (defaults alone never contradict anything), an answer to every name of
``huggingface_names.py``, and a near match for an unknown name. A user's mistake is one line on stderr and exit code 2, as
argparse has it, without pages of usage. Nothing heavy is imported: `--help` and mistakes are answered at once.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from bge_ds.config.huggingface_names import ALIASES, FALSE, REFUSED, TRUE, accepted, refusal, refusal_of_newer

if TYPE_CHECKING:
    from bge_ds.config.train_arguments import TrainArguments

Arguments = TypeVar("Arguments", bound="TrainArguments")
_LOCAL_RANK = re.compile(r"--local[-_]rank(=.*)?")
_METAVARS = {int: "N", float: "X", str: "TEXT"}


class _Formatter(argparse.HelpFormatter):
    """One spelling of each flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]} {self._format_args(action, action.dest)}".rstrip()


class _Help(argparse.Action):
    """`--help` shows the flags that most runs need, `--help all` every one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        rare = [action for action in parser._actions if getattr(action, "rare", False) and action.help != argparse.SUPPRESS]
        if values is None:
            for action in rare:
                action.help = argparse.SUPPRESS
            parser.epilog = f"--help all shows {len(rare)} more flags."
        parser.print_help()
        sys.exit(0)


class CommandParser(argparse.ArgumentParser):
    """Reports a user's mistake as one line and exits with code 2."""

    source = ""  # the JSON file that the flags came from, for messages

    def error(self, message: str) -> NoReturn:
        print(f"error: {self.source}{message} (--help explains every flag)", file=sys.stderr)
        sys.exit(2)


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def groups_of(cls: type, own: bool = False) -> list[tuple[str, list[str]]]:
    """(topic, names of its flags): a class attribute `topic_...` begins a topic. own: those of the class itself only.

    Topics that the class adds come first; a field that it defines anew stays where it was.
    """
    found: list[tuple[str, list[str]]] = []
    seen: set[str] = set()
    names = _fields(cls).keys()
    for base in [cls] if own else [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]:
        topics: list[tuple[str, list[str]]] = []
        for name in inspect.get_annotations(base):
            if name.startswith("topic_"):
                topics.append((getattr(base, name), []))
            elif name in names - seen and topics:
                topics[-1][1].append(name)
                seen.add(name)
        found = topics + found
    return [topic for topic in found if topic[1]]


def parse(cls: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """An instance of `cls` from `argv` (default: the command line): flags, or the path of one .json file of settings.

    `--local_rank`, which launchers add, may stand beside the file. The result's `explicit` holds the names of the
    fields that the user gave. A mistake prints `error: ...` and exits with code 2; `--help` exits with 0.
    """
    parser = _build_parser(cls)
    try:
        given, rest = parser.parse_known_args(_expand_json(cls, parser, list(sys.argv[1:] if argv is None else argv)))
        values = vars(given)
        _refuse(values, rest, known=list(_fields(cls)))
        return cls.build(**_merge_aliases(values))
    except ValueError as error:
        parser.error(str(error))


def _build_parser(cls: type["TrainArguments"]) -> CommandParser:
    usage = f"deepspeed -m {cls.command} --flag value ... | deepspeed -m {cls.command} settings.json"
    parser = CommandParser(
        usage=usage, description=cls.__doc__, allow_abbrev=False, formatter_class=_Formatter, add_help=False,
        argument_default=argparse.SUPPRESS,  # what was not given is not in the result
    )  # fmt: skip
    fields, hints = _fields(cls), typing.get_type_hints(cls)
    required = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    topics = [("Required", required)]
    topics += [(title, [name for name in names if name not in required]) for title, names in groups_of(cls)]
    for title, names in topics:
        group = parser.add_argument_group(title)
        for name in names:
            _add_flag(group, fields[name], hints[name])
    more = parser.add_argument_group("Help")
    more.add_argument("--help", "-h", action=_Help, nargs="?", choices=["all"], help="the flags of most runs; all")
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS}
    for alias, (name, kind) in ALIASES.items():
        if name not in fields:
            continue
        parser.add_argument(*_spellings(alias), dest=alias, **_SWITCH if kind is bool else {"type": kind}, **hidden)
        if fields[name].default is True:
            parser.add_argument(*_spellings(f"no_{alias}"), dest=alias, action="store_const", const=False, **hidden)
    for name in REFUSED.keys() - fields.keys():
        parser.add_argument(*_spellings(name), dest=name, nargs="*", **hidden)
        if True in accepted(name):
            parser.add_argument(*_spellings(f"no_{name}"), dest=name, action="store_const", const=["false"], **hidden)
    return parser


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field, hint: Any) -> None:
    """The flag of a field, as transformers' HfArgumentParser has it: `X | None` as X, lists of one value or more."""
    given = {key: value for key, value in field.metadata.items() if key not in ("help", "rare")}
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = str if str in options else options[0]
        options = list(typing.get_args(hint))
    shape: dict[str, Any] = {"help": field.metadata["help"]}
    if hint is bool:
        shape |= _SWITCH | {"metavar": "True|False"}
    elif typing.get_origin(hint) is Literal:
        shape |= {"type": type(options[0]), "choices": options}
    elif typing.get_origin(hint) is list:
        shape |= {"type": options[0], "nargs": "+", "metavar": _METAVARS[options[0]]}
    else:
        shape |= {"type": hint, "metavar": _METAVARS[hint]}
    if hint is bool and field.default is True:
        shape["help"] += f" (default on; --no_{field.name} turns it off)"
    elif field.default not in (None, False, "", dataclasses.MISSING):
        shape["help"] += f" (default {str(field.default).replace('%', '%%')})"
    if field.default is field.default_factory is dataclasses.MISSING:
        shape["required"] = True
    action = group.add_argument(*_spellings(field.name), dest=field.name, **shape | given)
    action.rare = field.metadata.get("rare", False)  # type: ignore[attr-defined]  # `_Help` reads it
    if hint is bool and field.default is True:
        off = _spellings(f"no_{field.name}")
        group.add_argument(*off, dest=field.name, action="store_const", const=False, help=argparse.SUPPRESS)


def to_bool(text: str) -> bool:
    """True or False from the words that transformers takes for them."""
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in TRUE


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


_SWITCH: dict[str, Any] = {"type": to_bool, "nargs": "?", "const": True}


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
    if found := [reason for reason in reasons if reason]:
        raise ValueError("; ".join(found))


def _newer_defaults() -> dict[str, Any]:
    """Name -> default of every field of the installed TrainingArguments; imported only once a flag is unknown."""
    from transformers import TrainingArguments

    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(TrainingArguments)}


def _expand_json(cls: type, parser: CommandParser, argv: list[str]) -> list[str]:
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
    fields = _fields(cls)
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


def exit_status(run: Callable[[], None], when_interrupted: str = "") -> int:
    """Runs a command: 0, or after one line `error: ...` on stderr 2 (ValueError, OSError) or 130 (Ctrl-C).

    when_interrupted: what starting it again does, for that line.
    """
    try:
        run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"error: interrupted{': ' if when_interrupted else ''}{when_interrupted}", file=sys.stderr)
        return 130
    return 0
