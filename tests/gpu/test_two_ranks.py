"""Two processes that share the GPU: over gloo, since NCCL refuses one device twice."""

from __future__ import annotations

import os

import helpers
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(150)]


def test_two_ranks_share_a_gpu(flags, metrics, device, tmp_path):
    """Three steps of fine-tuning with negatives across ranks: what a single rank never issues (the gather with gradients, the
    reductions, the watch) takes tensors of a GPU, and the losses are finite and fall on both."""
    asked = flags("finetune", tmp_path / "out", max_steps=3, per_device_train_batch_size=3, ddp_backend="gloo")
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    words += ["--negatives_cross_device", *(["--use_cpu"] if device == "cpu" else [])]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(helpers.free_port()), "PYTHONPATH": str(helpers.REPO)}  # fmt: skip
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "w") as out:
            env = helpers.environment(**group, RANK=str(rank)) | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})
            processes.append(helpers.start_program("command", ["finetune", *words], env, out, out, fresh=True))
    try:
        for process in processes:
            process.wait(120)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    records = metrics(tmp_path / "out")
    assert len(records) == 3 and all(0 < record["loss"] < 10 and record["grad_norm"] > 0 for record in records)
    assert records[0]["negatives"] > 9  # more than one rank's passages
    assert os.path.isfile(tmp_path / "out" / "model.safetensors")
