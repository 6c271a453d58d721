"""The plan: which texts are one, in which order, and whose positives they are."""

from __future__ import annotations

from mine_runs import PASSAGES, groups, write_lines

from bge_ds.mining.lines import Lines, stored_texts
from bge_ds.mining.plan import Plan, distinct


def test_rows_of_digests_are_numbered_by_first_occurrence():
    """Equal digests share a row; both halves of a digest count."""
    made = [bytes([a] * 8 + [b] * 8) for a, b in ((9, 0), (1, 0), (9, 0), (9, 1), (1, 0), (0, 0))]
    rows, firsts = distinct(b"".join(made))
    assert rows.tolist() == [0, 1, 0, 2, 1, 3]
    assert firsts.tolist() == [True, True, False, True, False, True]


def test_positives_are_those_of_all_lines_of_a_query(tmp_path):
    """A query in two lines has the positives of both; texts are told apart without the white space around them; passages
    come in the order of the input, with those outside of a candidate pool behind it."""
    source = [str(write_lines(tmp_path / "g.jsonl", groups()))]
    pool = [str(write_lines(tmp_path / "p.jsonl", [{"text": PASSAGES[k]} for k in (30, 3, 30, 20)]))]
    for given in (None, pool):
        counts = Lines(source, given, tmp_path).write_plan(tmp_path, "find: ")
        plan, text_of = Plan(tmp_path), stored_texts(tmp_path)
        listed = groups()
        texts = [text for group in listed for text in group["pos"] + (group.get("neg", []) if given is None else [])]
        expected = list(
            dict.fromkeys(text.strip() for text in [*([PASSAGES[k] for k in (30, 3, 20)] if given else []), *texts])
        )
        assert [text_of(k).strip() for k in range(counts["passages"])] == expected
        assert counts == {"groups": 20, "queries": 19, "pool": 3 if given else len(expected), "passages": len(expected)}
        for number, group in enumerate(listed):
            same = [other for other in listed if other["query"] == group["query"]]
            wanted = {text for other in same for text in other["pos"]}
            assert {text_of(row) for row in plan.positives_of(plan.query[number])} == wanted
            own = plan.own[plan.query[number]]
            assert (text_of(own) if own >= 0 else None) == (group["query"] if number == 7 else None)
    assert plan.vector[4] == plan.vector[5] and plan.query[4] == plan.query[5]
