"""What an evaluation while training measures: an embedder's search, or a reranker's order of given lists.

Shapes: Q queries, K kept passages a query.

No bit of the result depends on the number of ranks (`distributed_texts.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bge_ds.data.beir import RetrievalSet
from bge_ds.data.pairs import PairLayout
from bge_ds.distributed import collectives
from bge_ds.evaluation import retrieval, run_files
from bge_ds.evaluation.bm25 import Candidates
from bge_ds.evaluation.distributed_texts import DistributedPairs, DistributedTexts
from bge_ds.evaluation.run_files import Run
from bge_ds.modeling.cross_encoder import CrossEncoder
from bge_ds.modeling.encoder import Encoder


class Evaluator:
    """Measures a model on each set; to be called on every rank."""

    def __init__(self, sets: dict[str, RetrievalSet], device: torch.device):
        # Threads tokenize here, and the loader's workers fork later: unset, the library would warn in each worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.sets, self.device = sets, device

    @torch.no_grad()  # not inference_mode: ZeRO-3 gathers weights in here that a later backward uses
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`eval_<set>_<measure>`, their means over the sets `eval_<measure>`, and `eval_seconds`; the same on every rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that the training step's kernels are not timed as evaluation
        started = time.perf_counter()
        training = model.training
        model.eval()
        found = {name: self.measure(name, model) for name in self.sets}
        model.train(training)
        values = {f"eval_{name}_{measure}": v for name, measures in found.items() for measure, v in measures.items()}
        for measure in retrieval.NAMES:
            values[f"eval_{measure}"] = round(sum(measures[measure] for measures in found.values()) / len(found), 6)
        return values | {"eval_seconds": time.perf_counter() - started}

    def measure(self, name: str, model: nn.Module) -> dict[str, float]:
        """The measures of one set."""
        raise NotImplementedError

    def describe(self, name: str) -> str:
        data = self.sets[name]
        return f"{name} ({len(data.queries)} queries, {len(data.passage_ids)} passages)"

    def check_loaded(self, folder: Path) -> None:
        """Raises RuntimeError where the model saved in `folder` gives values that are not finite."""
        raise NotImplementedError


class SearchEvaluator(Evaluator):
    """Searches each set with an encoder's vectors.

    Lengths are in tokens, prompts included; a batch holds at most batch_size full-length passages.
    """

    def __init__(
        self, sets: dict[str, RetrievalSet], tokenizer, device: torch.device, *,
        query_max_len: int, passage_max_len: int, query_prompt: str = "", passage_prompt: str = "", batch_size: int,
    ):  # fmt: skip
        super().__init__(sets, device)

        def distribute(texts: Iterable[str], count: int, prompt: str, length: int) -> DistributedTexts:
            def to_ids(unit: list[str]) -> list[list[int]]:
                return retrieval.tokenize(tokenizer, [prompt + text for text in unit], length)

            return DistributedTexts(texts, count, to_ids, len(tokenizer), batch_size * passage_max_len, device)

        self.texts: dict[str, tuple[DistributedTexts, DistributedTexts]] = {}  # queries and passages of each set
        for name, data in sets.items():
            queries = distribute(data.queries.values(), len(data.queries), query_prompt, query_max_len)
            passages = distribute(data.distinct(), len(data.firsts), passage_prompt, passage_max_len)
            self.texts[name] = queries, passages

    def measure(self, name: str, model: nn.Module) -> dict[str, float]:
        data = self.sets[name]
        return retrieval.measure(data, retrieval.ranking(data, self.rank(name, model).tolist()))

    def rank(self, name: str, model: nn.Module) -> torch.Tensor:
        """The indices of each query's best distinct texts, Q x K, best first."""
        queries, passages = self.texts[name]
        kept = min(retrieval.KEPT, passages.count)
        own_QK = retrieval.best_keys(queries.encode_all(model), passages.encode(model), kept)
        if collectives.world_size() > 1:
            missing = own_QK.new_full((len(own_QK), kept - own_QK.shape[1]), retrieval.NO_KEY)
            own_QK = torch.cat([own_QK, missing], dim=1)
            tiles = []
            for tile_QK in own_QK.split(retrieval.TILE):
                ranks_RQK = collectives.all_gather_rows(tile_QK).unflatten(0, (-1, len(tile_QK)))
                tiles.append(retrieval.best_of(ranks_RQK.transpose(0, 1).flatten(1), kept))
            own_QK = torch.cat(tiles)
        return retrieval.from_keys(own_QK)[1]

    def check_loaded(self, folder: Path) -> None:
        passages = next(iter(self.texts.values()))[1]
        if not Encoder.load(str(folder)).encode_ids(passages.rows(0).ids.split()[:1]).isfinite().all():
            raise RuntimeError(f"the model of {folder} gives vectors that are not finite")


class RerankingEvaluator(Evaluator):
    """Orders the first `depth` passages of given lists by a cross-encoder's scores.

    first_stages: of each set, the name of the lists, and the lists, best first. prefixes: what stands before each query and
    passage. cuts: the lengths of `PairLayout.build`; a batch holds at most batch_size full-length pairs. yes: as `CrossEncoder`
    has it.
    """

    def __init__(
        self, sets: dict[str, RetrievalSet], first_stages: dict[str, tuple[str, Run]], tokenizer, device: torch.device, *,
        depth: int, layout: PairLayout, cuts: dict[str, int], prefixes: dict[str, str], yes: int | None, batch_size: int,
    ):  # fmt: skip
        super().__init__(sets, device)
        self.first_stages, self.depth, self.yes = first_stages, depth, yes
        self.pairs: dict[str, DistributedPairs] = {}
        for name, data in sets.items():
            tops = run_files.first_of(first_stages[name][1], depth)
            wanted = dict.fromkeys(passage for top in tops.values() for passage in top)
            texts = {of: text for of, text in zip(data.passage_ids, data.passages(), strict=True) if of in wanted}
            places = {of: place for place, of in enumerate(texts)}
            self.pairs[name] = DistributedPairs(
                [prefixes["query"] + data.queries[query] for query in tops],
                [prefixes["passage"] + text for text in texts.values()],
                np.repeat(np.arange(len(tops)), [len(top) for top in tops.values()]),
                np.array([places[passage] for top in tops.values() for passage in top], np.int64),
                lambda some: retrieval.tokenize_content(tokenizer, some), layout, cuts, batch_size * cuts["max_len"], device,
            )  # fmt: skip

    def measure(self, name: str, model: nn.Module) -> dict[str, float]:
        data, run = self.sets[name], self.first_stages[name][1]
        scores = self.pairs[name].encode_all(model)[:, 0].tolist()
        made = run_files.reordered(run, self.depth, iter(scores))
        return retrieval.measure(data, run_files.by_place(made))

    def describe(self, name: str) -> str:
        data, (stage, run) = self.sets[name], self.first_stages[name]
        before = retrieval.measure(data, run_files.by_place(run))["nDCG@10"]
        return f"{name} ({len(data.queries)} queries, the first {self.depth} passages of {stage}, nDCG@10 {before:.4f})"

    def check_loaded(self, folder: Path) -> None:
        pairs = next(iter(self.pairs.values())).rows(0)
        second = None if pairs.second is None else pairs.second[:1]
        if not CrossEncoder.load(str(folder), yes=self.yes).score_ids(pairs.ids.split()[:1], second).isfinite().all():
            raise RuntimeError(f"the model of {folder} gives scores that are not finite")


def first_stages(sets: dict[str, RetrievalSet], files: list[str], depth: int, flag: str) -> dict[str, tuple[str, Run]]:
    """Of each set the lists to be reranked and their name: those of the files, which are one a set, or else BM25's.

    Raises ValueError, naming the flag, for a file that does not rank the set.
    """
    if not files:
        return {name: ("BM25", _by_words(data, depth)) for name, data in sets.items()}
    pairs = zip(sets.items(), map(Path, files), strict=True)
    return {name: (path.name, run_files.in_order(run_files.read_run(path, data, flag)[0])) for (name, data), path in pairs}


def _by_words(data: RetrievalSet, depth: int) -> Run:
    kept = max(depth, retrieval.KEPT)
    return run_files.of_found(data, Candidates(data.distinct(), list(data.queries.values()), kept).ranked(), kept)
