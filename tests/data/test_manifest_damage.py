"""A damaged manifest, part or record is a ValueError that names its file, and no changed value is read silently."""

import json
import random

import msgspec
import pytest
from damage import damaged

from bge_ds import preprocess
from bge_ds.data.preprocess import segment_writer
from bge_ds.data.shards import manifest_file, shard_reader

LINES = [{"query": f"question {i}", "pos": [f"answer {i}"], "neg": [f"other {i}", "none"]} for i in range(40)]
SAME_ROWS = ("bge_ds_version", "path", "name", "lines", "skipped")  # what the fingerprint leaves out, as it decides no row


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer_path):
    base = tmp_path_factory.mktemp("made")
    (base / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    given = ["finetune", "--input", str(base / "in.jsonl"), "--tokenizer", str(tiny_tokenizer_path), "--shard_bytes", "1000"]
    assert preprocess.main([*given, "--output", str(base / "whole")]) == 0
    assert preprocess.main([*given, "--output", str(base / "part"), "--partition", "1/2"]) == 0
    return base


def test_300_damages_of_a_manifest_are_refused_or_change_no_row(made):
    """No damage is a traceback of another kind, and what opens has every row, count and shard as written."""
    path = made / "whole" / manifest_file.MANIFEST
    content, whole = path.read_bytes(), manifest_file.read_manifest(made / "whole")
    assert len(whole.shards) > 4
    refused = 0
    try:
        for seed in range(300):
            spoiled, key = damaged(content, random.Random(seed))
            path.write_bytes(spoiled)
            try:
                opened = shard_reader.open_folder(made / "whole").manifest
            except ValueError as error:
                assert str(path) in str(error) and "preprocess again" in str(error), (seed, error)
                refused += 1
                continue
            same = {name: getattr(whole, name) for name in ("bge_ds_version", "tokenizer", "sources")}
            assert msgspec.structs.replace(opened, **same) == whole, (seed, key)
            assert [source.rows for source in opened.sources] == [source.rows for source in whole.sources]
            assert msgspec.structs.replace(opened.tokenizer, name=whole.tokenizer.name) == whole.tokenizer
    finally:
        path.write_bytes(content)
    assert refused > 200


def test_an_error_names_the_field(made):
    """The message says where in the file the value lies and what belongs there."""
    path = made / "whole" / manifest_file.MANIFEST
    content = path.read_bytes()
    known = json.loads(content)
    known["shards"][1]["rows"] = "3"
    try:
        path.write_bytes(json.dumps(known).encode())
        with pytest.raises(ValueError, match=r"manifest\.json: Expected `int`, got `str` - at `\$\.shards\[1\]\.rows`"):
            manifest_file.read_manifest(made / "whole")
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("of", ["part", "record"])
def test_damages_of_a_part_and_its_records_are_value_errors(made, of):
    """A merge names the damaged file; a run that goes on makes a segment with a damaged record again."""
    folder = made / "part"
    path = folder / manifest_file.PART if of == "part" else sorted((folder / "segments").glob("rows-*-*.json"))[0]
    content = path.read_bytes()
    number = int(path.stem[-6:]) if of == "record" else 0
    try:
        for seed in range(150):
            path.write_bytes(damaged(content, random.Random(seed))[0])
            try:
                if of == "part":
                    manifest_file.read_part(folder)
                else:
                    segment_writer.finished(folder, "rows", 0)
                    segment_writer.read_record(folder, "rows", 0, number)
            except ValueError as error:
                assert str(path) in str(error) and "again" in str(error), (seed, error)
    finally:
        path.write_bytes(content)
