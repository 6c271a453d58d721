"""The loop around a model, at a small size to its end. What its table shows at full size is measured, not tested."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys

import helpers
import pytest
from safetensors.numpy import load_file
from test_evaluate import write_set

sys.path.insert(0, str(helpers.REPO / "examples"))
import stages

GROUPS = [
    {
        "query": f"{helpers.SENTENCES[i % 6][:20]} {i}",
        "pos": [f"{helpers.SENTENCES[i % 6]} {i}"],
        "neg": [f"{helpers.SENTENCES[(i + 1) % 6]} {i + 90}"],
    }
    for i in range(12)
]
PASSAGES = {f"p{i}": group["pos"][0] for i, group in enumerate(GROUPS)}


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not (helpers.REPO / ".venv/.installed").exists(), reason="examples/recipe.sh would install a .venv first")
def test_the_recipe_ends_with_a_table_of_its_stages(tmp_path, tiny_bert_path):
    """Each stage works on what the one before it left; a second start repeats none and prints the same table."""
    (tmp_path / "groups.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(g) + "\n" for g in GROUPS).encode()))
    sets = [
        write_set(tmp_path / name, PASSAGES, {"q": "embed questions", "r": "lazy dog"}, "q\tp1\t1\nr\tp0\t1\n") for name in "ab"
    ]
    given = {
        "DATA": str(tmp_path / "groups.jsonl.gz"), "EVAL": " ".join(map(str, sets)), "MODEL": str(tiny_bert_path),
        "QUERIES": "8", "BATCH": "4", "RERANK_STEPS": "2", "WEIGHT": "0.25", "NUM_GPUS": "1", "CSV": str(tmp_path / "rows.csv"),
    }  # fmt: skip
    out = tmp_path / "out"
    tables, times = [], []
    for _ in range(2):
        done = subprocess.run(
            [helpers.REPO / "examples/recipe.sh", out],
            env=helpers.environment(**given),
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        tables.append(done.stdout[done.stdout.index("nDCG@10 ") : done.stdout.rindex("done in ")])
        times.append({path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()})
    assert tables[0] == tables[1] and times[0] == times[1]
    names = ["base", "in-batch", "in-batch, reranked", "mined", "distilled", "merged"]
    assert [line.split("  ")[0] for line in tables[0].splitlines()[1:]] == names
    # With a random model the margin can leave a group without negatives, which then takes no further part.
    drawn, found, mined, scored = (lines_of(out / f"{name}.jsonl") for name in ("groups", "mined-all", "mined", "scored"))
    assert len(drawn) == 8 and [group["query"] for group in found] == [group["query"] for group in drawn]
    assert mined == [group for group in found if group["neg"]]
    assert [group["query"] for group in scored] == [group["query"] for group in mined]
    assert all(len(group["neg"]) == len(group["neg_scores"]) for group in scored)
    base, distilled, merged = (
        next(v for k, v in load_file(folder / "model.safetensors").items() if k.endswith("0.attention.self.query.weight"))
        for folder in (tiny_bert_path, out / "distilled", out / "merged")
    )
    assert abs(merged - (0.25 * distilled + 0.75 * base)).max() < 1e-6 < abs(distilled - base).max()
    with (tmp_path / "rows.csv").open(encoding="utf-8") as rows:
        written = list(csv.DictReader(rows))
    assert {(row["stage"], row["set"]) for row in written[:12]} == {(name, data) for name in names for data in "ab"}


@pytest.mark.skipif(not (helpers.REPO / ".venv/.installed").exists(), reason="examples/recipe.sh would install a .venv first")
def test_data_without_sets_to_evaluate_on_is_refused(tmp_path):
    """Said before any training: there is nothing that the table could be made of."""
    done = subprocess.run(
        [helpers.REPO / "examples/recipe.sh", tmp_path / "out"],
        env=helpers.environment(DATA="groups.jsonl", NUM_GPUS="1", MODEL="x", EVAL=""),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1 and "error: DATA without EVAL" in done.stderr


def test_drawn_lines_keep_their_order_and_come_from_all_files(tmp_path):
    """A draw that took the first lines would train on one package of sorted data."""
    for name, numbers in (("a", range(50)), ("b", range(50, 100))):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in numbers) + "\n")
    taken = [json.loads(line)["n"] for line in stages.draw(tmp_path, 20, 0)]
    assert len(set(taken)) == 20 and taken == sorted(taken) and taken[0] < 50 <= taken[-1] and taken != list(range(20))
    assert [json.loads(line)["n"] for line in stages.draw(tmp_path, 500, 0)] == list(range(100))
