"""The groups that are scored, and what scores make of them: a line of JSON goes in, the same line with scores comes out.

Lines are read as `encoding.inputs` reads texts: checked and counted once, then from the first of any block on.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import orjson

from bge_ds.data.preprocess import table_files, validate
from bge_ds.data.preprocess.input_files import LineReader, Source
from bge_ds.encoding.inputs import TextInput
from bge_ds.encoding.manifest import Start

FIELDS = ("query", "pos", "neg")
SIDES = ("pos", "neg")
Group = dict[str, Any]  # a checked line with all its keys


class GroupInput(TextInput):
    """The groups of files of JSON lines, of tables and of hub data sets, with all their keys."""

    def __init__(self, paths: list[str], columns: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(paths, columns)
        self._wanted = ()  # every column

    def groups(self, start: Start, count: int) -> list[Group]:
        """`count` groups from one on. Raises ValueError where the input has become shorter."""
        found = [orjson.loads(line) for _, line in self.texts(start, count)]
        if len(found) < count:
            raise ValueError(f"{self.sources[-1].name} has become shorter since it was checked: run the same command again")
        return found

    def _read(self, line: bytes | dict[str, Any]) -> tuple[None, str]:
        """(None, the checked group as JSON)."""
        group = _checked(validate.parse_object(line) if isinstance(line, bytes) else line, self.columns)
        try:
            return None, orjson.dumps(group).decode()
        except orjson.JSONEncodeError as error:  # of columns that JSON has no form for
            raise ValueError(str(error)) from None

    def _open(self, index: int, source: Source) -> LineReader | table_files.InputTable:
        opened = super()._open(index, source)
        if isinstance(opened, table_files.InputTable):
            opened.columns = list(opened.names)
        return opened


def _checked(group: Group, columns: tuple[tuple[str, str], ...]) -> Group:
    """The group under our names. Scores that it has are not looked at: they are replaced."""
    if columns:
        group = validate.rename(group, columns)
    if "pos_ids" in group and "pos" not in group:
        raise ValueError('"pos_ids" names passages of a corpus, and a teacher reads texts: give them as "pos" and "neg"')
    bare = {key: value for key, value in group.items() if key not in ("pos_scores", "neg_scores")}
    validate.check(bare, "finetune")
    if not isinstance(group.get("neg"), list):
        group["neg"] = []
    return group


def passages_of(groups: list[Group]) -> tuple[list[str], np.ndarray]:
    """(the passages of all groups, each group's positives before its negatives; int64, the group of each)."""
    counts = [len(group["pos"]) + len(group["neg"]) for group in groups]
    return [text for group in groups for side in SIDES for text in group[side]], np.repeat(np.arange(len(groups)), counts)


def scored(
    groups: list[Group], scores: np.ndarray, min_pos_score: float | None, max_neg_score: float | None
) -> tuple[list[Group], dict[str, int]]:
    """(the groups with `pos_scores` and `neg_scores` in place, counts). scores: fp32, in the order of `passages_of`.

    A positive below min_pos_score and a negative above max_neg_score are dropped, with their entries of lists beside them, such
    as `pos_id`; a group without positives is dropped as a whole.
    """
    limits = {"pos": (-math.inf if min_pos_score is None else min_pos_score, math.inf),
              "neg": (-math.inf, math.inf if max_neg_score is None else max_neg_score)}  # fmt: skip
    kept: list[Group] = []
    dropped = Counter({"groups_dropped": 0, "pos_dropped": 0, "neg_dropped": 0, "groups_without_neg": 0})
    # The shortest decimals that are read as the same fp32.
    values = iter([float(str(score)) for score in scores])
    for group in groups:
        had_neg = bool(group["neg"])
        for side in SIDES:
            listed = [next(values) for _ in group[side]]
            group[f"{side}_scores"] = listed
            low, high = limits[side]
            good = [low <= score <= high for score in listed]
            dropped[f"{side}_dropped"] += good.count(False)
            if False in good:
                _keep(group, side, good)
        if not group["pos"]:
            dropped["groups_dropped"] += 1
            continue
        dropped["groups_without_neg"] += had_neg and not group["neg"]
        kept.append(group)
    return kept, {"groups": len(groups), "pairs": len(scores), **dropped}


def _keep(group: Group, side: str, good: list[bool]) -> None:
    """Takes what is not good out of a side's texts and of every list beside them."""
    for key, value in group.items():
        if (key == side or key.startswith(f"{side}_")) and isinstance(value, list) and len(value) == len(good):
            group[key] = [entry for entry, is_good in zip(value, good, strict=True) if is_good]
