"""The plan of shards: what of a query's ids is compared with a passage's."""

from __future__ import annotations

import helpers
import pytest
from mine_runs import write_lines

from bge_ds import preprocess
from bge_ds.mining.plan import Plan
from bge_ds.mining.shards import Shards

TEXTS = ["memory mapped arrow shards", "the quick brown fox", "retrieval models", "one vector space"]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_query_is_compared_without_instructions(tmp_path, kind):
    """A query is known in the passage of its text whatever stands before either; groups of one text share their positives, also
    with prompts of their own, but not their vectors. A passage that merely begins with the query is another."""
    helpers.make_tokenizer(kind, tmp_path / "tokenizer")
    listed = [
        {"query": TEXTS[0], "pos": [TEXTS[1]], "neg": [f"{TEXTS[0]} {TEXTS[1]}", TEXTS[0]]},
        {"query": TEXTS[2], "pos": [TEXTS[3]], "neg": [TEXTS[0]]},
        {"query": TEXTS[0], "pos": [TEXTS[3]], "neg": [], "prompt": "the "},
        {"query": TEXTS[0], "pos": [TEXTS[2]], "neg": [], "prompt": ""},
    ]
    prompts = ("--query_instruction_for_retrieval", "models: ", "--passage_instruction_for_retrieval", "space ")
    words = ["finetune", "--input", write_lines(tmp_path / "g.jsonl", listed), "--output", tmp_path / "shards",
             "--tokenizer", tmp_path / "tokenizer", "--num_proc", 1, *prompts]  # fmt: skip
    assert preprocess.main([str(word) for word in words]) == 0
    counts = Shards([str(tmp_path / "shards")], str(tmp_path / "tokenizer"), tmp_path).write_plan(tmp_path, "models: ")
    assert counts == {"groups": 4, "queries": 4, "pool": 5, "passages": 5}
    plan = Plan(tmp_path)
    assert plan.query.tolist() == [0, 1, 0, 0] and plan.vector.tolist() == [0, 1, 2, 3]
    assert plan.own.tolist() == [2, 4]  # of the passages TEXTS[1], TEXTS[0] TEXTS[1], TEXTS[0], TEXTS[3], TEXTS[2]
    assert plan.positives_of(0).tolist() == [0, 3, 4] and plan.positives_of(1).tolist() == [3]


def test_passages_are_one_where_training_reads_the_same_ids(tmp_path):
    """Texts that differ behind the length that they are cut to have one vector, and would rank twice; folders of several
    lengths are compared at the shortest."""
    helpers.make_tokenizer("wordpiece", tmp_path / "tokenizer")
    for name, length in (("a", 6), ("b", 40)):
        listed = [{"query": TEXTS[2], "pos": [" ".join(TEXTS[1:])], "neg": [f"{TEXTS[1]} {TEXTS[k]}" for k in (0, 2)]}]
        words = ["finetune", "--input", write_lines(tmp_path / f"{name}.jsonl", listed), "--output", tmp_path / name,
                 "--tokenizer", tmp_path / "tokenizer", "--num_proc", 1, "--passage_max_len", length]  # fmt: skip
        assert preprocess.main([str(word) for word in words]) == 0
    for folders, passages in ((["a"], 1), (["b"], 3), (["b", "a"], 1)):
        given = Shards([str(tmp_path / name) for name in folders], str(tmp_path / "tokenizer"), tmp_path)
        assert given.write_plan(tmp_path, "")["passages"] == passages
        assert len(given.token_ids("passages", tmp_path).rows) == passages
