"""Shards are plain Arrow streams: `datasets` and `pyarrow` open them without bge_ds, as docs/data.md shows."""

from __future__ import annotations

import json

import helpers
import numpy as np
import pyarrow
import pytest

from bge_ds import preprocess
from bge_ds.data.shards import shard_reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer_path):
    place = tmp_path_factory.mktemp("elsewhere")
    rows = [{"query": "fox", "pos": [text], "neg": helpers.SENTENCES[:2]} for text in helpers.SENTENCES]
    (place / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["finetune", "--input", str(place / "a.jsonl"), "--output", str(place / "s"), "--tokenizer"]
    assert preprocess.main([*argv, str(tiny_tokenizer_path)]) == 0
    return place / "s"


def open_by(library: str, path) -> list[dict]:
    if library == "datasets":
        datasets = pytest.importorskip("datasets")
        return datasets.Dataset.from_file(str(path)).to_list()
    with pyarrow.memory_map(str(path)) as file:
        return pyarrow.ipc.open_stream(file).read_all().to_pylist()


@pytest.mark.parametrize("library", ["datasets", "pyarrow"])
def test_others_read_the_same_rows(folder, library):
    """What docs/data.md promises: every passage, hash and group, by the files that the manifest lists."""
    data = shard_reader.open_folder(folder)
    files = {entry.table: folder / entry.file for entry in data.manifest.shards}
    passages, groups = open_by(library, files["passages"]), open_by(library, files["groups"])
    assert [row["ids"] for row in passages] == [data.passage(row).tolist() for row in range(data.num_passages)]
    assert [row["hash"] for row in passages] == data.hashes(np.arange(data.num_passages)).tolist()
    for row, found in enumerate(groups):
        group = data.group(row)
        lists = [group.query.tolist(), group.pos.tolist(), group.neg.tolist()]
        assert [found["query"], found["pos"], found["neg"]] == lists and found["pos_scores"] is None
