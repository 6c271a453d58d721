"""The reader of vectors: rows across blocks, in numpy and in datasets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import msgspec
import numpy as np
import pytest
import torch

from bge_ds.encoding import output
from bge_ds.encoding.manifest import InputEntry, Job, Settings
from bge_ds.encoding.vectors import Vectors, open_vectors

ROWS, DIM, BLOCK = 23, 5, 4
VECTORS = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
IDS = [f"é{i}" for i in range(ROWS)]


def made(folder: Path, dtype: str = "float32", has_ids: bool = True) -> Vectors:
    settings = Settings(
        model="m", model_hash="h", side="passage", prompt="", max_len=9, pooling="cls", normalize=False, bf16=False, dim=DIM,
        dtype=dtype,
    )  # fmt: skip
    entry = InputEntry(fingerprint="f", identity=[], sources=[], texts=ROWS, has_ids=has_ids)
    job = Job(bge_ds_version="0", settings=settings, input=entry, block_texts=BLOCK)
    (folder / "blocks").mkdir(parents=True)
    (folder / "job.json").write_bytes(msgspec.json.encode(job))
    for block in range(job.num_blocks):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        output.write_block(folder, job, block, VECTORS[rows], IDS[rows] if has_ids else None, 3)
    assert output.finish(folder, job).counts["tokens"] == 18
    return open_vectors(folder)


def test_rows_across_blocks(tmp_path):
    """One row, a slice, a list with repetitions and negative rows give what the whole array gives."""
    vectors = made(tmp_path / "v")
    assert len(vectors) == ROWS and vectors.shape == (ROWS, DIM)
    for rows in (0, 22, -1, slice(None), slice(3, 9), slice(20, 2, -3), [5, 0, 5, 22], np.array([-23, 7]), [], slice(4, 4)):
        expected = VECTORS[np.array(rows, int)] if isinstance(rows, list) else VECTORS[rows]
        found = vectors[rows]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    for row in (23, -24, [0, 99]):
        with pytest.raises(IndexError, match="from 0 to 22"):
            vectors[row]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_blocks_and_rows_agree_in_every_type(tmp_path, dtype):
    """Blocks are float32 arrays in the order of the rows, which an index takes one after the other."""
    vectors = made(tmp_path / "v", dtype)
    blocks = list(vectors.blocks())
    assert [first for first, _ in blocks] == [0, 4, 8, 12, 16, 20]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), vectors[:])
    assert all(block.dtype == np.float32 and block.flags["C_CONTIGUOUS"] for _, block in blocks)
    rounded = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32)
    expected = torch.from_numpy(VECTORS).to(rounded).float().numpy()
    np.testing.assert_allclose(vectors[:], expected, rtol=0, atol=0.02 if dtype == "int8" else 0)


def test_it_opens_in_datasets(tmp_path):
    """The Arrow table is a data set whose rows are the ids and the vectors, shared with the mapped files."""
    data = datasets.Dataset(made(tmp_path / "v").table()).with_format("numpy")
    assert data.column_names == ["_id", "vector"] and len(data) == ROWS
    np.testing.assert_array_equal(data[17]["vector"], VECTORS[17])
    assert data[17]["_id"] == "é17"
    int8 = made(tmp_path / "int8", "int8", has_ids=False)
    data = datasets.Dataset(int8.table()).with_format("numpy")
    assert data.column_names == ["vector", "scale"]
    np.testing.assert_allclose(data[9]["vector"] * data[9]["scale"], VECTORS[9], atol=0.02)
    assert int8.ids is None


def test_what_is_no_folder_of_vectors_is_refused(tmp_path):
    """An unfinished folder, one without a manifest, one of shards and one whose manifest was edited are each named."""
    made(tmp_path / "v")
    manifest = json.loads((tmp_path / "v/manifest.json").read_text())
    for name, content, expected in (
        ("job.json", manifest, "is unfinished: run the same command again"),
        ("other.json", {}, "is not a folder of vectors: it has no manifest.json"),
        ("manifest.json", {"kind": "finetune", "schema_version": 2}, "is not that of vectors"),
        ("manifest.json", manifest | {"schema_version": 7}, "schema version 7; this bge_ds reads 1"),
        ("manifest.json", manifest | {"block_texts": 5}, "it was edited or damaged"),
        ("manifest.json", manifest | {"block_texts": "4"}, "block_texts"),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=expected):
            open_vectors(folder)


def test_a_vector_that_is_not_finite_is_named(tmp_path):
    """NaN in an index makes a passage unfindable without a word."""
    vectors = made(tmp_path / "v")
    job = Job(**{name: getattr(vectors.manifest, name) for name in Job.__struct_fields__})
    bad = VECTORS[:4].copy()
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="the vector of text 10 "):
        output.write_block(tmp_path / "v", job, 2, bad, None, 3)


def test_a_rank_that_lists_its_blocks_late_has_none_left(tmp_path):
    """The manifest takes the place of the blocks' records: a rank that looks for them after it must not encode again."""
    made(tmp_path / "v")
    assert not list((tmp_path / "v").glob("blocks/*")) and output.unfinished(tmp_path / "v", range(6)) == []
