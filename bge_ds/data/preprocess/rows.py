"""What worker processes send to the writer, and the record that the writer leaves of each finished segment."""

from __future__ import annotations

import msgspec
import numpy as np

from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.shards.manifest_file import Count, ShardEntry


class TextRows(msgspec.Struct):
    """Texts of pre-training. words: of each token, the word (0, 1, 2, ...) of its text that it belongs to."""

    ids: RaggedArrays
    words: np.ndarray


class PassageRows(msgspec.Struct):
    """Passages. hashes: uint64, xxh3_64 of each raw text."""

    ids: RaggedArrays
    hashes: np.ndarray


class GroupRows(msgspec.Struct):
    """Groups: their queries, and the columns pos, neg, pos_scores, neg_scores, type and prompt.

    With a corpus, pos and neg are rows of it. Without one they are numbers of the passages that this block names:
    keys: the 128-bit hash of each. sent: bool, whether it comes with this block, in `passages`; the others came with an
    earlier block of the segment. passage_cuts: int64, tokens cut off each sent one."""

    queries: RaggedArrays
    columns: list[tuple]
    keys: list[bytes] | None = None
    sent: np.ndarray | None = None
    passages: PassageRows | None = None
    passage_cuts: np.ndarray | None = None


class BlockRows(msgspec.Struct):
    """The rows of one block of lines. first: the first good line; bad: (line, reason); lines count from 0 in the segment."""

    good: int
    bad: list[tuple[int, str]]
    first: int | None
    lines: int
    cuts: np.ndarray  # int64, tokens cut off each text, those of `passage_cuts` aside
    rows: TextRows | PassageRows | GroupRows


class SegmentRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a finished segment, by itself."""

    files: list[ShardEntry]
    rows: Count
    lines: Count
    skipped: list[tuple[Count, str]] = []  # (line of the segment from 0, reason)
    first: Count | None  # its first good line
    only_passage: str | None = None  # the hash of the only passage of groups that hold texts
    # tokens, unknown_tokens, cut_texts, cut_tokens; passages: distinct ones; named: passages that groups name; alone: groups
    # without negatives.
    counts: dict[str, Count]
