"""What is measured on a GPU goes through here without one: a script that breaks there wastes the little time there is."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import helpers


def test_a_dry_run_leaves_a_row_of_each_part(tmp_path, tiny_tokenizer_path):
    """A sample of lengths, then several parts with toy shapes: rows as made, failures named, nothing stops the rest."""
    groups = tmp_path / "groups.jsonl"
    line = {"query": helpers.SENTENCES[0], "pos": [helpers.SENTENCES[1]], "neg": helpers.SENTENCES[2:4]}
    groups.write_text(json.dumps(line) + "\n")
    own = [sys.executable, helpers.REPO / "benchmarks/own_gpu.py", "sample", tmp_path / "data", "--groups", groups]
    subprocess.run([*own, "--model", tiny_tokenizer_path], check=True, env=helpers.environment(), capture_output=True)
    environment = {**helpers.environment(), "PARTS": "rates nonsense kernels no_dropout profile"}
    command = [helpers.REPO / "benchmarks/gpu.sh", tmp_path / "out", "--data", tmp_path / "data", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    with (tmp_path / "out/gpu.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    log = (tmp_path / "out/parts.log").read_text()
    whats = " ".join(row["what"] for row in rows)
    for what in ("matrix rate", "decoder attention, L 20", "cross entropy", "contrastive loss", "fine-tuning", "profile"):
        assert what in whats, log[-3000:]
    assert [row["note"] for row in rows if row["what"] == "nonsense"] == ["failed: ended with status 2"]
    assert (tmp_path / "out/profile.txt").is_file() and len(list((tmp_path / "out").iterdir())) <= 8


def test_a_wrong_start_is_refused(tmp_path):
    """Before anything is installed or measured."""
    script = helpers.REPO / "benchmarks/gpu.sh"
    for arguments, words in (
        (["--data", tmp_path], "has no lengths.json; make it by benchmarks/own_gpu.py sample"),
        (["--fast"], "'--fast' is unknown; valid are --wheels FOLDER, --data FOLDER, --dry-run"),
    ):
        result = subprocess.run([script, tmp_path / "out", *arguments], capture_output=True, text=True)
        assert result.returncode == 2 and words in result.stderr
