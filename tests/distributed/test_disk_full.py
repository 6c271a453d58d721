"""A disk that fills up while ranks save, or is read-only: one message on all ranks, and the checkpoint before stays good."""

from __future__ import annotations

import json
import os
import subprocess

import helpers
import pytest

from bge_ds.checkpoint import checkpoint
from bge_ds.config.arguments import FinetuneArguments
from bge_ds.training import setup

RANK_SCRIPT = """
import json, os, shutil, sys
from bge_ds import finetune
from bge_ds.config.arguments import FinetuneArguments
from bge_ds.distributed import collectives
flags, honest = json.loads(sys.argv[1]), shutil.disk_usage
for name, usage in (("seen", honest), ("unseen", lambda path: type(honest(path))(1 << 40, 0, 1 << 40))):
    shutil.disk_usage = usage
    try:
        finetune.train(FinetuneArguments.build(**flags, output_dir=f"{sys.argv[2]}/{name}/run", use_cpu=True))
    except ValueError as error:
        print(f"{name}, rank {collectives.rank()}: {error}", flush=True)
"""


@pytest.fixture
def small_disks(tmp_path):
    """Two file systems that hold one checkpoint of a tiny model on two ranks, and not a second one."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    mounted = []
    try:
        for name in ("seen", "unseen"):
            (tmp_path / name).mkdir()
            command = ["mount", "-t", "tmpfs", "-o", "size=880k", "none", str(tmp_path / name)]
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("this machine mounts no tmpfs")
            mounted.append(tmp_path / name)
        yield tmp_path
    finally:
        for path in mounted:
            subprocess.run(["umount", str(path)], check=True)


def test_the_checkpoint_before_stays_good(small_disks, tiny_bert_path):
    """Seen beforehand or in the middle of a rank's file: every rank raises the same error, which names what is needed, what is
    free and the checkpoint to go on from; nothing half-written is left, and that checkpoint passes its hashes."""
    lines = [{"query": f"question {i}", "pos": [f"answer {i}"], "neg": [f"other {i}", "wrong"]} for i in range(8)]
    (small_disks / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {
        "model_name_or_path": str(tiny_bert_path), "train_data": str(small_disks / "groups.jsonl"), "train_group_size": 2,
        "cache_dir": str(small_disks / "cache"), "per_device_train_batch_size": 2, "max_steps": 3, "save_strategy": "steps",
        "save_steps": 1, "dataloader_num_workers": 0, "negatives_cross_device": True, "logging_steps": 1,
    }  # fmt: skip
    out = helpers.run_ranks(RANK_SCRIPT, 2, json.dumps(flags), small_disks)
    for name, words in (("seen", "MiB are free): it needs"), ("unseen", "No space left on device")):
        said = [line for line in out.splitlines() if line.startswith(f"{name}, rank ")]
        assert len(said) == 2 and len({line.split(": ", 1)[1] for line in said}) == 1
        assert words in said[0] and "checkpoint-2 could not be written" in said[0]
        run = small_disks / name / "run"
        assert f"{run / 'checkpoint-1'} is still good" in said[0] and "--resume_from_checkpoint auto" in said[0]
        assert sorted(p.name for p in run.iterdir()) == ["checkpoint-1", "metrics.jsonl", "run.lock"]
        assert checkpoint.select(str(run / "checkpoint-1"), run).state.step == 1


def test_a_read_only_folder_is_refused_at_once(small_disks):
    """Before anything is loaded, whether the output folder is there or to be made; the folder that is in the way is named."""
    disk = small_disks / "seen"
    (disk / "run").mkdir()
    assert not subprocess.run(["mount", "-o", "remount,ro", str(disk)]).returncode
    for output, named in ((disk / "run", disk / "run"), (disk / "new" / "run", disk)):
        args = FinetuneArguments.build(model_name_or_path="model", train_data="groups.jsonl", output_dir=str(output))
        with pytest.raises(ValueError, match=f"--output_dir {output}: {named} is read-only to this user; give a folder"):
            setup.set_up(args)
