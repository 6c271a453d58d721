"""The loader: its workers give exactly the batches that one process makes, from any step on; nothing else is its state."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from bge_ds import preprocess
from bge_ds.data import dataloader
from bge_ds.data.collate import ContrastiveBatch, PretrainBatch, collate_groups, collate_texts
from bge_ds.data.sampling.sampler import EpochSampler, mix64
from bge_ds.data.shards import shard_reader
from bge_ds.kernels import masks
from bge_ds.kernels.packed import pack

LENGTHS = {"pretrain": {"max_seq_length": 12}, "finetune": {"query_max_len": 8, "passage_max_len": 10}}
COLLATE = {
    "pretrain": (collate_texts, {"seed": 5, "encoder_share": 0.3, **LENGTHS["pretrain"]}),
    "finetune": (collate_groups, {"seed": 5, "group_size": 4, **LENGTHS["finetune"], "own_only_spans": ((30, 50),)}),
}


@pytest.fixture(scope="module", params=["pretrain", "finetune"])
def folder(request, tmp_path_factory, tiny_tokenizer_path):
    """Shards of 60 rows, longer than they are cut to in a batch, lists of 0 to 6 negatives, two sources."""
    place = tmp_path_factory.mktemp("loader")
    words = " ".join(helpers.SENTENCES).split()
    texts = [" ".join(words[i % 20 : i % 20 + 1 + i % 17]) for i in range(60)]
    lines = [{"text": text} for text in texts]
    if request.param == "finetune":
        lists = [(text, texts[i : i + 1 + i % 3], texts[i - i % 7 : i]) for i, text in enumerate(texts)]
        scores = [[[0.5 + j for j in range(len(part))] for part in line[1:]] for line in lists]
        names = ("query", "pos", "neg", "pos_scores", "neg_scores")
        lines = [dict(zip(names, (*line, *more), strict=True)) for line, more in zip(lists, scores, strict=True)]
    parts = [place / "a.jsonl", place / "b.jsonl"]
    for part, rows in zip(parts, (lines[:30], lines[30:]), strict=True):
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [request.param, "--input", *map(str, parts), "--output", str(place / "s"), "--tokenizer", str(tiny_tokenizer_path)]
    assert preprocess.main([*argv, "--num_proc", "1"]) == 0
    return place / "s"


def cut(ids, max_length, suffix):
    return ids if len(ids) <= max_length else np.concatenate([ids[: max_length - suffix], ids[len(ids) - suffix :]])


def order_of(data) -> EpochSampler:
    return EpochSampler(seed=3, spans=((0, 30), (30, len(data))), global_batch=8)


def steps(folder, first=0, end=6, workers=0, context=None, rank=0, world=2, **more):
    data = shard_reader.open_folder(folder)
    collate, options = COLLATE[data.manifest.kind]
    return dataloader.steps(
        [folder], order_of(data), collate, first_step=first, end_step=end, accumulation=2, rank=rank, world=world,
        workers=workers, pin_memory=False, context=context, **options, **more,
    )  # fmt: skip


def assert_same_steps(found, wanted) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert len(mine) == len(theirs) == 2
        for pair in zip(mine, theirs, strict=True):
            helpers.assert_same_batch(*pair)


# ------------------------------------------------------------------------------------------------ what a batch holds


def one_by_one(data, epochs, rows, seed, distill):
    """The batch by its definition: group after group, text after text, each read alone."""
    suffix = len(data.manifest.tokenizer.suffix_ids)
    if data.manifest.kind == "pretrain":
        texts, order = pack([cut(data.ids(row), 12, suffix) for row in rows])
        words = np.concatenate([cut(data.words(rows[i]), 12, suffix) for i in order]).astype(np.int64)
        keys = [int(mix64(seed, int(epochs[i]), int(rows[i])).view(np.int64)) for i in order]
        masked, start = [], 0
        for key, length in zip(keys, np.diff(texts.cu_seqlens).tolist(), strict=True):
            of_text = torch.from_numpy(words[start : start + length])
            chosen = masks.encoder_masked(torch.full((length,), key), of_text, torch.ones(length, dtype=torch.bool), 0.3)
            masked += [start + i for i in range(1, length - 1) if chosen[i]]
            start += length
        return PretrainBatch(
            texts, torch.from_numpy(words), torch.tensor(keys), torch.from_numpy(rows[order]), torch.tensor(masked)
        )
    passages, own, known, scores = [], [], [], []
    for epoch, row in zip(epochs.tolist(), rows.tolist(), strict=True):
        group = data.group(row)
        positive = int(mix64(seed, epoch, row, 1) % np.uint64(len(group.pos)))
        repeated = np.tile(np.arange(len(group.neg)), -(-3 // len(group.neg)) if len(group.neg) else 0)
        drawn = repeated[np.argsort(mix64(seed, epoch, row, 2, np.arange(len(repeated))), kind="stable")[:3]]
        taken = [group.pos[positive], *group.neg[drawn]]
        own.append([len(passages) + i if i < len(taken) else -1 for i in range(4)])
        scores.append([group.pos_scores[positive], *group.neg_scores[drawn], *[0.0] * (4 - len(taken))])
        passages += taken
        known.append(list(group.pos))

    def hashes(prows):
        return torch.from_numpy(np.array([data.hashes(p) for p in prows]).view(np.int64))

    queries = [cut(data.group(row).query, 8, suffix) for row in rows]
    longest = max(map(len, known))
    return ContrastiveBatch(
        texts=pack(queries + [cut(data.passage(p), 10, suffix) for p in passages])[0],
        queries=len(rows), own_BG=torch.tensor(own), hashes_P=hashes(passages),
        known_BK=torch.stack([hashes(row + row[-1:] * (longest - len(row))) for row in known]),
        own_only_B=torch.from_numpy((rows >= 30) & (rows < 50)),
        rows_B=torch.from_numpy(rows), teacher_BG=torch.tensor(scores) if distill else None,
    )  # fmt: skip


@pytest.mark.parametrize("distill", [False, True])
def test_a_batch_is_its_texts_one_by_one(folder, distill):
    """Reading many rows at once must give the texts, hashes and places that reading them one after the other gives."""
    data = shard_reader.open_folder(folder)
    collate, options = COLLATE[data.manifest.kind]
    if data.manifest.kind == "finetune":
        options = options | {"distill": distill}
    for step in range(9):
        epochs, rows = order_of(data).step_rows(step)
        helpers.assert_same_batch(collate(data, epochs, rows, **options), one_by_one(data, epochs, rows, 5, distill))


# ------------------------------------------------------------------------------------------------ the way to the loop


@pytest.mark.parametrize(("workers", "context"), [(1, "fork"), (2, "fork"), (2, "spawn"), (2, "forkserver"), (1, None)])
def test_workers_give_the_same_batches(folder, workers, context):
    """Any number of workers and any start method: the very tensors that one process makes, in the order of the steps."""
    assert_same_steps(steps(folder, workers=workers, context=context, prefetch=3), steps(folder))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [1, 5, 10**6])
def test_the_state_is_a_seed_and_a_step(folder, workers, first):
    """A new loader that begins at a step goes on as the old one would have: nothing but the step has to be kept.

    The millionth step is asked for like any other, and no step before it is looked at.
    """
    before = list(steps(folder, first=first - 1, end=first + 3))
    assert_same_steps(steps(folder, first=first, end=first + 3, workers=workers), before[1:])


@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_share_a_global_batch(folder, workers):
    """Two ranks of two accumulation steps see, together, the rows of one rank, in order: none twice, none lost."""
    alone = [torch.cat([rows_of(batch) for batch in step]) for step in steps(folder, world=1)]
    ranks = [list(steps(folder, rank=rank, workers=workers)) for rank in (0, 1)]
    for step, wanted in enumerate(alone):
        found = [rows_of(ranks[rank][step][a]) for a in (0, 1) for rank in (0, 1)]
        assert torch.equal(torch.cat(found).sort()[0], wanted.sort()[0])


def rows_of(batch) -> torch.Tensor:
    return batch.rows_N if isinstance(batch, PretrainBatch) else batch.rows_B


def test_workers_leave_signals_to_their_rank(folder):
    """A launcher signals all processes of a job; the batches that a last step needs still come."""
    iterator = iter(steps(folder, workers=1))
    first = next(iterator)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(iterator._workers[0].pid, number)
    rest = list(iterator)
    assert len([first, *rest]) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_workers_end_with_a_killed_rank():
    """Even those that are in the middle of handing a batch to nobody, and at once."""
    rank = subprocess.Popen(
        helpers.program("loader_workers", "orphan"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=helpers.environment(),
    )  # fmt: skip
    with rank:
        worker = Path("/proc", rank.stdout.readline().strip(), "stat")
        assert worker.exists()
        rank.kill()
        rank.wait()
        deadline = time.monotonic() + 2
        while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_failed_run_ends_although_it_has_workers(folder):
    """An error amid the steps ends the process with its words: workers ignore the SIGTERM by which Python would end them."""
    if shard_reader.open_folder(folder).manifest.kind == "finetune":
        pytest.skip("the same for both kinds")
    command = helpers.program("loader_workers", "failing", folder)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=helpers.environment())
    assert done.returncode == 1 and "the step failed" in done.stderr


def test_workers_that_hang_in_their_fork_are_replaced(folder):
    """A lock that another thread held at the fork stops a worker before its first line: without a remedy the run would wait."""
    if isinstance(shard_reader.open_folders([folder]), shard_reader.FinetuneShards):
        pytest.skip("the program collates texts; one kind is enough")
    outputs = []
    for times in (0, 1, 4):  # of two workers: none, one of the first two, all of the first two attempts
        done = subprocess.run(
            helpers.program("loader_workers", "hanging", folder, times), capture_output=True, text=True, timeout=200,
            env=helpers.environment(PYTHONPATH=helpers.PYTHONPATH),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("did not start") == {0: 0, 1: 1, 4: 2}[times]
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0].endswith(" 2\n")
    done = subprocess.run(
        helpers.program("loader_workers", "hanging", folder, 100), capture_output=True, text=True, timeout=200,
        env=helpers.environment(PYTHONPATH=helpers.PYTHONPATH),
    )  # fmt: skip
    assert done.returncode == 1 and "workers do not start" in done.stderr
