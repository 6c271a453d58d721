"""Input lines: checking each; and taking the tokenizer apart that its texts are encoded by (`tokenize.py`).

Nothing here knows about ranks, shards or torch. The tokenizer is used through its Rust core alone: the core can be sent
to a worker process as text, and Python-side settings (truncation, padding, `model_max_length`) cannot change an id.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import xxhash
from tokenizers import Tokenizer

from bge_ds.data.preprocess.tokenize import BatchTokenizer as BatchTokenizer  # callers find all of a tokenizer's parts here
from bge_ds.data.preprocess.tokenize import TokenizedTexts as TokenizedTexts
from bge_ds.data.preprocess.tokenize import TokenizerCore, environment_variable

KEYS = {
    "pretrain": ("text",),
    "finetune": ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type"),
    "by_id": ("query", "pos_ids", "neg_ids", "pos_scores", "neg_scores", "prompt", "type"),  # texts are in a corpus
    "corpus": ("_id", "title", "text"),
    "texts": ("_id", "title", "text"),  # the same, with or without an _id; the text may be empty
}


# ------------------------------------------------------------------------------------------------------- tokenizers


def load_tokenizer(name_or_path: str | Path, cache_dir: str | None = None, only_texts: bool = False) -> Any:
    """A fast Hugging Face tokenizer, with the truncation and padding that its file may have baked in removed.

    only_texts: this process will load no model, so torch, which takes seconds to import, is left out. Raises ValueError
    when it cannot be loaded, or has no fast version (word boundaries come from the fast core)."""
    try:
        with _torch_hidden() if only_texts else contextlib.nullcontext():
            from transformers import AutoTokenizer  # slow to import, and many commands end before they need it

            tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), cache_dir=cache_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".: ")
        raise ValueError(f"tokenizer {name_or_path} cannot be loaded: {reason}: give a folder or a hub name") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {name_or_path}: {type(tokenizer).__name__} has no fast version, and only a fast one tells the"
            " words of a text: convert it to a tokenizer.json, or name a model that has one"
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def add_special_tokens(tokenizer: Any, tokens: list[str]) -> None:
    """Tokens that a tokenizer is to know beside its own; those that it knows get no second id.

    Raises ValueError for a tokenizer whose ids have gaps: its core counts tokens, and gives a new one the id of another."""
    if not tokens:
        return
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, False)  # False: none that it has are replaced
    new = set(tokens) - known.keys()
    if taken := sorted(new_id for new_id in map(tokenizer.convert_tokens_to_ids, new) if new_id <= max(known.values())):
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path}: its ids have gaps, and a new token would have that of another ({taken[0]}): "
            "leave --additional_special_tokens out, or use tokens that it has"
        )


@contextlib.contextmanager
def _torch_hidden() -> Iterator[None]:
    """Within it torch is not installed; transformers, which is made to work so, finds no models from then on.

    Nothing where either is imported already."""
    if "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment] - what Python's own import takes for "there is none"
    try:
        with environment_variable("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"):  # that torch is missing
            yield
    finally:
        del sys.modules["torch"]  # other libraries look for the name alone, and then import it


def core(tokenizer: Any) -> TokenizerCore:
    """Takes a fast tokenizer apart. The object itself is left as it is, whatever truncation it has been called with.

    Raises ValueError for one whose core cannot be written as JSON or puts special tokens elsewhere than at the ends."""
    name = str(tokenizer.name_or_path)
    try:
        parts = orjson.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the Rust core raises bare Exception for parts written in Python
        raise ValueError(f"tokenizer {name}: its core cannot be written as JSON ({error})") from error
    parts["truncation"] = parts["padding"] = None
    text = orjson.dumps(parts).decode()
    backend = Tokenizer.from_str(text)
    whole, body = backend.encode("a"), backend.encode("a", add_special_tokens=False)
    marks = [i for i, special in enumerate(whole.special_tokens_mask) if not special]
    if not marks or whole.ids[marks[0] : marks[-1] + 1] != body.ids:
        raise ValueError(f"tokenizer {name}: special tokens elsewhere than at the ends of a text: {whole.tokens}")
    deciding = {key: parts.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "model")}
    deciding["added_tokens"] = sorted(parts.get("added_tokens") or [], key=lambda token: token["id"])
    specials = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids = backend.get_vocab(with_added_tokens=True).values()
    return TokenizerCore(
        name=name,
        json=text,
        fingerprint=xxhash.xxh3_128_hexdigest(orjson.dumps(deciding, option=orjson.OPT_SORT_KEYS)),
        vocab_size=max(ids) + 1,
        prefix_ids=tuple(whole.ids[: marks[0]]),
        suffix_ids=tuple(whole.ids[marks[-1] + 1 :]),
        special_ids=frozenset(specials),
        unknown_id=-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id,
    )


def fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides the ids a tokenizer gives; saving and loading it again keeps the hash."""
    return core(tokenizer).fingerprint


# ------------------------------------------------------------------------------------------------------------ lines


def records(
    lines: list[Any], first: int, kind: str, columns: tuple[tuple[str, str], ...] = ()
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(number, the checked object, or what is wrong with it) of all lines or rows that are not blank, counted from `first`."""
    for number, line in enumerate(lines, first):
        try:
            if isinstance(line, Exception):
                raise line
            if not isinstance(line, bytes):
                yield number, check(line, kind, columns)
            elif line.strip():
                yield number, parse_line(line, kind, columns)
        except ValueError as error:
            yield number, str(error)


def parse_line(raw: bytes, kind: str, columns: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    """Checks one line and returns its object, with the field filled in that may be absent (`neg`, `neg_ids`, `title`).

    Raises ValueError with the reason alone; the caller knows the file and the line."""
    return check(parse_object(raw), kind, columns)


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of one line. Raises ValueError with the reason alone."""
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ValueError(_why_not_json(raw, error)) from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {_type(record)}: each line holds one object, {{...}}")
    return record


def check(record: dict[str, Any], kind: str, columns: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    """`parse_line` for an object; `columns` are (field, the name that it has in this input), see `rename`."""
    if columns:
        record = rename(record, columns)
    if kind == "pretrain":
        _check_text(record.get("text"), '"text"', record)
        return record
    if kind in ("corpus", "texts"):
        return _check_entry(record, kind)
    _check_text(record.get("query"), '"query"', record)
    if kind == "by_id" and "pos" in record and "pos_ids" not in record:
        raise ValueError('"pos" holds texts: with --corpus a line names its passages by "pos_ids" and "neg_ids"')
    if kind == "finetune" and "pos_ids" in record and "pos" not in record:
        raise ValueError('"pos_ids" names passages of a corpus: give its files by --corpus')
    for key in ("pos", "neg") if kind == "finetune" else ("pos_ids", "neg_ids"):
        _check_list(record, key, kind == "by_id")
    for key in ("type", "prompt"):
        if record.get(key) is not None and not isinstance(record[key], str):
            raise ValueError(_wrong(f'"{key}"', record[key], "a string", record))
    return record


def rename(record: dict[str, Any], columns: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The object under our names. A plain string for a field that is a list of texts or ids is a list of one.

    A line's own `type` or `prompt` is left out where another column is to be read for it."""
    gone = {column for _, column in columns} | {name for name, _ in columns if name in ("type", "prompt")}
    found = {name: value for name, value in record.items() if name not in gone}
    for name, column in columns:
        if column in record:
            value = record[column]
            found[name] = [value] if name in ("pos", "neg", "pos_ids", "neg_ids") and isinstance(value, str) else value
    return found


def _check_list(record: dict[str, Any], key: str, by_id: bool) -> None:
    values, side = record.get(key), key.removesuffix("_ids")
    if values is None and side == "neg":
        values = record[key] = []
    if not isinstance(values, list):
        raise ValueError(_wrong(f'"{key}"', values, "a list of strings", record))
    for i, value in enumerate(values):
        if not by_id:
            _check_text(value, f'"{key}"[{i}]', record)
        else:
            values[i] = _identity(value, f'"{key}"[{i}]', record)
    _check_scores(record.get(f"{side}_scores"), f"{side}_scores", len(values), key)
    if not values and side == "pos":
        raise ValueError(f'"{key}" is empty: a query needs at least one positive')


def _check_entry(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """One line of a corpus or of texts; `text` becomes the passage, see `with_title`."""
    if kind == "corpus" or record.get("_id") is not None:
        record["_id"] = _identity(record.get("_id"), '"_id"', record)
    title = record["title"] = record.get("title") or ""
    for key in ("title", "text"):
        if not isinstance(record.get(key), str):
            raise ValueError(_wrong(f'"{key}"', record.get(key), "a string", record))
    record["text"] = with_title(title, record["text"])
    if kind == "corpus":
        _check_text(record["text"], '"text"', record)
    return record


def with_title(title: str, text: str) -> str:
    """A passage as BEIR has it: the title, a space and the text."""
    return f"{title} {text}".strip()


def _identity(value: Any, name: str, record: dict[str, Any]) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(_wrong(name, value, "a string or a whole number", record))
    if not value:
        raise ValueError(f"{name} is an empty id")
    return value


def _check_text(text: Any, name: str, record: dict[str, Any]) -> None:
    if not isinstance(text, str):
        raise ValueError(_wrong(name, text, "a string", record))
    if not text or text.isspace():
        raise ValueError(f"{name} is an empty text")


def _check_scores(scores: Any, name: str, count: int, texts: str) -> None:
    if scores is None:
        return
    if not isinstance(scores, list) or not all(isinstance(x, int | float) and type(x) is not bool for x in scores):
        raise ValueError(f'"{name}" must be a list of numbers')
    if len(scores) != count:
        raise ValueError(f'"{name}" has {len(scores)} numbers for {count} texts in "{texts}": one for each is needed')
    if not all(map(math.isfinite, scores)):
        raise ValueError(f'"{name}" holds a number that is not finite')


def _wrong(name: str, value: Any, wanted: str, record: dict[str, Any]) -> str:
    if name.strip('"') in record or "[" in name:
        return f"{name} must be {wanted}, not {_type(value)}"
    return f"{name} is missing; the line has {', '.join(map(repr, record)) or 'no key'}"


def _type(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _why_not_json(raw: bytes, error: orjson.JSONDecodeError) -> str:
    reason = f"{error.msg} at column {error.colno}"
    if raw.startswith(b"\x1f\x8b"):
        return "not text but gzip: give the file a name that ends in .gz"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as bad:
        return f"not UTF-8 (byte {bad.start + 1} of the line is 0x{raw[bad.start]:02x}): convert the file to UTF-8"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        hint = " (a JSON array over many lines? one object a line is read)" if text.strip() in ("[", "{") else ""
        return f"not JSON: {reason}{hint}"
    if re.search(r"\\u[dD][89a-fA-F]", text) and isinstance(value, dict):
        return "a text holds half of a surrogate pair (such as \\ud800), which is no character: repair or drop the line"
    return f"not standard JSON (NaN, Infinity or the like): {reason}"
