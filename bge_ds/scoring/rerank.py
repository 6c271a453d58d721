"""A ranking in the order of a cross-encoder's scores, for `bge_ds.evaluate --rerank`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from bge_ds.data.beir import RetrievalSet
from bge_ds.evaluation import run_files
from bge_ds.evaluation.run_files import Run
from bge_ds.modeling import cross_encoder, encoder
from bge_ds.scoring.teachers import CrossEncoderTeacher, PairSettings, Teacher, config_of

_QUERIES = 64  # whose pairs are packed together


def load_reranker(
    name: str, *, flag: str, max_len: int | None = None, cache_dir: str | None = None, **how
) -> CrossEncoderTeacher:
    """A cross-encoder with FlagEmbedding's lengths and prompts. how: arguments of `CrossEncoderTeacher`.

    Raises ValueError, naming the flag, for a model that is none.
    """
    config = config_of(name, cache_dir, flag)
    kind = cross_encoder.kind_of(config)
    try:
        cross_encoder.check(config, kind)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    assert kind is not None
    encoder.check_lengths(config, rerank_max_len=max_len or 0)
    settings = PairSettings.of(kind, encoder.longest_text(config), max_len=max_len)
    return CrossEncoderTeacher.load(name, kind, settings, cache_dir=cache_dir, **how)


def rerank(teacher: Teacher, data: RetrievalSet, run: Run, depth: int) -> Run:
    """`run_files.reordered` by the teacher's scores. run: best first."""
    tops = run_files.first_of(run, depth)
    wanted = {passage for top in tops.values() for passage in top}
    texts = {name: text for name, text in zip(data.passage_ids, data.passages(), strict=True) if name in wanted}
    queries = list(run)
    with tqdm(total=sum(map(len, tops.values())), desc=f"{data.name}, reranking", unit="pairs", disable=None) as bar:

        def scores() -> Iterator[float]:
            for first in range(0, len(queries), _QUERIES):
                some = queries[first : first + _QUERIES]
                query_P = np.repeat(np.arange(len(some)), [len(tops[query]) for query in some])
                passages = [texts[passage] for query in some for passage in tops[query]]
                if passages:
                    read = teacher.read([data.queries[query] for query in some], passages, query_P)
                    yield from teacher.score(read, lambda pairs, _: bar.update(pairs)).tolist()

        return run_files.reordered(run, depth, scores())
