"""Retrieval sets and how well vectors find what they should: folders in BEIR's form, exact search, measures.

Shapes: Q queries, P passages of one block, K kept passages a query, D features.

The search is exact: every query is scored against every passage by inner product. A candidate is one int64, a key: the
score above, the passage's row below. Its order is that of the score and, among equal scores, of the row, so that keeping
the best, breaking ties, and merging blocks and ranks are all the same `topk`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import ir_measures
import orjson
import torch
import xxhash
from tqdm import tqdm

from bge_ds.data.preprocess import input_files

MEASURES = (ir_measures.nDCG @ 10, ir_measures.RR @ 10, ir_measures.R @ 100)
NAMES = ("nDCG@10", "MRR@10", "Recall@100")
KEPT = 100  # the deepest cutoff among the measures
BLOCK = 16384  # passages encoded and searched at a time
TILE = 512  # queries scored against a block at a time: 32 MiB of fp32 scores, 64 MiB of keys
_ROW = (1 << 32) - 1  # the lower half of a key: this less the row, so that the lower row is the larger key
NO_KEY = torch.iinfo(torch.int64).min  # below the key of every passage
_SPLITS = ("train", "dev", "test", "val", "valid", "validation", "eval")  # names that say nothing without their parent's


@dataclass
class RetrievalSet:
    """A checked BEIR folder. Passages stay on disk: `passages()` reads them again, in the order of `passage_ids`.

    Equal texts are encoded and searched once, as `distinct()` gives them: two encodings may differ in their last bit, and
    chance would then order what is equal. firsts: the row of each distinct text. copies: its index -> its further rows.
    """

    name: str
    corpus: Path
    passage_ids: list[str]
    queries: dict[str, str]  # those that have at least one relevant passage
    qrels: dict[str, dict[str, int]]
    firsts: list[int]
    copies: dict[int, list[int]]
    unjudged: int = 0  # queries left out because no passage is relevant to them

    def passages(self) -> Iterator[str]:
        return (text for _, text, _ in read_texts(self.corpus))

    def distinct(self) -> Iterator[str]:
        firsts = iter(self.firsts)
        wanted = next(firsts)
        for row, text in enumerate(self.passages()):
            if row == wanted:
                yield text
                wanted = next(firsts, -1)


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` that exists in `folder`, plain or with `.gz`."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise ValueError(f"{folder} holds no {' or '.join(names)} (plain or .gz): give a folder in BEIR's form")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank; the place is `file:line`."""
    for place, raw in input_files.read_lines(path):
        try:
            line = raw.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line)") from None
        if line.strip():
            yield place, line


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


def read_folder(folder: Path, flag: str = "--data") -> RetrievalSet:
    """Reads and checks a BEIR folder; a ValueError names the file and line of what is wrong."""
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: no such folder")
    corpus, asked = find_file(folder, "corpus.jsonl"), find_file(folder, "queries.jsonl")
    judged = find_file(folder, "qrels.tsv", "qrels/test.tsv")
    places: dict[str, str] = {}
    known: dict[int, int] = {}
    firsts, copies = [], {}
    for row, (identity, text, place) in enumerate(read_texts(corpus)):
        if identity in places:
            raise ValueError(f"{place}: passage {identity!r} was given before, at {places[identity]}")
        places[identity] = place
        index = known.setdefault(xxhash.xxh3_128_intdigest(text.encode()), len(firsts))
        if index == len(firsts):
            firsts.append(row)
        else:
            copies.setdefault(index, []).append(row)
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
    unjudged = len(queries) - len(kept)
    return RetrievalSet(folder.name, corpus, list(places), kept, qrels, firsts, copies, unjudged)


def read_folders(folders: list[Path], flag: str) -> dict[str, RetrievalSet]:
    """The checked sets of several folders under names that tell them apart (see `names_of`)."""
    return {name: read_folder(folder, flag) for name, folder in zip(names_of(folders), folders, strict=True)}


def names_of(folders: list[Path]) -> list[str]:
    """A name for each folder: its own, its parent's before it (`debian_dev`) where that says too little, or the whole path."""
    folders = [folder.resolve() for folder in folders]
    short = [folder.name for folder in folders]
    told = [
        f"{folder.parent.name}_{folder.name}" if short.count(folder.name) > 1 or folder.name.lower() in _SPLITS else folder.name
        for folder in folders
    ]
    if len(set(folders)) < len(folders):
        raise ValueError(f"the same folder twice: {', '.join(map(str, folders))}; give each once")
    return told if len(set(told)) == len(told) else [str(folder) for folder in folders]


# -------------------------------------------------------------------------------------------------------------- search


def keys_of(scores_QP: torch.Tensor, first_row: int) -> torch.Tensor:
    """The keys of a block whose first passage has row `first_row`. A score that is no number counts as the lowest."""
    # + 0.0 makes -0.0 the 0.0 that it equals. As integers, floats of one sign are in order; negative ones are turned round.
    scores_QP = torch.nan_to_num(scores_QP, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    bits_QP = scores_QP.view(torch.int32)
    bits_QP = bits_QP ^ ((bits_QP >> 31) & 0x7FFFFFFF)
    below_P = _ROW - torch.arange(first_row, first_row + scores_QP.shape[1], device=scores_QP.device)
    return (bits_QP.long() << 32) + below_P


def from_keys(keys_QK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores fp32, rows int64) of keys."""
    bits_QK = (keys_QK >> 32).to(torch.int32)
    scores_QK = (bits_QK ^ ((bits_QK >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return scores_QK, _ROW - (keys_QK & _ROW)


def best_of(keys_QP: torch.Tensor, kept: int) -> torch.Tensor:
    return keys_QP.topk(min(kept, keys_QP.shape[1]), dim=1).values


def best_keys(queries_QD: torch.Tensor, blocks: Iterable[tuple[int, torch.Tensor]], kept: int = KEPT) -> torch.Tensor:
    """Keys of the `kept` best passages of each query (fewer where there are fewer), best first.

    blocks: (row of the first passage, P x D); each is dropped once it is searched.
    """
    best_QK = torch.empty(len(queries_QD), 0, dtype=torch.int64, device=queries_QD.device)
    for first_row, block_PD in blocks:
        block_PD = block_PD.to(queries_QD.device)
        with _exact_products():
            best_QK = torch.cat([
                best_of(torch.cat([best, keys_of(tile_QD @ block_PD.T, first_row)], dim=1), kept)
                for tile_QD, best in zip(queries_QD.split(TILE), best_QK.split(TILE), strict=True)
            ])  # fmt: skip
    return best_QK


@contextmanager
def _exact_products():
    """Scores are fp32 whatever the run computes its layers in: TensorFloat-32 would make ties of near scores."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def search(queries_QD: torch.Tensor, blocks_PD: Iterable[torch.Tensor], kept: int = KEPT):
    """The `kept` best passages of each query over all blocks: (scores Q x K fp32, rows Q x K int64), best first.

    Rows count through the blocks in the order given; equal scores come in the order of the rows.
    """

    def numbered() -> Iterator[tuple[int, torch.Tensor]]:
        row = 0
        for block_PD in blocks_PD:
            yield row, block_PD
            row += len(block_PD)

    return from_keys(best_keys(queries_QD, numbered(), kept))


def ranking(data: RetrievalSet, found_QK: torch.Tensor) -> dict[str, dict[str, float]]:
    """query id -> passage id -> score, from each query's best distinct texts (their indices, best first).

    The scores are places: the measures' own rule for equal scores (by passage id) must not undo the order found.
    """
    run = {}
    for query, found_K in zip(data.queries, found_QK.tolist(), strict=True):
        rows = (row for index in found_K for row in (data.firsts[index], *data.copies.get(index, ())))
        run[query] = {data.passage_ids[row]: float(-place) for place, row in enumerate(islice(rows, KEPT))}
    return run


def measure(data: RetrievalSet, run: dict[str, dict[str, float]]) -> dict[str, float]:
    """The measures of a ranking (query id -> passage id -> score), averaged over all queries of the set."""
    values = ir_measures.calc_aggregate(MEASURES, data.qrels, run)
    return {name: round(float(values[measure]), 6) for name, measure in zip(NAMES, MEASURES, strict=True)}


def tokenize(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids of texts, cut at max_length; a text of no tokens at all is given one, since it must have a vector."""
    if not texts:
        return []
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    # The call leaves its cut in the tokenizer, which would be saved with the model and cut texts ever after.
    tokenizer.backend_tokenizer.no_truncation()
    return [row or [tokenizer.eos_token_id or 0] for row in ids]


def evaluate_set(data: RetrievalSet, encode: Callable[[list[str], str], torch.Tensor]) -> dict[str, float]:
    """The measures of a model on one set, with its sizes and seconds. encode(texts, "query" or "passage"): N x D, fp32."""
    started = time.perf_counter()
    queries_QD = encode(list(data.queries.values()), "query")
    texts = data.distinct()
    with tqdm(total=len(data.firsts), desc=data.name, unit="passages", disable=None) as bar:

        def blocks() -> Iterator[torch.Tensor]:
            while block := list(islice(texts, BLOCK)):
                yield encode(block, "passage")
                bar.update(len(block))

        _, found_QK = search(queries_QD, blocks(), KEPT)
    sizes = {"queries": len(data.queries), "passages": len(data.passage_ids), "queries_left_out": data.unjudged}
    return measure(data, ranking(data, found_QK)) | sizes | {"seconds": round(time.perf_counter() - started, 2)}
