"""The output: the lines of the input with other negatives, plain or compressed by the name's ending."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from bge_ds.checkpoint import filesystem
from bge_ds.data.preprocess.input_files import Source
from bge_ds.mining.plan import as_line, groups_of

_PACKED = {".gz": "gzip", ".zst": "zstd"}


def write_lines(path: Path, name: str, sources: list[Source], negatives: Iterator[list[str]]) -> int:
    """Writes the file at `path` that is to be called `name`; returns how many lines lost `neg_scores`, which fit the old ones.

    negatives: of each group in the order of the input.
    """
    lost = 0
    with pa.output_stream(str(path), compression=_PACKED.get(Path(name).suffix), buffer_size=1 << 20) as out:
        for group, texts in zip(groups_of(sources), negatives, strict=True):
            group["neg"] = texts
            lost += group.pop("neg_scores", None) is not None
            out.write(as_line(group))
    filesystem.sync_one(path)
    return lost
