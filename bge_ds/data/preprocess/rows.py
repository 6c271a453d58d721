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
    earlier block of the segment. passage_cuts: bool, whether each sent one was cut."""

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
    cuts: int  # texts that were cut, those of `passage_cuts` aside
    rows: TextRows | PassageRows | GroupRows


class SegmentRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a finished segment; all counts are of the segment alone."""

    files: list[ShardEntry]
    rows: Count
    lines: Count
    skipped: Count
    first: Count | None  # its first good line
    tokens: Count
    unknown_tokens: Count
    cut_texts: Count
    passages: Count | msgspec.UnsetType = msgspec.UNSET  # distinct ones; of groups that hold texts, like the next
    only_passage: str | msgspec.UnsetType | None = msgspec.UNSET  # the hash of the only passage
    named: Count | msgspec.UnsetType = msgspec.UNSET  # passages that groups name; of groups, like the next
    alone: Count | msgspec.UnsetType = msgspec.UNSET  # groups without negatives


class SkippedLine(msgspec.Struct, frozen=True):
    """A skipped line, numbered within its segment from 0."""

    line: Count
    reason: str
