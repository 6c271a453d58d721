"""What is measured on a GPU goes through here without one: a script that breaks there wastes the little time there is."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import helpers
import pytest
import torch


def rows_of(folder) -> list[dict[str, str]]:
    with (folder / "gpu.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_dry_run_leaves_a_row_of_each_part(tmp_path, tiny_tokenizer_path):
    """A sample of lengths, then several parts with toy shapes: rows as made, failures named, nothing stops the rest."""
    groups = tmp_path / "groups.jsonl"
    line = {"query": helpers.SENTENCES[0], "pos": [helpers.SENTENCES[1]], "neg": helpers.SENTENCES[2:4]}
    groups.write_text(json.dumps(line) + "\n")
    own = [sys.executable, helpers.REPO / "benchmarks/gpu_sample.py", tmp_path / "data", "--groups", groups]
    subprocess.run([*own, "--model", tiny_tokenizer_path], check=True, env=helpers.environment(), capture_output=True)
    environment = {**helpers.environment(), "PARTS": "rates nonsense kernels no_dropout profile command"}
    command = [helpers.REPO / "benchmarks/gpu.sh", tmp_path / "out", "--data", tmp_path / "data", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    rows = rows_of(tmp_path / "out")
    log = (tmp_path / "out/parts.log").read_text()
    whats = " ".join(row["what"] for row in rows)
    for what in (
        "matrix rate",
        "decoder attention, L 20",
        "cross entropy",
        "contrastive loss",
        "fine-tuning",
        "profile",
        "the finetune command",
        "the pretrain command",
    ):
        assert what in whats, log[-3000:]
    failed = {row["what"]: row["note"] for row in rows if row["note"].startswith("failed")}
    assert failed == {"nonsense": "failed: ended with status 2"}, log[-3000:]
    assert (tmp_path / "out/profile.txt").is_file() and len(list((tmp_path / "out").iterdir())) <= 8


def test_the_limits_add_up_to_eight_minutes():
    """A machine that is lent for a quarter of an hour must have time for a second run."""
    script = (helpers.REPO / "benchmarks/gpu.sh").read_text()
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", script))
    parts = re.search(r"PARTS:-([\w ]+)\}", script).group(1).split()
    assert sorted(limits) == sorted(parts) and sum(map(int, limits.values())) <= 480


@pytest.fixture
def lengths(tmp_path):
    (tmp_path / "lengths.json").write_text(json.dumps({"groups": [[5, [7] * 8]]}))
    return tmp_path


def test_a_peer_that_is_not_installed_leaves_our_row(lengths):
    """sentence-transformers' rows say what is missing, and ours are there."""
    missing = "No module named 'sentence_transformers'"
    (lengths / "sentence_transformers.py").write_text(f'raise ModuleNotFoundError("{missing}")')
    command = [sys.executable, helpers.REPO / "benchmarks/own_gpu.py", "sentence_transformers", lengths / "gpu.csv"]
    environment = helpers.environment(PYTHONPATH=f"{lengths}:{helpers.REPO}")
    subprocess.run([*command, "--data", lengths, "--dry-run"], check=True, capture_output=True, env=environment)
    rows = rows_of(lengths)
    assert sum(row["side"] == "bge_ds" and bool(row["seconds"]) for row in rows) == 2
    assert all(missing in row["note"] for row in rows if row["side"] != "bge_ds")


def test_a_batch_too_large_for_the_peer_is_made_smaller(lengths, monkeypatch):
    """Both sides are measured on the smaller one too: a ratio is always one of the same batch."""
    monkeypatch.syspath_prepend(str(helpers.REPO / "benchmarks"))
    import gpu_setting
    import own_gpu

    def peer(place, config, batch):
        if batch.queries > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return lambda: None

    monkeypatch.setattr(own_gpu, "padded_finetuning", peer)
    own_gpu.finetuning(gpu_setting.Place(lengths, lengths / "gpu.csv", dry=True), ["bge-base"], 0.1, "")
    found = [(row["what"].split(", ")[2], row["side"], bool(row["seconds"]), bool(row["times_as_fast"]))
             for row in rows_of(lengths)]  # fmt: skip
    assert found == [
        ("4 x 8", "padded, SDPA", False, False), ("4 x 8", "bge_ds", True, False),
        ("2 x 8", "padded, SDPA", True, False), ("2 x 8", "bge_ds", True, True),
    ]  # fmt: skip


def test_a_wrong_start_is_refused(tmp_path):
    """Before anything is installed or measured."""
    script = helpers.REPO / "benchmarks/gpu.sh"
    for arguments, words in (
        (["--data", tmp_path], "has no lengths.json; make it by benchmarks/gpu_sample.py"),
        (["--fast"], "'--fast' is unknown; valid are --wheels FOLDER, --data FOLDER, --dry-run"),
    ):
        result = subprocess.run([script, tmp_path / "out", *arguments], capture_output=True, text=True)
        assert result.returncode == 2 and words in result.stderr
