"""Input lines: finding the files, reading them in blocks, checking each line, turning texts into token ids.

Nothing here knows about ranks, shards or torch. The tokenizer is used through its Rust core alone: the core can be sent
to a worker process as text, and Python-side settings (truncation, padding, `model_max_length`) cannot change an id.

Word numbers come from the tokenizer's own word ids (its pre-tokenizer's pieces) and its offsets, not from a marker such
as `##`, so they mean the same for WordPiece, byte-level BPE and SentencePiece. Two cases need the offsets. Scripts
written without spaces arrive as one long piece in byte-level BPE and SentencePiece: there each token is a word, and the
tokens that share one character stay together. And a tokenizer without a pre-tokenizer calls the whole text one piece:
there white space parts the words.
"""

import glob
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from tokenizers import Encoding, Tokenizer

BLOCK_BYTES = 1 << 20
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
KEYS = {"pretrain": ("text",), "finetune": ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type")}
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
    """Texts to token ids with the special tokens at the ends, cut to a length. One for each worker process."""

    def __init__(self, tokenizer: TokenizerCore) -> None:
        self.core = tokenizer
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
            inner = word_numbers(text, encoding, room, self._splits_at_space) + head
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


def word_numbers(text: str, encoding: Encoding, room: int, splits_at_space: bool) -> np.ndarray:
    """The word (0, 1, 2, ...) that each of the first `room` tokens of a text, encoded without specials, belongs to."""
    pieces = encoding.word_ids[:room]
    if splits_at_space and None not in pieces and not UNSPACED.search(text):
        starts = np.diff(np.array(pieces, dtype=np.int64), prepend=-1) != 0
    else:
        spans = encoding.offsets[:room]
        known = zip(pieces[1:], pieces[:-1], spans[1:], spans[:-1], strict=True)
        starts = [True] + [a is None or a != b or _starts_word(text, span, last) for a, b, span, last in known]
    return np.cumsum(np.array(starts[: len(pieces)], dtype=np.int64)) - 1


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


# ------------------------------------------------------------------------------------------------------ input files


@dataclass(frozen=True)
class Source:
    """One input: a file of JSON lines, or a folder written by `datasets.save_to_disk`."""

    path: Path
    is_dataset: bool = False

    def files(self) -> list[Path]:
        return sorted(p for p in self.path.rglob("*") if p.is_file()) if self.is_dataset else [self.path]

    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files())


def find_sources(inputs: list[str], skip_unknown: bool = False) -> list[Source]:
    """Files, folders and globs -> the sources, in the order given, a folder's or glob's sorted by name.

    Raises ValueError for a path that does not exist, an unknown kind of file (unless skipped), or nothing at all."""
    sources: list[Source] = []
    unknown: list[Path] = []
    for name in inputs:
        paths = [Path(name)] if Path(name).exists() else list(map(Path, sorted(glob.glob(name, recursive=True))))
        if not paths:
            raise ValueError(f"no file {name}: give a file ({', '.join(ENDINGS)}), a folder or a quoted glob")
        for path in paths:
            _sort_in(path, sources, unknown, is_folder_given=True)
    if unknown and not skip_unknown:
        shown = ", ".join(map(str, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ValueError(
            f"unknown kind of file: {shown}. Read are {', '.join(ENDINGS)} and folders written by"
            " datasets.save_to_disk; --skip_unknown passes over all others"
        )
    if not sources:
        raise ValueError(f"no file of a known kind ({', '.join(ENDINGS)}) in {', '.join(inputs)}")
    return sources


def _sort_in(path: Path, sources: list[Source], unknown: list[Path], is_folder_given: bool) -> None:
    if path.is_file():
        if path.name.endswith(ENDINGS):
            sources.append(Source(path))
        else:
            unknown.append(path)
    elif (path / "dataset_dict.json").exists():
        raise ValueError(f"{path} is a DatasetDict of several splits: name the folder of one, e.g. {path / 'train'}")
    elif (path / "state.json").exists() and (path / "dataset_info.json").exists():
        sources.append(Source(path, is_dataset=True))
    elif (path / "manifest.json").exists():
        raise ValueError(f"{path} is a folder of shards already: give it to the trainer as --train_data, or as an entry of it")
    elif is_folder_given:
        for inner in sorted(path.iterdir()):
            if not inner.name.startswith("."):
                _sort_in(inner, sources, unknown, is_folder_given=False)
    else:
        unknown.append(path)


@dataclass(frozen=True)
class Block:
    """Some whole lines of one source, undecoded."""

    source: int  # index of the source
    first: int  # number of the first line: from 1 in a file, from 0 (the row) in a datasets folder
    data: bytes = field(repr=False)
    advance: int  # bytes of the file that reading this block took


def read_blocks(source: Source, index: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Cuts a source into blocks of whole lines, of about `block_bytes`. Raises ValueError for a broken gzip stream."""
    if source.is_dataset:
        yield from _read_dataset(source, index)
        return
    line, rest, at = 1, [], 0
    with open(source.path, "rb") as raw, gzip.open(raw) if source.path.suffix == ".gz" else raw as stream:
        while True:
            try:
                chunk = stream.read(block_bytes)
            except gzip.BadGzipFile as error:
                raise ValueError(f"{source.path}:{line}: not gzip, though its name ends in .gz: {error}") from error
            except (EOFError, zlib.error) as error:
                raise ValueError(f"{source.path}:{line}: the gzip stream breaks off near this line: {error}") from error
            cut = chunk.rfind(b"\n") + 1
            if chunk and not cut:
                rest.append(chunk)
                continue
            data = b"".join([*rest, chunk[:cut]])
            rest = [chunk[cut:]]
            if data:
                here = raw.tell()
                yield Block(index, line, data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data, here - at)
                line, at = line + data.count(b"\n"), here
            if not chunk:
                return


def _read_dataset(source: Source, index: int) -> Iterator[Block]:
    import datasets  # seconds to import, and most inputs are files

    try:
        rows = datasets.load_from_disk(str(source.path))
    except Exception as error:  # whatever the library and Arrow make of a broken folder
        raise ValueError(f"{source.path}: datasets cannot load this folder: {error}") from error
    rows = rows.select_columns([name for names in KEYS.values() for name in names if name in rows.column_names])
    step, done, size = 1000, 0, source.num_bytes()
    for first in range(0, len(rows), step):
        batch = [rows[i] for i in range(first, min(first + step, len(rows)))]
        upto = size * (first + len(batch)) // len(rows)
        yield Block(index, first, b"".join(orjson.dumps(row) + b"\n" for row in batch), upto - done)
        done = upto


# ------------------------------------------------------------------------------------------------------------ lines


def parse_line(raw: bytes, kind: str) -> dict[str, Any]:
    """Checks one line and returns its object, `neg` filled in where absent.

    Raises ValueError with the reason alone; the caller knows the file and the line."""
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ValueError(_why_not_json(raw, error)) from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {_type(record)}: each line holds one object, {{...}}")
    if kind == "pretrain":
        _check_text(record.get("text"), '"text"', record)
        return record
    _check_text(record.get("query"), '"query"', record)
    for key in ("pos", "neg"):
        texts = record.get(key)
        if texts is None and key == "neg":
            texts = record["neg"] = []
        if not isinstance(texts, list):
            raise ValueError(_wrong(f'"{key}"', texts, "a list of strings", record))
        for i, text in enumerate(texts):
            _check_text(text, f'"{key}"[{i}]', record)
        _check_scores(record.get(f"{key}_scores"), f"{key}_scores", len(texts), key)
    if not record["pos"]:
        raise ValueError('"pos" is empty: a query needs at least one positive')
    for key in ("type", "prompt"):
        if record.get(key) is not None and not isinstance(record[key], str):
            raise ValueError(_wrong(f'"{key}"', record[key], "a string", record))
    return record


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
