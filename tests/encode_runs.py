"""Runs of `bge_ds.encode` on a few short texts: in this process, or in one of its own that may kill itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import helpers

from bge_ds import encode
from bge_ds.encoding.vectors import open_vectors

TEXTS = [" ".join(helpers.SENTENCES[i % 6].split()[: 1 + i % 5]) + f" {i}" for i in range(30)]
BLOCK = 8  # texts: four blocks, the last of them not full


def write_lines(path: Path, texts=TEXTS, **more) -> Path:
    lines = [json.dumps({"_id": f"d{i}", "text": text} | more) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def flags(model: Path, source, folder: Path, *more: object) -> list[str]:
    sources = source if isinstance(source, list) else [source]
    words = ["--model_name_or_path", model, "--input", *sources, "--output", folder, "--use_cpu", *more]
    return [str(word) for word in words]


def encoded(model: Path, source, folder: Path, *more: object):
    assert encode.main(flags(model, source, folder, *more)) == 0
    return open_vectors(folder)


def refused(capsys, model: Path, source, folder: Path, *more: object) -> str:
    return helpers.refused(capsys, encode.main, flags(model, source, folder, *more))


def content(folder: Path, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in but}


def start(folder: Path, moment: object, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, which may kill itself."""
    return helpers.run_program("encode_command", [str(BLOCK), str(moment), *words], folder, **variables)
