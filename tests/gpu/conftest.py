"""What the tests of a GPU share: the device, one process for all runs, a CPU's figures to hold them against.

BGE_DS_TEST_DEVICE=cpu runs what does not need CUDA on the CPU: that shows that a test is sound, nothing about GPUs.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of --full_determinism, read when CUDA starts

import helpers
import pytest
import torch

from bge_ds import finetune, pretrain
from bge_ds.config.arguments import FinetuneArguments, PretrainArguments

DEVICE = os.environ.get("BGE_DS_TEST_DEVICE", "cuda")
COMMANDS = {"finetune": (finetune.train, FinetuneArguments), "pretrain": (pretrain.train, PretrainArguments)}
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_broken_by: list[str] = []


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _clean(request) -> Iterator[None]:
    """Modes that a run sets are set back, its memory is freed; after an error that CUDA does not survive, all is skipped."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if _broken_by:
        pytest.skip(f"CUDA did not survive {_broken_by[0]}")
    modes = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = modes
    gc.collect()  # an engine is a web of cycles
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            _broken_by.append(request.node.nodeid)


@pytest.fixture
def cuda(device) -> None:
    if device != "cuda":
        pytest.skip("needs CUDA, and BGE_DS_TEST_DEVICE is not cuda")


@pytest.fixture(scope="session")
def setting(tmp_path_factory) -> Path:
    """Both kinds of data; `model`, a BERT with dropout whose heads are 32 wide, and `exact`, one without dropout; `set`, a
    folder in BEIR's form."""
    base = helpers.make_training_folder(tmp_path_factory.mktemp("gpu"))
    shape = {"hidden_size": 128, "intermediate_size": 256}
    for name, dropout in (("model", 0.1), ("exact", 0.0)):
        helpers.make_model("bert", base / name, dropout=dropout, **shape)
        helpers.make_tokenizer("wordpiece", base / name)
    (base / "set").mkdir()
    texts = [json.dumps({"_id": str(k), "title": "", "text": text}) + "\n" for k, text in enumerate(helpers.SENTENCES)]
    parts = [json.dumps({"_id": str(k), "text": text[5:25]}) + "\n" for k, text in enumerate(helpers.SENTENCES)]
    (base / "set" / "corpus.jsonl").write_text("".join(texts))
    (base / "set" / "queries.jsonl").write_text("".join(parts))
    rows = "".join(f"{k}\t{k}\t1\n" for k in range(len(texts)))
    (base / "set" / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return base


def _flags(setting: Path, command: str, output: Path, **changes) -> dict:
    common = {
        "output_dir": str(output), "model_name_or_path": str(setting / "exact"), "cache_dir": str(setting / "cache"),
        "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-4, "per_device_train_batch_size": 6, "save_strategy": "no",
        # An Adam of the usual epsilon makes steps of one size out of gradients that are rounding errors.
        "adam_epsilon": 1e-3, "dataloader_num_workers": 0,
    }  # fmt: skip
    own = {
        "finetune": {"train_data": str(setting / "groups.jsonl"), "train_group_size": 3, "temperature": 0.05,
                     "query_max_len": 16, "passage_max_len": 40, "sentence_pooling_method": "mean"},
        "pretrain": {"train_data": str(setting / "texts.jsonl"), "max_seq_length": 40},
    }  # fmt: skip
    return common | own[command] | changes


@pytest.fixture
def flags(setting) -> Callable[..., dict]:
    """flags(command, output, **changes): the flags of a short run."""
    return partial(_flags, setting)


def _metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def metrics() -> Callable[[Path], list[dict]]:
    """The records of a run's folder."""
    return _metrics


@pytest.fixture
def train(setting, tmp_path) -> Callable[..., list[dict]]:
    """train("finetune", **flags): a run in this process, alone; its records. The folder is `output_dir`, or a new one."""
    count = iter(range(100))

    def run(command: str, **changes) -> list[dict]:
        flags = _flags(setting, command, tmp_path / f"run{next(count)}", **changes)
        work, kind = COMMANDS[command]
        work(kind.build(**flags, use_cpu=DEVICE == "cpu"))
        return _metrics(Path(flags["output_dir"]))

    return run


@pytest.fixture(scope="session", autouse=True)
def _started(request) -> None:
    """The CPU's runs begin before the first test, and end while others go on."""
    wanted = any("reference" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if wanted and (DEVICE != "cuda" or torch.cuda.is_available()):
        request.getfixturevalue("reference")


@pytest.fixture(scope="session")
def reference(setting, tmp_path_factory) -> Iterator[Callable[[str], list[dict]]]:
    """reference(command): the records of a run on the CPU, fp32, ZeRO 0, evaluated at its end."""
    folder = tmp_path_factory.mktemp("reference")
    evaluated = {"eval_data": [str(setting / "set")], "eval_strategy": "steps", "eval_steps": 4}
    runs = [(name, _flags(setting, name, folder / name, deepspeed="zero0", **evaluated)) for name in COMMANDS]
    own = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    env = own | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(helpers.REPO)}
    with open(folder / "log", "w") as log:
        process = helpers.start_program("train", [json.dumps(runs)], env, log, log, fresh=True)

    def records(command: str) -> list[dict]:
        assert process.wait(120) == 0, (folder / "log").read_text()[-4000:]
        return _metrics(folder / command)

    yield records
    process.kill()
