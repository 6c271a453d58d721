"""Arrow shards: what is written is read back as views of the map, and damage is found and named."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest

from bge_ds import preprocess
from bge_ds.data.files import hash_file
from bge_ds.data.preprocess import output_folder
from bge_ds.data.shards import integrity, manifest_file, memory_map, shard_reader, shard_writer

MADE_WITH = {"name": "t", "fingerprint": "f", "vocab_size": 300, "prefix_ids": [1], "suffix_ids": [2]}


def texts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 300, size=1 + row % 13) for row in range(count)]


def write_pretrain(folder, rows, segment_rows=1000, batch_bytes=shard_writer.BATCH_BYTES):
    """Rows of ids, with each id's position as its word, a few at a time as preprocessing does."""
    schema = shard_reader.schemas("pretrain", 300, 512)["texts"]
    with output_folder.new_folder(folder) as partial, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "BATCH_BYTES", batch_bytes)
        made = []
        for first in range(0, len(rows), segment_rows):
            table = shard_writer.TableWriter(partial, "texts", schema, 0, first // segment_rows)
            for start in range(first, min(first + segment_rows, len(rows)), 5):
                part = rows[start : min(start + 5, first + segment_rows)]
                lengths = np.array([len(ids) for ids in part])
                values = (np.concatenate(part), np.concatenate([np.arange(n) for n in lengths]))
                types = [kind.value_type for kind in schema.types]
                table.write([shard_reader.list_array(v, lengths, t) for v, t in zip(values, types, strict=True)])
            made += table.close()
        manifest = {"kind": "pretrain", "tokenizer": MADE_WITH, "max_seq_length": 512, "counts": {"texts": len(rows)}}
        manifest |= {"sources": [{"path": "a", "rows": [0, len(rows)]}], "shards": made}
        return manifest_file.write_manifest(partial, manifest)


@pytest.mark.core
@pytest.mark.parametrize(("segment_rows", "batch_bytes"), [(5, 1), (70, 500), (1000, 1), (1000, 1 << 20)])
def test_rows_come_back_over_shard_borders(tmp_path, segment_rows, batch_bytes):
    """Every row is found in its shard and record batch; an off-by-one at a border would give a neighbour's text."""
    rows = texts(203)
    manifest = write_pretrain(tmp_path / "s", rows, segment_rows, batch_bytes)
    assert len(manifest.shards) == {5: 41, 70: 3, 1000: 1}[segment_rows]
    data = shard_reader.open_folder(tmp_path / "s")
    assert len(data) == 203 and sum(entry.rows for entry in manifest.shards) == 203
    for row in [202, 0, *range(203)]:
        assert data.ids(row).dtype == np.uint16
        np.testing.assert_array_equal(data.ids(row), rows[row])
        np.testing.assert_array_equal(data.words(row), np.arange(len(rows[row])))
    for row in (-1, 203):
        with pytest.raises(IndexError, match=f"row {row} of table texts, which has 203 rows"):
            data.ids(row)


def test_a_row_is_a_view_of_the_mapped_file(tmp_path):
    """A read must not copy: the row is read-only, owns no memory, and two reads give the same address."""
    write_pretrain(tmp_path / "s", texts(20))
    data = shard_reader.open_folder(tmp_path / "s")
    row = data.ids(9)
    assert not row.flags.owndata and not row.flags.writeable
    assert row.__array_interface__["data"][0] == data.ids(9).__array_interface__["data"][0]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path / "s" / "texts-00000-000000.arrow") in maps.read_text()


@pytest.mark.parametrize(("segment_rows", "batch_bytes"), [(5, 1), (70, 500), (1000, 1), (1000, 1 << 20)])
def test_lengths_of_many_rows_at_once(tmp_path, segment_rows, batch_bytes):
    """Lengths come from offsets, over all borders, in the order asked: a wrong one would overfill a batch cut by tokens."""
    rows = texts(203)
    write_pretrain(tmp_path / "s", rows, segment_rows, batch_bytes)
    data = shard_reader.open_folder(tmp_path / "s")
    asked = np.random.default_rng(0).integers(0, 203, 500)
    found = data.lengths(asked)
    assert found.dtype == np.int64 and found.tolist() == [len(rows[row]) for row in asked]
    assert data.lengths(np.empty(0, np.int64)).tolist() == []
    for outside in (-1, 203):
        with pytest.raises(IndexError, match=r"table texts, which has 203 rows"):
            data.lengths(np.array([5, outside]))


def test_opening_reads_no_rows(tmp_path, monkeypatch):
    """Opening maps nothing, whatever the number of shards: a shard is looked at when a row of it is asked for."""
    write_pretrain(tmp_path / "s", texts(203), 5)

    def refuse(self, k):
        raise AssertionError("a shard's batches were read at opening")

    with monkeypatch.context() as patch:
        patch.setattr(memory_map.MappedTable, "_load", refuse)
        data = shard_reader.open_folder(tmp_path / "s")
        assert len(data) == 203
        with pytest.raises(AssertionError):
            data.ids(0)
    assert len(data.ids(0)) == 1


def test_a_pickled_reader_opens_the_folder_again(tmp_path):
    """A spawned loader worker gets the reader by pickle: it carries the path, not the data."""
    rows = texts(50)
    write_pretrain(tmp_path / "s", rows)
    sent = pickle.dumps(shard_reader.open_folder(tmp_path / "s"))
    assert len(sent) < 500
    np.testing.assert_array_equal(pickle.loads(sent).ids(49), rows[49])
    lengths = pickle.loads(pickle.dumps(shard_reader.open_folder(tmp_path / "s").lengths))  # what a `TokenBatchSampler` carries
    assert lengths(np.array([49])).tolist() == [len(rows[49])]


@pytest.mark.parametrize(("limit", "wanted"), [(1 << 16, pa.uint16()), ((1 << 16) + 1, pa.int32())])
def test_id_type_holds_the_largest_id(limit, wanted):
    """uint16 ends at 65,535: one vocabulary entry more must take int32, or ids would wrap around."""
    assert shard_reader.id_type(limit) == wanted
    values = np.array([limit - 1])
    assert shard_reader.list_array(values, np.array([1]), wanted).to_pylist() == [[limit - 1]]


def test_verify_finds_one_flipped_bit_and_names_the_shard(tmp_path):
    """A flipped bit in a buffer changes a token and nothing else: only the hash shows it."""
    write_pretrain(tmp_path / "s", texts(203), 70)
    assert integrity.verify_folder(tmp_path / "s") == []
    path = tmp_path / "s" / "texts-00000-000001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    shard_reader.open_folder(tmp_path / "s")
    (problem,) = integrity.verify_folder(tmp_path / "s")
    assert "texts-00000-000001.arrow: corrupted shard, hash" in problem


def test_verify_finds_any_flipped_byte(tmp_path):
    """Schema, offsets, values, padding, end mark: whichever byte is another one, the shard is named and not read."""
    write_pretrain(tmp_path / "s", texts(40), 20)
    path = tmp_path / "s" / "texts-00000-000001.arrow"
    whole = path.read_bytes()
    for at in [*range(0, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        (problem,) = integrity.verify_folder(tmp_path / "s")
        assert "texts-00000-000001.arrow: corrupted shard" in problem
    path.write_bytes(whole)
    assert integrity.verify_folder(tmp_path / "s") == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"texts-00000-000000\.arrow is missing"),
        ("cut", r"texts-00000-000000\.arrow: corrupted shard, \d+ bytes, the manifest says"),
        ("columns", r"texts-00000-000000\.arrow: corrupted shard, hash"),
        ({"schema_version": 1}, r"manifest\.json: schema version 1; this bge_ds reads 2"),
    ],
)
def test_verify_names_what_is_damaged(tmp_path, how, message, capsys):
    """The command ends with status 2 and names the file; the other shards are still looked at."""
    write_pretrain(tmp_path / "s", texts(40), 20)
    damage(tmp_path / "s", how)
    assert preprocess.main(["verify", str(tmp_path / "s")]) == 2
    assert re.search(message, capsys.readouterr().err)
    if isinstance(how, str):
        assert any("texts-00000-000000" in problem for problem in integrity.verify_folder(tmp_path / "s"))


def test_a_shard_of_other_columns_is_named_though_its_hash_is_right(tmp_path):
    """A shard of another schema version under a manifest that was mended by hand: named, and no row of it is read."""
    write_pretrain(tmp_path / "s", texts(40), 20)
    damage(tmp_path / "s", "columns")
    path = tmp_path / "s" / manifest_file.MANIFEST
    known = orjson.loads(path.read_bytes())
    known["shards"][0]["hash"] = hash_file(tmp_path / "s" / "texts-00000-000000.arrow")
    path.write_bytes(orjson.dumps(known | {"fingerprint": manifest_file.fingerprint(known)}))
    assert any("texts-00000-000000.arrow: its columns are" in problem for problem in integrity.verify_folder(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"texts-00000-000000\.arrow: its columns are"):
        shard_reader.open_folder(tmp_path / "s").ids(0)


@pytest.mark.parametrize(("segment_rows", "batch_bytes"), [(70, 500), (1000, 1 << 20)])
def test_lengths_are_counted_without_reading_values(tmp_path, monkeypatch, segment_rows, batch_bytes):
    """The counts over all shards and record batches are those of the rows, and come from offsets alone."""
    rows = texts(203)
    write_pretrain(tmp_path / "s", rows, segment_rows, batch_bytes)
    data = shard_reader.open_folder(tmp_path / "s")
    monkeypatch.setattr(memory_map.Shard, "column", None)  # through which values are read
    assert data.length_counts("texts", "ids").tolist() == np.bincount([len(ids) for ids in rows]).tolist()


def test_verify_finds_an_edited_manifest_and_a_stray_shard(tmp_path):
    """The fingerprint covers the manifest's own claims; a shard left from elsewhere is no part of the data."""
    write_pretrain(tmp_path / "s", texts(20))
    path = tmp_path / "s" / manifest_file.MANIFEST
    manifest = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps(manifest | {"max_seq_length": 128}))
    (tmp_path / "s" / "texts-00009.arrow").write_bytes(b"x")
    edited, stray = integrity.verify_folder(tmp_path / "s")
    assert "it was edited" in edited and "texts-00009.arrow: the manifest does not name this shard" in stray


def test_fingerprint_ignores_names_and_keeps_content(tmp_path):
    """The same rows from a renamed file and a moved tokenizer resume each other's runs; other rows never do."""
    one = write_pretrain(tmp_path / "a", texts(20))
    known = orjson.loads((tmp_path / "a" / manifest_file.MANIFEST).read_bytes())
    renamed = known | {"sources": [{"path": "b", "rows": [0, 20]}], "bge_ds_version": "9"}
    renamed["tokenizer"] = known["tokenizer"] | {"name": "elsewhere"}
    assert manifest_file.fingerprint(renamed) == one.fingerprint == manifest_file.fingerprint(one)
    assert write_pretrain(tmp_path / "c", texts(21)).fingerprint != one.fingerprint
    assert manifest_file.fingerprint(known | {"tokenizer": MADE_WITH | {"fingerprint": "g"}}) != one.fingerprint


def damage(folder, how):
    shard, manifest = folder / "texts-00000-000000.arrow", folder / manifest_file.MANIFEST
    if how == "missing":
        shard.unlink()
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "schema":
        shard.write_bytes(b"?" * 64 + shard.read_bytes()[64:])
    elif how == "columns":
        table = pa.table({"ids": pa.array([[1]], pa.list_(pa.uint16()))})
        with pa.ipc.new_stream(str(shard), table.schema) as writer:
            writer.write_table(table)
        known = orjson.loads(manifest.read_bytes())
        known["shards"][0]["bytes"] = shard.stat().st_size
        manifest.write_bytes(orjson.dumps(known | {"fingerprint": manifest_file.fingerprint(known)}))
    elif how == "no manifest":
        manifest.unlink()
    elif how == "not json":
        manifest.write_bytes(b"{")
    else:
        manifest.write_bytes(orjson.dumps(orjson.loads(manifest.read_bytes()) | how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"texts-00000-000000\.arrow is missing"),
        ("cut", r"texts-00000-000000\.arrow: corrupted shard, \d+ bytes, the manifest says"),
        ("schema", r"texts-00000-000000\.arrow: corrupted shard, no readable Arrow schema"),
        ("columns", r"texts-00000-000000\.arrow: its columns are"),
        ("no manifest", r"is not a folder of shards: it has no manifest\.json"),
        ("not json", r"manifest\.json: not JSON"),
        ({"schema_version": 1}, r"schema version 1; this bge_ds reads 2"),
        ({"kind": "mine"}, r"kind 'mine' is none of pretrain, finetune"),
    ],
)
def test_opening_damaged_shards_names_the_culprit(tmp_path, how, message):
    """Training must not start on a folder that is cut short or foreign; the error says which file it is."""
    write_pretrain(tmp_path / "s", texts(20))
    damage(tmp_path / "s", how)
    if how in ("schema", "columns"):
        data = shard_reader.open_folder(tmp_path / "s")
        assert integrity.verify_folder(tmp_path / "s")
        with pytest.raises(ValueError, match=message):
            data.ids(0)
    else:
        with pytest.raises(ValueError, match=message):
            shard_reader.open_folder(tmp_path / "s")


def test_maps_are_let_go_while_their_rows_are_kept(tmp_path, monkeypatch):
    """Thousands of shards may not keep thousands of files open or maps alive; a row that is held stays valid all the same."""
    monkeypatch.setattr(memory_map, "MAPPED", 3)
    rows = texts(203)
    write_pretrain(tmp_path / "s", rows, 5)
    data = shard_reader.open_folder(tmp_path / "s")
    held = [data.ids(row) for row in range(203)]
    assert len(data._tables["texts"]._shards) == 3
    for found, wanted in zip(held, rows, strict=True):
        np.testing.assert_array_equal(found, wanted)
    opened = Path("/proc/self/fd")
    if opened.exists():
        names = [os.readlink(path) for path in opened.iterdir() if path.exists()]
        assert not any(name.endswith(".arrow") for name in names), "a shard's file is still open"


@pytest.mark.core
def test_groups_point_to_passages_and_keep_missing_scores_apart(tmp_path):
    """Absent scores are None, not an empty list: a group without negatives can still have scores of its own."""
    fields = shard_reader.schemas("finetune", 70000)
    with output_folder.new_folder(tmp_path / "s") as partial:
        writers = {name: shard_writer.TableWriter(partial, name, schema, 3, 7) for name, schema in fields.items()}
        lengths = np.array([2, 1, 3])
        ids = shard_reader.list_array(np.array([1, 69999, 3, 4, 5, 6]), lengths, pa.int32())
        writers["passages"].write([ids, pa.array(np.array([2**64 - 1, 8, 9], np.uint64))])
        rows = [[[5], [6, 7]], [[0, 2], [1]], [[1, 2], []], [[0.5, 1.0], None], [None, []]]
        rows += [["sym", None], [None, "p: "]]
        writers["groups"].write([pa.array(v, t) for v, t in zip(rows, fields["groups"].types, strict=True)])
        made = [entry for writer in writers.values() for entry in writer.close()]
        manifest = {"kind": "finetune", "tokenizer": MADE_WITH | {"vocab_size": 70000}, "counts": {}, "sources": []}
        manifest_file.write_manifest(partial, manifest | {"shards": made})
    data = shard_reader.open_folder(tmp_path / "s")
    assert (tmp_path / "s" / "groups-00003-000007.arrow").exists()
    first, second = data.group(0), data.group(1)
    assert (first.query.tolist(), first.pos.tolist(), first.neg.tolist()) == ([5], [0, 2], [1, 2])
    assert first.pos_scores.tolist() == [0.5, 1.0] and first.neg_scores is None
    assert second.pos_scores is None and second.neg_scores.tolist() == [] and second.neg.dtype == np.int64
    assert data.notes(0) == ("sym", None) and data.notes(1) == (None, "p: ")
    assert data.num_passages == 3 and data.passage(0).tolist() == [1, 69999]
    hashes = data.hashes(np.array([[2, 0], [1, 2]]))
    assert hashes.dtype == np.uint64 and hashes.tolist() == [[9, 2**64 - 1], [8, 9]]
