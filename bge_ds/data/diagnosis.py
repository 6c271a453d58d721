"""What in fine-tuning or pre-training data will hurt: found in a sample of the shards, before anything is trained.

Each finding is one line: the share, what it does to training, the remedy, and where the documentation explains it. A finding
is a rule of thumb with a threshold, never an error. Texts are compared by their token ids, as shards hold no text.

Nearly equal texts are found by shingles: runs of SHINGLE tokens, hashed. The Jaccard similarity of two texts is the size of the
intersection of their sets of shingles over that of the union (Broder, "On the resemblance and containment of documents", 1997).
The sets are exact: with a sample of this size, MinHash would save nothing.
"""

from __future__ import annotations

import numpy as np

from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.sampling.sampler import mix64
from bge_ds.data.shards.manifest_file import Manifest
from bge_ds.data.shards.shard_reader import FinetuneShards, PretrainShards

PAGE = "docs/diagnosis.md"
SAMPLED = 2000  # rows looked at
SAMPLED_QUERIES = 20000  # training queries that are compared with an evaluation set's
SHINGLE = 3  # tokens in a row
NEAR = 0.8  # Jaccard similarity from which texts count as nearly equal
# The share of the sample from which each is reported.
NEGATIVES, COPIES, REPEATED, LEAKED, SHORT, CUT, REVERSED, DROWNED, UNKNOWN = (
    0.02,
    0.05,
    0.10,
    0.02,
    0.02,
    0.50,
    0.50,
    0.01,
    0.10,
)


def of_shards(data: PretrainShards | FinetuneShards) -> list[str]:
    """The findings of opened shards. Reads at most SAMPLED rows, evenly spread."""
    if not len(data):
        return []
    rows = sample(data)
    common = _cut(data.manifest) + _unknown(data.manifest) + _drowned(data.manifest)
    if isinstance(data, PretrainShards):
        texts = _Texts(data.texts(rows)[0], data.manifest)
        return common + _short("texts", texts) + _repeated("texts", texts)
    return common + _of_groups(data, rows)


def sample(data: PretrainShards | FinetuneShards, most: int = SAMPLED) -> np.ndarray:
    """Numbers of at most `most` rows, evenly spread."""
    return np.unique(np.linspace(0, len(data) - 1, min(most, len(data)), dtype=np.int64))


def leaked(data: FinetuneShards, name: str, evaluated: RaggedArrays) -> list[str]:
    """The finding where training queries are (nearly) the queries of an evaluation set, given as token ids; [] where not."""
    asked = _Texts(evaluated, data.manifest)
    rows = sample(data, SAMPLED_QUERIES)
    trained = _Texts(data.queries(rows), data.manifest)
    # Only training queries most of whose shingles the set has are compared with each of its queries.
    hits = np.bincount(trained.owner, np.isin(trained.shingles, asked.shingles), minlength=len(rows))
    found = np.zeros(len(evaluated.lengths), bool)
    for k in np.flatnonzero(hits >= NEAR * np.maximum(1, trained.counts)).tolist():
        found |= asked.resemblance(trained.set_of(k)) >= NEAR
    # A sample of the training queries meets only its part of the leaked ones.
    if (share := min(1.0, found.mean() * len(data) / len(rows))) < LEAKED:
        return []
    what = f"{share:.0%} of the queries of {name} are also trained on: its scores will be too good"
    return [_say(what, "remove them from the training data", "leakage")]


class _Texts:
    """Texts of a sample with their sets of shingles. lengths: tokens without special ones."""

    def __init__(self, ids: RaggedArrays, manifest: Manifest):
        made = manifest.tokenizer
        special = np.isin(ids.values, [*made.prefix_ids, *made.suffix_ids])
        of_T = np.repeat(np.arange(len(ids.lengths)), ids.lengths)
        self.lengths = np.bincount(of_T[~special], minlength=len(ids.lengths))
        values, of_T = ids.values[~special].astype(np.int64), of_T[~special]
        # The k-th token of a text begins a shingle of up to SHINGLE tokens of the same text; a shorter text is one shingle.
        parts = [values]
        for k in range(1, SHINGLE):
            after, same = np.roll(values, -k), np.roll(of_T, -k) == of_T
            same[len(same) - k :] = False
            parts.append(np.where(same, after, -1))
        whole = (parts[-1] >= 0) | (self.lengths[of_T] < SHINGLE)
        pairs = np.unique(np.stack([of_T[whole], mix64(*(part[whole] for part in parts)).view(np.int64)]), axis=1)
        self.owner, self.shingles = pairs if pairs.size else (np.zeros(0, np.int64), np.zeros(0, np.int64))
        self.counts = np.bincount(self.owner, minlength=len(self.lengths))
        self._ends = np.cumsum(self.counts)

    def set_of(self, k: int) -> np.ndarray:
        return self.shingles[self._ends[k] - self.counts[k] : self._ends[k]]

    def resemblance(self, other: np.ndarray) -> np.ndarray:
        """The Jaccard similarity of each text with a set of shingles."""
        common = np.bincount(self.owner, np.isin(self.shingles, other), minlength=len(self.lengths))
        return common / np.maximum(1, self.counts + len(other) - common)


def _of_groups(data: FinetuneShards, rows: np.ndarray) -> list[str]:
    """The findings of a sample of groups. G groups."""
    queries = _Texts(data.queries(rows), data.manifest)
    pos, neg = data.passage_rows(rows)
    listed = np.unique(np.concatenate([pos.values, neg.values]))
    passages = _Texts(data.passages(listed), data.manifest)
    hashes = data.hashes(listed)
    equal_neg, near_neg, copied = (np.zeros(len(rows), bool) for _ in range(3))
    for g, (positives, negatives) in enumerate(zip(pos.split(), neg.split(), strict=True)):
        own, others = np.searchsorted(listed, positives), np.searchsorted(listed, negatives)
        equal_neg[g] = np.isin(hashes[others], hashes[own]).any()
        query = queries.set_of(g)
        wanted = [passages.set_of(k) for k in own.tolist()]
        near_neg[g] = any(_jaccard(passages.set_of(k), one) >= NEAR for k in others.tolist() for one in [query, *wanted])
        copied[g] = any(_jaccard(query, one) >= NEAR for one in wanted)
    found = []
    if (share := near_neg.mean()) >= NEGATIVES:
        what = f"{share:.0%} of the groups have a negative that equals or nearly equals a positive or the query"
        what += f" ({equal_neg.mean():.0%}: the very text of a positive)" if equal_neg.any() else ""
        found.append(_say(f"{what}: the loss pushes the right answer away", "drop them, or mine with a margin", "negatives"))
    if (share := copied.mean()) >= COPIES:
        what = f"{share:.0%} of the queries nearly equal their positive: the model learns to copy"
        found.append(_say(what, "drop these groups, or give real queries", "copies"))
    found += _short("queries", queries) + _short("passages", passages) + _repeated("queries", queries)
    return found + _scores(data, rows) + _prompts(data.manifest)


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets of shingles, each sorted and without repeats. Sizes that differ too much settle it without a look."""
    if min(len(a), len(b)) < NEAR * max(len(a), len(b)) or not len(a):
        return 0.0
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _short(what: str, texts: _Texts) -> list[str]:
    if (share := (texts.lengths <= 1).mean()) < SHORT:
        return []
    return [_say(f"{share:.0%} of the {what} have one token or none: they say nothing", "drop these lines", "short-texts")]


def _repeated(what: str, texts: _Texts) -> list[str]:
    """Texts of the sample that are in it more than once: in the whole data the share can only be larger."""
    whole = [texts.set_of(k).tobytes() for k in range(len(texts.lengths))]
    if (share := 1 - len(set(whole)) / len(whole)) < REPEATED:
        return []
    say = f"at least {share:.0%} of the {what} are repeated: they weigh more than the others, and in a batch of contrastive "
    say += "training a query's own answer is then a negative of its copy"
    return [_say(say, "keep each once, with all its positives", "duplicates")]


def _scores(data: FinetuneShards, rows: np.ndarray) -> list[str]:
    pos, neg = data.scores(rows)
    scored = [(p, n) for p, n in zip(pos.split(), neg.split(), strict=True) if len(p) and len(n)]
    if not scored or (share := np.mean([p.mean() < n.mean() for p, n in scored])) < REVERSED:
        return []
    what = f"in {share:.0%} of the scored groups the negatives have higher scores than the positives"
    return [_say(what, "check that scores are similarities, not distances, and in the order of the texts", "scores")]


def _prompts(manifest: Manifest) -> list[str]:
    query, passage = manifest.query_instruction_for_retrieval, manifest.passage_instruction_for_retrieval
    if not query or query != passage:
        return []
    what = f"queries and passages have the same instruction, {query!r}: it tells the model nothing"
    return [_say(what, "give queries their own, or leave it out", "instructions")]


def _cut(manifest: Manifest) -> list[str]:
    counts = manifest.counts
    if "cut_tokens" not in counts:
        return []
    if (share := counts["cut_tokens"] / max(1, counts["tokens"] + counts["cut_tokens"])) < CUT:
        return []
    what = f"{share:.0%} of all tokens are cut off ({counts['cut_texts']:,} texts are longer than the lengths allow)"
    return [_say(what, "raise --max_seq_length, --query_max_len or --passage_max_len, or split long texts", "cut-texts")]


def _unknown(manifest: Manifest) -> list[str]:
    counts = manifest.counts
    if (share := counts["unknown_tokens"] / max(1, counts["tokens"])) < UNKNOWN:
        return []
    what = f"{share:.0%} of all tokens are the unknown token: the tokenizer does not know these texts"
    return [_say(what, "take a model of their language", "unknown-tokens")]


def _drowned(manifest: Manifest) -> list[str]:
    rows = [last - first for first, last in (source.rows for source in manifest.sources)]
    total = sum(rows)
    small = [source.path for source, n in zip(manifest.sources, rows, strict=True) if n < DROWNED * total]
    if not small or max(rows) < (1 - 10 * DROWNED) * total:
        return []
    what = f"{small[0]} has less than {DROWNED:.0%} of the rows beside a set with {max(rows) / total:.0%}: it is hardly seen"
    return [_say(what, "give the sets as entries of --train_data with weights, or --mixing_temperature", "mixture")]


def _say(what: str, remedy: str, anchor: str) -> str:
    return f"{what}; {remedy} ({PAGE}#{anchor})"
