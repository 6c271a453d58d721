"""The README's first command, at a small size to its end. What its table must show at full size is measured, not tested."""

from __future__ import annotations

import json
import subprocess

import helpers
import pytest


@pytest.mark.skipif(not (helpers.REPO / ".venv/.installed").exists(), reason="launch/quickstart.sh would install a .venv first")
def test_the_quickstart_ends_with_a_table_a_picture_and_a_model_to_search(tmp_path):
    """Every stage runs; a second start repeats none of them and ends alike."""
    small = {"PACKAGES": "torch", "PRETRAIN_STEPS": "4", "FINETUNE_STEPS": "3", "MODEL_STEPS": "2", "NUM_GPUS": "1"}
    environment = helpers.environment(**small)
    tables = []
    for _ in range(2):
        done = subprocess.run(
            [helpers.REPO / "launch/quickstart.sh", tmp_path / "out"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        tables.append(done.stdout[done.stdout.index("model  ") : done.stdout.index("picture: ")])
    assert tables[0] == tables[1]
    rows = [line for line in tables[0].splitlines() if line.strip()]
    assert len(rows) == 8 and rows[1].startswith("BM25") and "pre-trained + fine-tuned" in rows[3] and rows[6].startswith("(b)")
    for run in ("a_pretrained", "a_finetuned", "a_finetuned_only", "model"):
        steps = [json.loads(line) for line in (tmp_path / "out" / run / "metrics.jsonl").read_text().splitlines()]
        assert steps and (tmp_path / "out/logs" / f"{run}.log").stat().st_size > 1000
    assert (tmp_path / "out/report.png").exists() and (tmp_path / "out/model/model.safetensors").exists()
    assert "step 4 " in (tmp_path / "out/logs/a_pretrained.log").read_text()
    assert f"python examples/search.py {tmp_path / 'out'}/model" in done.stdout


def test_a_stage_that_fails_shows_the_end_of_its_log(tmp_path):
    """Not only a status: the newcomer sees the error and where the rest is."""
    if not (helpers.REPO / ".venv/.installed").exists():
        pytest.skip("launch/quickstart.sh would install a .venv first")
    out = tmp_path / "out"
    (out / "data/test").mkdir(parents=True)
    (out / "data/test/qrels.tsv").touch()
    (out / "small_bert").mkdir()
    for made in ("small_bert/config.json", "shards/manifest.json", "random/model.safetensors"):
        (out / made).parent.mkdir(exist_ok=True)
        (out / made).touch()
    done = subprocess.run(
        [helpers.REPO / "launch/quickstart.sh", out],
        env=helpers.environment(NUM_GPUS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "a_pretrained.log" in done.stderr
    assert f"error: tokenizer {out}/random cannot be loaded" in done.stderr  # the run's own words
