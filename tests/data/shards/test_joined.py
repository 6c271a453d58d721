"""Several folders of shards as one reader: it must answer as if they had been made in one go."""

from __future__ import annotations

import json
import pickle

import helpers
import numpy as np
import pytest

from bge_ds import preprocess
from bge_ds.data.shards import shard_reader

TEXTS = [" ".join(np.random.default_rng(i).choice(" ".join(helpers.SENTENCES).split(), 2 + i % 9)) for i in range(40)]


def make(folder, kind, tokenizer, rows, *more):
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [kind, "--input", source, "--output", folder, "--tokenizer", tokenizer, "--num_proc", 1, *more]
    assert preprocess.main(list(map(str, flags))) == 0
    return folder


@pytest.fixture
def groups(tmp_path, tiny_tokenizer_path):
    """Three folders of groups that share no passage, and one of all their groups."""
    rows = [{"query": TEXTS[i], "pos": [f"{TEXTS[i]} {i}"], "neg": [f"{TEXTS[-i]} not {i}", f"{i}"]} for i in range(12)]
    rows[10]["pos_scores"], rows[10]["neg_scores"] = [1.0], [0.5, 0.25]
    parts = [
        make(tmp_path / f"part{k}", "finetune", tiny_tokenizer_path, rows[a:b])
        for k, (a, b) in enumerate([(0, 5), (5, 6), (6, 12)])
    ]
    return parts, make(tmp_path / "all", "finetune", tiny_tokenizer_path, rows)


def test_groups_are_read_as_if_made_as_one(groups):
    """Rows, passages, hashes, lengths and counts run on from folder to folder, in another process too."""
    parts, together = groups
    whole = shard_reader.open_folder(together)
    for data in (shard_reader.open_folders(parts), pickle.loads(pickle.dumps(shard_reader.open_folders(parts)))):
        assert len(data) == 12 and data.num_passages == whole.num_passages
        assert data.manifest.counts == whole.manifest.counts
        assert [source.rows for source in data.manifest.sources] == [(0, 5), (5, 6), (6, 12)]
        for row in range(12):
            ours, theirs = data.group(row), whole.group(row)
            assert ours.query.tolist() == theirs.query.tolist()
            for mine, other in ((ours.pos, theirs.pos), (ours.neg, theirs.neg)):
                assert [data.passage(p).tolist() for p in mine] == [whole.passage(p).tolist() for p in other]
                assert data.hashes(mine).tolist() == whole.hashes(other).tolist()
            assert data.notes(row) == whole.notes(row)
        asked = np.random.default_rng(0).integers(0, 12, 50)
        assert data.lengths(asked, 6, 9).tolist() == whole.lengths(asked, 6, 9).tolist()
        assert data.hashes(np.array([[data.num_passages - 1, 0]])).shape == (1, 2)
        assert data.scored() == [(0, 0), (0, 5), (1, 6)] and whole.scored() == [(1, 0)]
    for wrong in (-1, 12):
        with pytest.raises(IndexError):
            data.group(wrong)


def test_lengths_are_those_of_query_and_first_positive(groups):
    """Grouping by length rests on offsets; they must say what the rows hold, each cut to its own length."""
    data = shard_reader.open_folder(groups[1])
    expected = [min(30, len(g.query)) + min(34, len(data.passage(g.pos[0]))) for g in map(data.group, range(12))]
    assert data.lengths(np.arange(12), 30, 34).tolist() == expected and len(set(expected)) > 3


def test_a_fingerprint_holds_every_folder_and_their_order(groups):
    """A resumed run must be refused where a folder is missing or stands elsewhere: its rows would be others."""
    parts, _ = groups
    made = [shard_reader.open_folders(given).fingerprint for given in (parts, parts[::-1], parts[:2], parts)]
    assert made[0] == made[3] and len(set(made)) == 3
    assert shard_reader.open_folders(parts[:1]).fingerprint == shard_reader.open_folder(parts[0]).fingerprint


def test_texts_and_the_smallest_length(tmp_path, tiny_tokenizer_path):
    """Pre-training shards join as well; the run may use no more tokens than the shortest cut left."""
    first = make(tmp_path / "a", "pretrain", tiny_tokenizer_path, [{"text": t} for t in TEXTS[:7]], "--max_seq_length", 20)
    second = make(tmp_path / "b", "pretrain", tiny_tokenizer_path, [{"text": t} for t in TEXTS[7:]], "--max_seq_length", 12)
    data, second = shard_reader.open_folders([first, second]), shard_reader.open_folder(second)
    assert data.manifest.max_seq_length == 12 and len(data) == 40
    assert data.ids(8).tolist() == second.ids(1).tolist() and data.words(39).tolist() == second.words(32).tolist()
    assert data.lengths(np.array([39, 7])).tolist() == second.lengths(np.array([32, 0])).tolist()


def test_differing_instructions_have_no_common_one(tmp_path, tiny_tokenizer_path):
    rows = [{"query": "q", "pos": ["p"], "neg": ["n"]}]
    flag = "--query_instruction_for_retrieval"
    made = [
        make(tmp_path / f"s{i}", "finetune", tiny_tokenizer_path, rows, flag, text) for i, text in enumerate(["a: ", "b: "])
    ]
    manifest = shard_reader.open_folders(made).manifest
    assert manifest.query_instruction_for_retrieval is None and manifest.passage_instruction_for_retrieval == ""


def test_folders_that_do_not_fit_are_refused(tmp_path, groups, tiny_tokenizer_path, minilm_path):
    """Another kind or tokenizer would be read as nonsense."""
    texts = make(tmp_path / "texts", "pretrain", tiny_tokenizer_path, [{"text": "a"}])
    with pytest.raises(ValueError, match=r"part0 and .*texts do not go together, each has a kind of its own"):
        shard_reader.open_folders([groups[0][0], texts])
    other = make(tmp_path / "other", "finetune", minilm_path, [{"query": "q", "pos": ["p"], "neg": ["n"]}])
    with pytest.raises(ValueError, match=r"part0 and .*other do not go together, each has a tokenizer of its own"):
        shard_reader.open_folders([groups[0][0], other])
