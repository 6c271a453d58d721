"""Killed anywhere, any number of times, and started again by the supervisor: the model is the undisturbed run's."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import forked
import helpers
import pytest
from safetensors.torch import load_file

RUNS = 20
STEPS, SAVE_EVERY = 10, 3


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(folder with a tiny BERT with dropout and groups, the socket of a server that starts ranks)."""
    base = helpers.make_training_folder(tmp_path_factory.mktemp("kills"))
    server = forked.server()
    if server is None:
        pytest.skip("CUDA does not survive a fork")
    return base, server


def supervised(setting, name: str, *program: object) -> str:
    """Trains on two ranks under the supervisor, by a program and the first of its arguments; what was printed."""
    base, socket = setting
    flags = {
        "model_name_or_path": "model", "train_data": "groups.jsonl", "cache_dir": "cache", "output_dir": name,
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE_EVERY, "save_total_limit": 2, "logging_steps": 1,
        "learning_rate": 1e-3, "warmup_steps": 2, "per_device_train_batch_size": 2, "train_group_size": 3,
        "temperature": 0.05, "use_cpu": True, "negatives_cross_device": True, "dataloader_num_workers": 1,
    }  # fmt: skip
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    done = subprocess.run(
        [helpers.REPO / "launch/supervise.sh", sys.executable, forked.__file__, "ask", socket, "2", *map(str, program), *words],
        cwd=base, text=True, timeout=280, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=helpers.environment(PYTHONPATH=helpers.PYTHONPATH, RESTART_DELAY="0"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def result(folder: Path) -> tuple:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines]


def test_twenty_kills(setting):
    """One rank of two is killed at a random moment of a random step or save; the supervisor's second run goes on.

    The losses and the final weights are the undisturbed run's to the last bit, and nothing but whole checkpoints is left.
    """
    base, _ = setting
    supervised(setting, "undisturbed", "command", "finetune")
    expected, weights = result(base / "undisturbed"), load_file(base / "undisturbed/model.safetensors")
    assert [step for step, *_ in expected] == list(range(1, STEPS + 1))
    left = sorted(path.name for path in (base / "undisturbed").iterdir())
    draw = random.Random(0)
    for number in range(RUNS):
        moment = "save" if number % 4 == 3 else "step"
        step = draw.randrange(STEPS - 1) if moment == "step" else draw.choice(range(SAVE_EVERY, STEPS, SAVE_EVERY))
        plan = (draw.randrange(2), moment, step, draw.uniform(0, 0.08 if moment == "step" else 0.3))
        output, mark = base / f"killed-{number}", base / f"mark-{number}"
        printed = supervised(setting, output.name, "killed_rank", json.dumps(plan), mark)
        assert mark.exists(), plan  # it was killed
        assert "killed" in printed or "died" in printed, printed[-3000:]
        assert result(output) == expected, plan
        found = load_file(output / "model.safetensors")
        assert found.keys() == weights.keys() and all(found[key].equal(weights[key]) for key in weights), plan
        assert sorted(path.name for path in output.iterdir()) == left, plan
