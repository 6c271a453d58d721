"""Input lines: checking each, turning its texts into token ids.

Nothing here knows about ranks, shards or torch. The tokenizer is used through its Rust core alone: the core can be sent
to a worker process as text, and Python-side settings (truncation, padding, `model_max_length`) cannot change an id.

Word numbers come from the tokenizer's own word ids (its pre-tokenizer's pieces) and its offsets, not from a marker such
as `##`, so they mean the same for WordPiece, byte-level BPE and SentencePiece. Two cases need the offsets. Scripts
written without spaces arrive as one long piece in byte-level BPE and SentencePiece: there each token is a word, and the
tokens that share one character stay together. And a tokenizer without a pre-tokenizer calls the whole text one piece:
there white space parts the words.
"""

import json
import math
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from tokenizers import Encoding, Tokenizer

from . import segmenting

KEYS = {
    "pretrain": ("text",),
    "finetune": ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type"),
    "by_id": ("query", "pos_ids", "neg_ids", "pos_scores", "neg_scores", "prompt", "type"),  # texts are in a corpus
    "corpus": ("_id", "title", "text"),
}
# Scripts whose words are not parted by spaces: Thai to Tibetan, Myanmar, Khmer, kana, ideographs and their extensions.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


# ------------------------------------------------------------------------------------------------------- tokenizers


def load_tokenizer(name_or_path: str | Path, cache_dir: str | None = None) -> Any:
    """A fast Hugging Face tokenizer, with the truncation and padding that its file may have baked in removed.

    Raises ValueError when it cannot be loaded, or has no fast version (word boundaries come from the fast core)."""
    from transformers import AutoTokenizer  # slow to import, and many commands end before they need it

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), cache_dir=cache_dir)
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


@dataclass(frozen=True)
class TokenizerCore:
    """What decides a tokenizer's ids, as plain values that travel to worker processes."""

    name: str
    json: str = field(repr=False)
    fingerprint: str
    vocab_size: int  # ids are below it
    prefix_ids: tuple[int, ...]  # special tokens before a text, e.g. [CLS]
    suffix_ids: tuple[int, ...]  # and after it, e.g. [SEP]
    special_ids: frozenset[int]  # those that carry no text; the unknown token is not among them
    unknown_id: int  # what text outside the vocabulary becomes; -1 where every text has tokens


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


class Encoder:
    """Texts to token ids with the special tokens at the ends, cut to a length. One for each worker process.

    word_segmenter: which library says what a word is in scripts without spaces, see `segmenting.py`. Raises ValueError
    where it is not installed."""

    def __init__(self, tokenizer: TokenizerCore, word_segmenter: str = segmenting.NONE) -> None:
        self.core = tokenizer
        self._segment = segmenting.load(word_segmenter)
        self._backend = Tokenizer.from_str(tokenizer.json)
        self._affixes = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
        self._splits_at_space = len(set(self._backend.encode("a b", add_special_tokens=False).word_ids)) > 1
        self.count_prompt = lru_cache(maxsize=1024)(self._count)

    def check_room(self, length: int, name: str, instruction: str = "") -> None:
        """Raises ValueError where a length (flag `name`) has no room for a text beside its specials and instruction."""
        taken = self._affixes + self.count_prompt(instruction)
        if taken >= length:
            what = "special tokens and instruction" if instruction else "special tokens"
            raise ValueError(f"{name} {length} leaves no room for text: {what} take {taken} tokens, give {taken + 1}")

    def ids(self, texts: list[str], length: int, prefix: str = "") -> tuple[list[list[int]], list[bool]]:
        """Ids of each `prefix + text`, at most `length`, and whether it was cut. [] where the text gives no token."""
        rows, cuts = [], []
        room = length - self._affixes
        for text, encoding in zip(texts, self._encode([prefix + text for text in texts]), strict=True):
            body = encoding.ids
            rows.append([] if self._says_nothing(text, body, prefix) else self._wrap(body[:room]))
            cuts.append(len(body) > room)
        return rows, cuts

    def ids_and_words(self, texts: list[str], length: int) -> tuple[list[list[int]], list[np.ndarray], list[bool]]:
        """As `ids`, with the word that each token belongs to; each special token at the ends is a word of its own."""
        rows, words, cuts = [], [], []
        room = length - self._affixes
        head, tail = len(self.core.prefix_ids), len(self.core.suffix_ids)
        for text, encoding in zip(texts, self._encode(texts), strict=True):
            body = encoding.ids
            rows.append([] if self._says_nothing(text, body) else self._wrap(body[:room]))
            cuts.append(len(body) > room)
            inner = word_numbers(text, encoding, room, self._splits_at_space, self._segment) + head
            last = inner[-1] if len(inner) else head - 1
            words.append(np.concatenate([np.arange(head), inner, last + 1 + np.arange(tail)]))
        return rows, words, cuts

    def _encode(self, texts: list[str]) -> list[Encoding]:
        # One at a time: a batch would start threads inside each worker, and threads make a later fork unsafe.
        return [self._backend.encode(text, add_special_tokens=False) for text in texts]

    def _wrap(self, body: list[int]) -> list[int]:
        return [*self.core.prefix_ids, *body, *self.core.suffix_ids]

    def _says_nothing(self, text: str, body: list[int], prefix: str = "") -> bool:
        # An instruction has tokens of its own: look at the text alone, where it is short or begins without a letter.
        if prefix and (len(text) < 64 or not any(map(str.isalnum, text[:64]))):
            body = self._encode([text])[0].ids
        return not body or (len(body) < 64 and self.core.special_ids.issuperset(body))

    def _count(self, text: str) -> int:
        return len(self._encode([text])[0].ids) if text else 0


def word_numbers(
    text: str, encoding: Encoding, room: int, splits_at_space: bool, segment: segmenting.Segment | None = None
) -> np.ndarray:
    """The word (0, 1, 2, ...) that each of the first `room` tokens of a text, encoded without specials, belongs to.

    segment: tells the words of scripts without spaces; without it each token there is a word."""
    pieces = encoding.word_ids[:room]
    unspaced = UNSPACED.search(text) is not None
    if splits_at_space and None not in pieces and not unspaced:
        starts = np.diff(np.array(pieces, dtype=np.int64), prepend=-1) != 0
    else:
        spans = encoding.offsets[:room]
        known = zip(pieces[1:], pieces[:-1], spans[1:], spans[:-1], strict=True)
        starts = [True] + [a is None or a != b or _starts_word(text, span, last) for a, b, span, last in known]
        starts = np.array(starts[: len(pieces)])
        if segment is not None and unspaced and spans:
            inside = segment(text[: segmenting.end_of_block(text, spans[-1][1])])
            # The same character, cut into bytes, begins no word either way; a token that crosses into the next word stays.
            begins = np.array([span[0] for span in spans[1:]], dtype=np.int64)
            starts[1:] &= ~inside[np.minimum(begins, len(inside) - 1)]
    return np.cumsum(np.array(starts, dtype=np.int64)) - 1


def _starts_word(text: str, span: tuple[int, int], last: tuple[int, int]) -> bool:
    """Whether a token begins a word inside one piece of the pre-tokenizer; spans are (start, end) in characters."""
    start, end = span[0], last[1]
    if start < end or start >= len(text):  # the same character, cut into bytes
        return False
    if any(map(str.isspace, text[end : start + 1])):
        return True
    if not text[last[0] : end].strip():  # a token for the space alone (its span may be trimmed to nothing)
        return False
    return bool(UNSPACED.match(text, start) or (end and UNSPACED.match(text, end - 1)))


# ------------------------------------------------------------------------------------------------------------ lines


def parse_line(raw: bytes, kind: str, columns: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    """Checks one line and returns its object, with the field filled in that may be absent (`neg`, `neg_ids`, `title`).

    Raises ValueError with the reason alone; the caller knows the file and the line."""
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ValueError(_why_not_json(raw, error)) from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {_type(record)}: each line holds one object, {{...}}")
    return check(record, kind, columns)


def check(record: dict[str, Any], kind: str, columns: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    """`parse_line` for an object; `columns` are (field, the name that it has in this input), see `rename`."""
    if columns:
        record = rename(record, columns)
    if kind == "pretrain":
        _check_text(record.get("text"), '"text"', record)
        return record
    if kind == "corpus":
        return _check_entry(record)
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
    """The object under our names. A plain string for a field that is a list of texts or ids is a list of one."""
    found = {name: value for name, value in record.items() if name not in {column for _, column in columns}}
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


def _check_entry(record: dict[str, Any]) -> dict[str, Any]:
    """One line of a corpus; its passage is the title, a space and the text, as BEIR has it."""
    record["_id"] = _identity(record.get("_id"), '"_id"', record)
    title = record["title"] = record.get("title") or ""
    for key in ("title", "text"):
        if not isinstance(record.get(key), str):
            raise ValueError(_wrong(f'"{key}"', record.get(key), "a string", record))
    record["text"] = f"{title} {record['text']}".strip()
    _check_text(record["text"], '"text"', record)
    return record


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
