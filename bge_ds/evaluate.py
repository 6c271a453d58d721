"""Retrieval quality of an embedding model: `python -m bge_ds.evaluate --model_name_or_path M --data FOLDER`.

A folder is in BEIR's form: `corpus.jsonl` (`_id`, optional `title`, `text`), `queries.jsonl` (`_id`, `text`) and
`qrels.tsv` or `qrels/test.tsv` (query-id, corpus-id, score), each plain or `.gz`.

Shapes: Q queries, P passages of one block, K kept passages a query, D features.

The search is exact: every query is scored against every passage by inner product. The corpus goes through the model
block by block and only the best K of each query stay, so memory does not grow with the corpus. All lines are checked
before the model is loaded: a mistake in the last line of qrels costs a second, not the encoding of a corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import ir_measures
import orjson
import torch
from tqdm import tqdm

from bge_ds.data import records
from bge_ds.modeling import encoder

MEASURES = (ir_measures.nDCG @ 10, ir_measures.RR @ 10, ir_measures.R @ 100)
NAMES = ("nDCG@10", "MRR@10", "Recall@100")
KEPT = 100  # the deepest cutoff among the measures
BLOCK = 16384  # passages encoded and searched at a time
TILE = 1024  # queries scored against a block at a time: 64 MiB of fp32 scores
DEFAULT_LENGTHS = {"query_max_len": 64, "passage_max_len": 256}


@dataclass
class RetrievalSet:
    """A checked BEIR folder. Passages stay on disk: `passages()` reads them again, in the order of `passage_ids`."""

    name: str
    corpus: Path
    passage_ids: list[str]
    queries: dict[str, str]  # those that have at least one relevant passage
    qrels: dict[str, dict[str, int]]
    unjudged: int = 0  # queries left out because no passage is relevant to them

    def passages(self) -> Iterator[str]:
        return (text for _, text, _ in read_texts(self.corpus))


@dataclass
class Settings:
    """How texts become vectors. `said` collects where each setting came from, for the screen."""

    pooling: str
    normalize: bool
    query_prompt: str = ""
    passage_prompt: str = ""
    said: list[str] = field(default_factory=list)


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` that exists in `folder`, plain or with `.gz`."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise ValueError(f"{folder} holds no {' or '.join(names)} (plain or .gz): give a folder in BEIR's form")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank; the place is `file:line`."""
    for block in records.read_blocks(records.Source(path), 0):
        for number, raw in enumerate(block.data.split(b"\n"), block.first):
            try:
                line = raw.decode("utf-8").rstrip("\r")
            except UnicodeDecodeError as error:
                place = f"{path}:{number}"
                raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line)") from None
            if line.strip():
                yield f"{path}:{number}", line


def read_texts(path: Path) -> Iterator[tuple[str, str, str]]:
    """(id, text, place) of each line of a corpus or of queries; a title goes before its text, as BEIR has it."""
    for place, line in read_lines(path):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a {type(row).__name__} where an object with _id and text is expected")
        identity, text, title = row.get("_id"), row.get("text"), row.get("title") or ""
        if not isinstance(identity, str) or not identity:
            raise ValueError(f"{place}: _id must be a non-empty string, not {identity!r}")
        if not isinstance(text, str) or not isinstance(title, str):
            raise ValueError(f"{place}: text (and title, where there is one) must be a string")
        yield identity, f"{title} {text}".strip(), place


def read_qrels(path: Path, passages: Collection[str], queries: Collection[str]) -> dict[str, dict[str, int]]:
    """query id -> passage id -> grade, every id checked against the folder's own texts."""
    qrels: dict[str, dict[str, int]] = {}
    for first, (place, line) in enumerate(read_lines(path)):
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(f"{place}: {len(fields)} tab-separated fields, not query-id, corpus-id, score")
        query, passage, grade = fields
        try:
            value = int(grade)
        except ValueError:
            if first == 0:
                continue  # the header
            raise ValueError(f"{place}: the score must be a whole number, not {grade!r}") from None
        if query not in queries:
            raise ValueError(f"{place}: query {query!r} is not among the queries of this folder")
        if passage not in passages:
            raise ValueError(f"{place}: passage {passage!r} is not in the corpus of this folder")
        qrels.setdefault(query, {})[passage] = value
    return qrels


def read_folder(folder: Path) -> RetrievalSet:
    """Reads and checks a BEIR folder; a ValueError names the file and line of what is wrong."""
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    corpus, asked = find_file(folder, "corpus.jsonl"), find_file(folder, "queries.jsonl")
    judged = find_file(folder, "qrels.tsv", "qrels/test.tsv")
    places: dict[str, str] = {}
    for identity, _, place in read_texts(corpus):
        if identity in places:
            raise ValueError(f"{place}: passage {identity!r} was given before, at {places[identity]}")
        places[identity] = place
    if not places:
        raise ValueError(f"{corpus}: an empty corpus")
    queries: dict[str, str] = {}
    for identity, text, place in read_texts(asked):
        if identity in queries:
            raise ValueError(f"{place}: query {identity!r} was given before")
        if not text:
            raise ValueError(f"{place}: an empty query")
        queries[identity] = text
    qrels = read_qrels(judged, places.keys(), queries)
    qrels = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not qrels:
        raise ValueError(f"{judged}: no query has a relevant passage (a score above 0)")
    kept = {query: queries[query] for query in qrels}
    return RetrievalSet(folder.name, corpus, list(places), kept, qrels, len(queries) - len(kept))


def search(queries_QD: torch.Tensor, blocks_PD: Iterable[torch.Tensor], kept: int = KEPT):
    """The `kept` best passages of each query over all blocks: (scores Q x K fp32, rows Q x K int64), best first.

    Rows count through the blocks in the order given. Each block is dropped once it is searched.
    """
    device = queries_QD.device
    best_scores = torch.empty(len(queries_QD), 0, device=device)
    best_rows = torch.empty(len(queries_QD), 0, dtype=torch.int64, device=device)
    start = 0
    for block_PD in blocks_PD:
        block_PD = block_PD.to(device)
        tiles = [(tile_QD @ block_PD.T).topk(min(kept, len(block_PD)), dim=1) for tile_QD in queries_QD.split(TILE)]
        scores = torch.cat([best_scores, torch.cat([tile.values for tile in tiles])], dim=1)
        rows = torch.cat([best_rows, torch.cat([tile.indices for tile in tiles]) + start], dim=1)
        best_scores, order = scores.topk(min(kept, scores.shape[1]), dim=1)
        best_rows = rows.gather(1, order)
        start += len(block_PD)
    return best_scores, best_rows


def measure(data: RetrievalSet, run: dict[str, dict[str, float]]) -> dict[str, float]:
    """The measures of a ranking (query id -> passage id -> score), averaged over all queries of the set."""
    values = ir_measures.calc_aggregate(MEASURES, data.qrels, run)
    return {name: round(float(values[measure]), 6) for name, measure in zip(NAMES, MEASURES, strict=True)}


def evaluate(data: RetrievalSet, encode: Callable[[list[str], str], torch.Tensor]) -> dict[str, float]:
    """The measures of a model on one set. `encode(texts, "query" | "passage")` gives fp32 rows of D features."""
    started = time.perf_counter()
    queries_QD = encode(list(data.queries.values()), "query")
    texts = data.passages()
    with tqdm(total=len(data.passage_ids), desc=data.name, unit="passages", disable=None) as bar:

        def blocks() -> Iterator[torch.Tensor]:
            while block := list(islice(texts, BLOCK)):
                yield encode(block, "passage")
                bar.update(len(block))

        scores, rows = search(queries_QD, blocks())
    run = {
        query: {data.passage_ids[row]: score for row, score in zip(rows_K, scores_K, strict=True)}
        for query, rows_K, scores_K in zip(data.queries, rows.tolist(), scores.tolist(), strict=True)
    }
    sizes = {"queries": len(data.queries), "passages": len(data.passage_ids), "queries_left_out": data.unjudged}
    return measure(data, run) | sizes | {"seconds": round(time.perf_counter() - started, 2)}


def settings_folder(name_or_path: str, cache_dir: str | None) -> Path:
    """Where the sentence-transformers files of a model lie; those of a hub model are fetched (a few kilobytes)."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["modules.json", "*/config.json", "config_sentence_transformers.json"]
    try:
        return Path(snapshot_download(name_or_path, cache_dir=cache_dir, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"--model_name_or_path {name_or_path}: neither a folder here nor a model that the hub gave ({error})"
        ) from None


def read_settings(folder: Path, args: argparse.Namespace) -> Settings:
    """Flags first, then the model's sentence-transformers files, then cls and normalised."""
    found = encoder.read_pooling(folder)
    pooling, normalize = found or ("cls", True)
    origin = "from modules.json" if found else "by default: the model has no modules.json"
    settings = Settings(pooling, normalize)
    for name, flag in (("pooling", args.sentence_pooling_method), ("normalize", args.normalize_embeddings)):
        if flag is not None:
            setattr(settings, name, flag)
        settings.said.append(f"{name} {getattr(settings, name)} ({'from the flag' if flag is not None else origin})")

    prompts: dict[str, str] = {}
    path = folder / "config_sentence_transformers.json"
    if path.is_file():
        try:
            prompts = json.loads(path.read_text(encoding="utf-8")).get("prompts") or {}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not a JSON object ({error})") from None
    sides = (
        ("query", args.query_instruction_for_retrieval, ("query",)),
        ("passage", args.passage_instruction_for_retrieval, ("passage", "document", "corpus")),
    )
    for side, flag, keys in sides:
        stored = next((prompts[key] for key in keys if prompts.get(key)), "")
        prompt = stored if flag is None else flag
        setattr(settings, f"{side}_prompt", prompt)
        if prompt:
            settings.said.append(f"{side} prompt {prompt!r} ({'from the model' if flag is None else 'from the flag'})")
    return settings


def build_encode(args: argparse.Namespace) -> tuple[Callable[[list[str], str], torch.Tensor], dict]:
    """The function that turns texts into vectors, and the effective settings as plain values."""
    name = args.model_name_or_path
    settings = read_settings(settings_folder(name, args.cache_dir), args)
    tokenizer = records.load_tokenizer(name, cache_dir=args.cache_dir)
    try:
        model = encoder.Encoder.load(name, settings.pooling, settings.normalize, cache_dir=args.cache_dir)
    except OSError as error:
        raise ValueError(f"--model_name_or_path {name}: {error}") from None
    limit = encoder.longest_text(model.backbone.config)
    lengths = {}
    for key, default in DEFAULT_LENGTHS.items():
        lengths[key] = getattr(args, key) or min(default, limit)
    encoder.check_lengths(model.backbone.config, **lengths)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    model.to(device).eval()
    if args.bf16:
        settings.said.append("bf16")
    print(f"{name} on {device}, {encoder.say_how(model.backbone.config)}: {', '.join(settings.said)}", file=sys.stderr)
    print(", ".join(f"{key} {value}" for key, value in lengths.items()), file=sys.stderr)

    def encode(texts: list[str], side: str) -> torch.Tensor:
        prompt = settings.query_prompt if side == "query" else settings.passage_prompt
        length = lengths[f"{side}_max_len"]
        ids = tokenizer([prompt + text for text in texts], truncation=True, max_length=length)["input_ids"]
        half = torch.autocast(device.type, torch.bfloat16) if args.bf16 else contextlib.nullcontext()
        with half:
            vectors = model.encode_ids(ids, batch_tokens=args.batch_size * length)
        return torch.as_tensor(vectors, dtype=torch.float32, device=device)

    effective = {key: getattr(settings, key) for key in ("pooling", "normalize", "query_prompt", "passage_prompt")}
    return encode, effective | lengths | {"bf16": args.bf16, "device": device.type}


def table(rows: list[tuple[str, dict[str, float]]], head: str = "data") -> str:
    """The measures of each named row, as text in columns."""
    width = max(len(head), *(len(name) for name, _ in rows))
    lines = [f"{head:<{width}}  " + "  ".join(f"{name:>10}" for name in NAMES)]
    lines += [f"{name:<{width}}  " + "  ".join(f"{values[n]:>10.4f}" for n in NAMES) for name, values in rows]
    return "\n".join(lines)


def write_json(path: Path, value: dict) -> None:
    """Whole or not at all: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bge_ds.evaluate", description=__doc__.split("\n")[0].split(": ")[0])
    p.add_argument("--model_name_or_path", required=True, help="folder or hub name of the model")
    p.add_argument("--data", required=True, nargs="+", type=Path, metavar="FOLDER", help="folders in BEIR's form")
    for name, default in DEFAULT_LENGTHS.items():
        p.add_argument(f"--{name}", type=positive, help=f"tokens, prompt and special tokens included ({default})")
    p.add_argument("--batch_size", type=positive, default=64, help="full-length texts a batch; of shorter ones, more")
    p.add_argument("--query_instruction_for_retrieval", help="prefix of queries (default: the model's stored prompt)")
    p.add_argument("--passage_instruction_for_retrieval", help="prefix of passages (default: the stored prompt)")
    p.add_argument("--sentence_pooling_method", choices=encoder.POOLINGS, help="default: what the model's files say")
    p.add_argument("--normalize_embeddings", type=parse_bool, metavar="True|False", help="default: likewise")
    p.add_argument("--cache_dir", help="where models fetched from the hub are kept")
    p.add_argument("--output", type=Path, metavar="FILE.json", help="also write the figures and settings here")
    p.add_argument("--use_cpu", action="store_true", help="even where there is a GPU")
    p.add_argument("--bf16", action="store_true", help="matrix products in bf16; scores stay fp32")
    return p


def run(args: argparse.Namespace) -> None:
    names = [folder.resolve().name for folder in args.data]
    if args.output is not None and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder: name a file, such as {args.output}/scores.json")
    sets = [read_folder(folder) for folder in args.data]
    encode, settings = build_encode(args)
    # Two folders of one name (`a/dev`, `b/dev`) are told apart by the path that was given.
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, args.data, strict=True)]
    results = {label: evaluate(data, encode) for label, data in zip(labels, sets, strict=True)}
    print(table(list(results.items())))
    for label, values in results.items():
        if values["queries_left_out"]:
            print(f"{label}: {values['queries_left_out']} queries have no relevant passage and were left out")
    if args.output is not None:
        write_json(args.output, {"model": args.model_name_or_path, "settings": settings, "results": results})


def main(argv: list[str] | None = None) -> int:
    """The command. 0 when all went well, 2 after an error of the user's, said in one line."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
