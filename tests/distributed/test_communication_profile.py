"""Which rank keeps the others waiting, what the ranks say to each other, and the formulas for both."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import helpers
import pytest
import torch

from bge_ds.deepspeed_engine.ds_config import read_config, traffic_estimate
from bge_ds.distributed import communication_profile


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_rank_that_others_wait_for_is_named(stage):
    """One of two ranks sleeps a second in each step: it is named with its own time, and the other's is communication, in
    DeepSpeed's collectives at any stage. What happens between steps counts for nobody."""
    found, said = json.loads(helpers.run_ranks("slow_rank", 2, stage).strip().splitlines()[-1])
    assert found["slowest_rank"] == 1 and found["slowest_rank_seconds"] >= 1
    assert found["median_rank_seconds"] < found["slowest_rank_seconds"] / communication_profile.SLOW  # of two, the lower
    step = 10 / found["tokens_per_second_lowest"]
    assert 0.9 < 2 * step * found["communication_share"] < 1.5 * step  # rank 0 waits the second, rank 1 does not
    assert found["tokens_per_second_highest"] == pytest.approx(2 * found["tokens_per_second_lowest"], rel=0.2)
    (words,) = said
    assert words.startswith(f"rank 1 on {socket.gethostname()} is the slowest: {found['slowest_rank_seconds']:.2f} s a step")


def test_waiting_for_the_loader_is_its_share_of_the_step(monkeypatch):
    """From the step's beginning to its batch; a loader that is too slow shows as such, and nothing of the one before counts."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(communication_profile, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    pace = communication_profile.Pace(torch.device("cpu"))

    def steps(*waits: float) -> float:
        for wait in waits:
            pace.begin()
            clock.now += wait
            pace.loaded()
            clock.now += 2.0
            pace.end(1)
            clock.now += 5.0  # no step is under way
        return pace.read()["loader_share"]

    assert steps(2.0, 0.0) == pytest.approx(1 / 3)
    assert steps(0.5) == pytest.approx(1 / 5)


def test_nothing_is_counted_between_steps():
    """A call outside of a step leaves no trace, one inside is counted with what its kind moves; alone, nothing moves."""
    pace = communication_profile.Pace(torch.device("cpu"))
    communication_profile.call("all_reduce", lambda tensor: None, torch.zeros(100))
    pace.begin()
    communication_profile.call("all_gather", lambda out, own: None, torch.zeros(100), torch.zeros(50))
    pace.end(7)
    moved, calls = pace.traffic()
    assert calls == {"all_gather": 1} and moved == {"all_gather": 0}
    assert communication_profile.moved("all_reduce", 400, 4) == 600 and communication_profile.moved("all_gather", 400, 4) == 300
    assert pace.read()["tokens_per_second_per_rank"] > 0 and pace.steps == 0


SHAPE = dict(
    vocab_size=211, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=40
)


@pytest.fixture(scope="module")
def nothing_reused(tmp_path_factory) -> str:
    """ZeRO 3 that lets a weight go after each use, as it does with most of a model of many billions."""
    config, _ = read_config("zero3")
    config["zero_optimization"] |= {
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    path = tmp_path_factory.mktemp("config") / "zero3.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_formulas_are_what_is_counted(ranks, nothing_reused):
    """Bytes a step and a rank by the formulas against those counted at every stage, in fp32 and bf16: within 2 % (padding,
    scalars), kind by kind."""
    common = dict(batch=2, group=3, length=8, warmup=2, steps=1, cuda=False, shape=SHAPE)
    names = ("zero0", "zero1", "zero2", "zero3", nothing_reused)
    asked = [dict(common, config=name, bf16=bf16) for name in names for bf16 in (False, True)]
    results = json.loads(helpers.run_ranks("traffic", ranks, json.dumps(asked), timeout=900).strip().splitlines()[-1])
    for what, found in zip(asked, results, strict=True):
        formula, moved, name = found["formula"], found["moved"], (what["config"], what["bf16"])
        reduced = "reduce_scatter" if "zero3" in what["config"] else "all_reduce"
        assert moved.get(reduced, 0) == pytest.approx(formula["gradients"], rel=0.02), name
        assert moved.get("all_gather", 0) == pytest.approx(formula["weights"] + formula["vectors"], rel=0.02), name
        assert moved.get("all_to_all", 0) == formula["gradients of vectors"], name
        if ranks == 1:
            assert set(formula.values()) == {0}


def test_formulas_by_hand():
    """1000 weights on 4 ranks: 3/4 of them go around once for each gather and each scatter."""
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    given = dict(features=10, passages=5)
    found = traffic_estimate(1000, 800, config, 4, **given)
    assert found == {"gradients": 2400, "weights": 0, "vectors": 720, "gradients of vectors": 600}
    config["zero_optimization"]["stage"] = 1
    assert traffic_estimate(1000, 800, config, 4)["weights"] == 1200
    config["zero_optimization"] = {"stage": 3, "stage3_max_reuse_distance": 600}
    found = traffic_estimate(1000, 800, config, 4)
    assert found["gradients"] == 1200 and found["weights"] == 1.5 * (2000 - 300)
