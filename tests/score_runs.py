"""Runs of `bge_ds.score` on a few short groups, with tiny random teachers."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import helpers

from bge_ds import score

BLOCK = 4  # groups: three blocks, the last of them not full
GROUPS = [
    {"id": n, "query": helpers.SENTENCES[n % 6][: 12 + n], "pos": [f"{helpers.SENTENCES[n % 6]} {n}"],
     "neg": [f"{helpers.SENTENCES[(n + k) % 6]} {'and so on ' * k}" for k in range(1, 1 + n % 4)], "type": "normal"}
    for n in range(10)
]  # fmt: skip


def make_teacher(folder: Path, family: str = "bert", **changes) -> Path:
    """A tiny cross-encoder with a classification head, and its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = helpers.tiny_config(family, num_labels=1, **changes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return helpers.make_tokenizer("wordpiece" if family == "bert" else "unigram", folder, types=family == "bert")


def make_decoder(folder: Path) -> Path:
    """A tiny decoder whose tokenizer has a token for Yes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = AutoTokenizer.from_pretrained(helpers.make_tokenizer("bytes", folder))
    known.add_tokens(["Yes"])
    known.save_pretrained(folder)
    torch.manual_seed(0)
    config = helpers.tiny_config("qwen3", vocab_size=len(known), max_position_embeddings=1100)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_groups(path: Path, groups=GROUPS) -> Path:
    data = "".join(json.dumps(group, ensure_ascii=False) + "\n" for group in groups).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_groups(path: Path) -> list[dict]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def flags(model: Path, source, output: Path, *more: object) -> list[str]:
    words = ["--model_name_or_path", model, "--input", source, "--output", output, "--use_cpu", *more]
    return [str(word) for word in words]


def scored(model: Path, source, output: Path, *more: object) -> list[dict]:
    assert score.main(flags(model, source, output, *more)) == 0
    return read_groups(output)


def refused(capsys, model: Path, source, output: Path, *more: object) -> str:
    return helpers.refused(capsys, score.main, flags(model, source, output, *more))


def start(folder: Path, moment: object, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, which may kill itself."""
    return helpers.run_program("score_command", [str(BLOCK), str(moment), *words], folder, **variables)
