"""Meters and the metrics file."""

from __future__ import annotations

import io
import json

import pytest
import torch

from bge_ds.data import files
from bge_ds.training import metrics
from bge_ds.training.metrics import Meter, RunLog, peak_rate


def test_meter_sums_and_starts_anew():
    meter = Meter(torch.device("cpu"))
    meter.add(loss=torch.tensor(2.0), tokens=10)
    meter.add(loss=torch.tensor(4.0), tokens=5)
    first = meter.read()
    assert (first["loss"], first["tokens"], first["steps"]) == (6.0, 15, 2) and first["seconds"] > 0
    meter.add(loss=1.0)
    assert meter.read()["loss"] == 1.0


@pytest.mark.parametrize("filtered", [True, False])
def test_meter_filters_what_is_not_finite(filtered):
    """logging_nan_inf_filter: a step whose loss is NaN counts as the average so far; off, it shows."""
    meter = Meter(torch.device("cpu"), filtered)
    for loss in (1.0, 3.0, float("nan")):
        meter.add(loss=loss)
    total = meter.read()["loss"]
    assert total == 6.0 if filtered else total != total


def test_what_is_left_out_is_no_zero():
    """A step that is left out first counts as the average of those after it; where all are left out, there is no average."""
    meter = Meter(torch.device("cpu"))
    for loss in (float("nan"), 3.0, 5.0):
        meter.add(loss=loss, tokens=10)
    found = meter.read()
    assert found["loss"] / found["steps"] == 4.0 and found["tokens"] == 30
    meter.add(loss=float("inf"), tokens=10)
    found = meter.read()
    assert found["loss"] != found["loss"] and found["tokens"] == 10


def record(step):
    return {"step": step, "loss": 1.0, "learning_rate": 1e-5, "tokens_per_second": 10.0, "mfu": 0.5}


def log_to(file, first_step=0):
    events = []
    log = RunLog(file, first_step=first_step, total_steps=9, show_bar=False, write_events=events.extend)
    return log, events


def test_metrics_of_a_resumed_run(tmp_path):
    """Lines up to the checkpoint stay, those written after it (and a torn last line) go: each step stands once."""
    file = tmp_path / "metrics.jsonl"
    log, events = log_to(file)
    for step in (1, 2, 3, 4):
        log.write(record(step))
    log.close()
    assert ("train/loss", 1.0, 4) in events
    with file.open("a") as out:
        out.write('{"step": 5, "lo')
    log, _ = log_to(file, first_step=2)
    log.write(record(3))
    log.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_metrics_are_json_that_any_reader_takes(tmp_path):
    """NaN and infinity are no JSON: a loss or norm that is not finite is null in the file, and itself in the monitors."""
    file = tmp_path / "metrics.jsonl"
    log, events = log_to(file)
    log.write({**record(1), "loss": float("nan"), "grad_norm": float("inf")})
    log.close()

    def refuse(word):
        raise AssertionError(f"{word} in {file}")

    found = json.loads(file.read_text(), parse_constant=refuse)
    assert found["loss"] is None and found["grad_norm"] is None and found["mfu"] == 0.5
    assert ("train/grad_norm", float("inf"), 1) in events


def test_a_log_that_cannot_be_written_says_what_to_do(tmp_path):
    """A full disk (/dev/full) is named with the file, the last checkpoint and the way on: not an error number alone."""
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "state.json").write_text("{}")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log, _ = log_to(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl could not be written .*No space left.*checkpoint-7\. Make room"):
        log.write(record(1))


def test_the_lines_of_a_resumed_run_are_never_half_there(tmp_path, monkeypatch):
    """What the stopped run logged is kept as it was until all of it is written anew: those steps are not run again."""
    file = tmp_path / "metrics.jsonl"
    log, _ = log_to(file)
    for step in (1, 2, 3):
        log.write(record(step))
    log.close()
    before = file.read_text()

    class FullDisk(io.FileIO):
        def write(self, content):
            super().write(content[:9])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(ValueError, match="No space left"):
        log_to(file, first_step=2)
    assert file.read_text() == before


def test_a_new_run_starts_a_new_file(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for _ in range(2):
        log, _ = log_to(file)
        log.write(record(1))
        log.close()
    assert len(file.read_text().splitlines()) == 1


def test_the_peak_that_utilisation_is_a_share_of(monkeypatch):
    """The maker's figure, or none: a measured rate came out too low on a busy machine, and 121 % of it were reached."""
    name = ["NVIDIA H200"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[0])
    gpu = torch.device("cuda", 0)
    assert peak_rate.__wrapped__(gpu, torch.bfloat16) == peak_rate.__wrapped__(gpu, torch.float16) == 989e12
    assert peak_rate.__wrapped__(gpu, torch.float32) is None and peak_rate(torch.device("cpu"), torch.bfloat16) is None
    name[0] = "a new one"
    assert peak_rate.__wrapped__(gpu, torch.bfloat16) is None


def test_warning_of_emulated_precision(monkeypatch):
    """A CPU without 16-bit instructions trains 25 times slower with --bf16 than without; nothing else would tell the user."""
    rates = {torch.float32: 100e9, torch.bfloat16: 4e9, torch.float16: 90e9}
    monkeypatch.setattr(metrics, "product_rate", lambda dtype: rates[dtype])
    cpu = torch.device("cpu")
    assert "4 GFLOP/s in bfloat16 and 100 in fp32" in metrics.slow_precision(cpu, torch.bfloat16)
    assert "leave --bf16 out" in metrics.slow_precision(cpu, torch.bfloat16)
    assert metrics.slow_precision(cpu, torch.float16) is None
    assert metrics.slow_precision(cpu, torch.float32) is None
    assert metrics.slow_precision(torch.device("cuda"), torch.bfloat16) is None
