"""Runs of `bge_ds.mine` on a few short groups: in this process, or in one of its own that may kill itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import helpers

from bge_ds import mine
from bge_ds.encoding import run
from bge_ds.mining import work

WORDS = sorted({word for text in helpers.SENTENCES for word in text.split()})
PASSAGES = [f"{WORDS[i % len(WORDS)]} {WORDS[(7 * i + 3) % len(WORDS)]} {i}" for i in range(45)]
BLOCK, GROUPS = 8, 6  # texts of a block of vectors, groups of a block


def groups(count: int = 20) -> list[dict]:
    """Groups that share texts: a query in two lines, several positives, negatives that are positives elsewhere, a query that is
    a passage, a text with white space around it, and keys of all kinds."""
    found = []
    for i in range(count):
        pos = [PASSAGES[i % 45], *[PASSAGES[(i + 1) % 45]] * (i % 3 == 0)]
        neg = [PASSAGES[(2 * i + k) % 45] for k in range(2, 6)]
        found.append({"query": f"query {i}", "pos": pos, "neg": neg, "id": i, "more": {"ü": [1.5, None]}})
    found[5]["query"] = found[4]["query"]
    found[7]["query"] = PASSAGES[20]
    found[8]["neg"][0] = f" {PASSAGES[8]}\n"
    found[9]["prompt"], found[9]["type"] = "normal", "retrieval"
    found[10] |= {"pos_scores": [0.5], "neg_scores": [0.1, 0.2, 0.3, 0.4]}
    del found[11]["neg"]
    return found


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_blocks_small(monkeypatch, cache: Path) -> None:
    """Of texts and of groups, so that a few of them are several blocks."""
    monkeypatch.setattr(run, "BLOCK", BLOCK)
    monkeypatch.setattr(work, "SMALLEST", GROUPS)
    monkeypatch.setattr(work, "BLOCKS", 1000)
    monkeypatch.setenv("BGE_DS_CACHE", str(cache))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flags(model: Path, source: Path, output: Path, *more: object) -> list[str]:
    words = ["--model_name_or_path", model, "--input", source, "--output", output, "--use_cpu", "--negative_number", 4]
    return [str(word) for word in [*words, "--range_for_sampling", "1-15", *more]]


def mined(model: Path, source: Path, output: Path, *more: object) -> list[dict]:
    assert mine.main(flags(model, source, output, *more)) == 0
    return read_lines(output)


def report(output: Path) -> dict:
    return json.loads(output.with_name(f".{output.name}.report.json").read_text())


def refused(capsys, words: list[str]) -> str:
    capsys.readouterr()
    assert mine.main(words) == 2
    error = capsys.readouterr().err
    assert "error: " in error and error.split("error: ")[1].count("\n") == 1, error
    return error


def start(folder: Path, moment: object, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, which may kill itself."""
    return helpers.run_program("mine_command", [str(BLOCK), str(GROUPS), str(moment), *words], folder, **variables)
