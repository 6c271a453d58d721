"""NCCL's rules, held without a GPU: what a step may issue, on which device, of which type, in which order.

Runs use a process group that refuses what NCCL would refuse and records the rest (`strict_backend`). Devices are judged with
`meta` tensors: a value made on the CPU on its way to a collective shows as such among them.
"""

from __future__ import annotations

import json

import helpers
import pytest
import strict_backend
import torch
import torch.distributed as dist

from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives, communication_profile
from bge_ds.training import metrics

STEPS, LOGGED = 5, 3  # logged: steps 2, 4 and the last


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The training folder, and three texts to search among three."""
    base = helpers.make_training_folder(tmp_path_factory.mktemp("rules"))
    (base / "set" / "qrels").mkdir(parents=True)
    texts = [{"_id": str(k), "text": text, "title": ""} for k, text in enumerate(helpers.SENTENCES)]
    for name in ("corpus", "queries"):
        (base / "set" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    rows = "".join(f"{k}\t{k}\t1\n" for k in range(len(texts)))
    (base / "set" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return base


@pytest.fixture(scope="module")
def recorded(setting):
    """What each of two ranks issued: (command, ZeRO stage) -> [record of a rank]."""
    common = {
        "model_name_or_path": str(setting / "model"), "cache_dir": str(setting / "cache"), "learning_rate": 1e-3,
        "max_steps": STEPS, "logging_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "dataloader_num_workers": 0,
        "eval_data": [str(setting / "set")], "include_num_input_tokens_seen": "all",
    }  # fmt: skip
    own = helpers.command_flags(setting)
    runs = []
    for stage in range(4):
        for command in own:
            flags = common | own[command] | {"deepspeed": f"zero{stage}", "output_dir": str(setting / f"{command}{stage}")}
            if command == "finetune" and stage == 3:  # all that makes ranks differ, and every gather that there is
                flags |= {"sub_batch_tokens": 60, "gradient_accumulation_steps": 1, "bidirectional": True}
                flags |= {"learnable_temperature": True}
                lines = [json.loads(line) for line in (setting / "groups.jsonl").read_text().splitlines()]
                bare = [line | {"neg": []} if k % 3 else line for k, line in enumerate(lines)]
                (setting / "bare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
                flags["train_data"] = str(setting / "bare.jsonl")
            runs.append((command, flags))
    helpers.run_ranks("recorded_collectives", 2, json.dumps(runs))
    return {
        (command, stage): [json.loads((setting / f"{command}{stage}.{rank}").read_text()) for rank in range(2)]
        for command in own
        for stage in range(4)
    }


def misplaced(record: list[list]) -> list[list]:
    """What of a record makes the host wait where the GPU should not: collectives of objects and barriers among the steps."""
    return [one for one in record if one[0] in ("step", "between", "log", "evaluate") and (one[5] or one[1] == "barrier")]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_no_objects_and_no_barriers_among_the_steps(recorded, command, stage):
    """Steps, lines of the log and evaluations issue collectives of tensors only. One of objects pickles, and has the host wait
    for the GPU twice: in the loop, the GPU would run dry at each step."""
    for record in recorded[command, stage]:
        phases = {one[0] for one in record}
        assert {"start", "step", "log", "save", "evaluate", "end"} <= phases
        assert not misplaced(record)
        assert {one[5] for one in record} > {""}  # the starts and saves do issue some: they are seen


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_all_ranks_issue_the_same_in_the_same_order(recorded, command, stage):
    """Collectives are matched by their order alone: another order, type or size on one rank is a hang, or wrong numbers."""
    first, second = recorded[command, stage]
    assert first == second


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_between_steps_nothing_but_the_log(recorded, command, stage):
    """A step that is neither logged, saved nor evaluated ends without a further collective, and a line of the log costs four
    small ones: the sums, the ranks' times, their memory, their tokens."""
    record = recorded[command, stage][0]
    assert not [one for one in record if one[0] == "between"]
    log = [one for one in record if one[0] == "log"]
    assert len(log) == 4 * LOGGED and max(one[3] for one in log) < 100


def test_a_collective_of_objects_among_the_steps_is_found():
    """The judge of the tests above sees what it is for."""
    good = [
        ["step", "allreduce", "torch.float32", 9, 2, ""],
        ["save", "broadcast", "torch.int64", 1, 2, "broadcast_object_list"],
    ]
    assert not misplaced(good)
    assert misplaced([*good, ["log", "allgather", "torch.int64", 1, 2, "all_gather_object"]])
    assert misplaced([*good, ["step", "barrier", "", 0, 2, ""]])


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("allgather", torch.zeros(3, dtype=torch.int16)),
        ("allreduce", torch.zeros(3, dtype=torch.bool)),
        ("allreduce", torch.zeros(2, 3).t()),
    ],
)
def test_what_nccl_refuses_is_refused(name, tensor):
    """The backend of these tests is as strict as NCCL: gloo would take a view's elements, and 16-bit integers."""
    with pytest.raises((TypeError, ValueError), match=name):
        strict_backend.check(name, [[tensor], tensor][1:])


# ------------------------------------------------------------------------------------------------------------ devices


@pytest.fixture
def issued(monkeypatch):
    """This process is rank 0 of two on NCCL; what it gives to collectives, which do nothing."""
    given: list[torch.Tensor] = []

    def take(*args, **kwargs):
        given.extend(strict_backend.tensors_of([*args, *kwargs.values()]))

    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "rank", lambda: 0)
    for name in ("all_reduce", "all_gather", "broadcast", "all_to_all_single"):
        monkeypatch.setattr(dist, name, take)
    monkeypatch.setattr(collectives, "_all_gather", take)
    monkeypatch.setattr(collectives, "_reduce_scatter", take)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    return given


def read_meter(device: torch.device):
    meter = metrics.Meter(device)
    meter.add(loss=1.0, tokens=3, flops=1e9)
    meter.read()


def read_pace(device: torch.device):
    pace = communication_profile.Pace(device)
    pace.ranks, pace.hosts = 2, ["a", "b"]
    pace.begin()
    pace.end(7)
    pace.read()


def gather_rows(device: torch.device, dtype: torch.dtype, counts: list[int] | None):
    rows = torch.ones(5, 3, device=device, dtype=dtype)
    rows = rows.t().requires_grad_(dtype.is_floating_point)  # not contiguous
    out = collectives.all_gather_rows(rows, counts)
    if dtype.is_floating_point:
        torch.autograd.grad(out.sum(), rows)


@pytest.mark.parametrize(
    "work",
    [
        read_meter,
        read_pace,
        metrics.peak_memory,
        lambda device: collectives.gather_counts(3, device),
        lambda device: collectives.largest(3, device),
        lambda device: collectives.sum_over_ranks(torch.ones(2, 3, device=device).t()),
        lambda device: gather_rows(device, torch.float32, None),
        lambda device: gather_rows(device, torch.bfloat16, [3, 7]),
        lambda device: gather_rows(device, torch.int64, None),
    ],
)
def test_collectives_are_given_contiguous_tensors_of_the_device(issued, work):
    """Whatever takes a device keeps to it: NCCL refuses a CPU tensor, and takes a view's elements as they lie in memory."""
    try:
        work(torch.device("meta"))
    except (NotImplementedError, RuntimeError) as error:  # a number read from a tensor without values
        assert "meta" in str(error)
    assert issued and all(tensor.device.type == "meta" for tensor in issued)
    strict_backend.check("allreduce", issued)


def test_a_barrier_names_its_gpu(issued, monkeypatch):
    """On NCCL the barrier is told the rank's GPU; elsewhere torch refuses to be told one."""
    said = []
    monkeypatch.setattr(dist, "barrier", lambda **given: said.append(given["device_ids"]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    collectives.barrier()
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "gloo")
    collectives.barrier()
    assert said == [[3], None]


def test_the_device_is_set_before_the_group_is_made(monkeypatch):
    """`set_device` first, then the group, bound to that device: until then everything lands on GPU 0, NCCL's barrier too."""
    import types

    import deepspeed

    order = []

    class Accelerator:
        communication_backend_name = staticmethod(lambda: "nccl")
        device_count = staticmethod(lambda: 2)
        set_device = staticmethod(lambda index: order.append(("set_device", index)))

        @staticmethod
        def device_name(index: int | None = None) -> str:
            return "cuda" if index is None else f"cuda:{index}"

    monkeypatch.setattr(deepspeed, "get_accelerator", Accelerator)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *args, **given: order.append(("deepspeed",)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engines.failure_detector, "store", lambda: types.SimpleNamespace(set_timeout=lambda timeout: None))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **given: order.append(("group", backend, str(given["device_id"])))
    )
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert engines.start() == torch.device("cuda", 1)
    assert order == [("set_device", 1), ("group", "nccl", "cuda:1"), ("deepspeed",)]

    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 2 and this process sees 2 GPUs; .* as it has GPUs"):
        engines.start()


def test_the_watching_thread_touches_no_gpu():
    """Its modules name no device: a thread that waits for the GPU could not end a run whose GPU hangs."""
    folder = helpers.REPO / "bge_ds" / "health"
    for name in ("failure_detector", "watcher", "rendezvous", "preemption", "connections"):
        text = (folder / f"{name}.py").read_text()
        assert "cuda" not in text and "synchronize" not in text
        assert all("torch.distributed as dist" in line for line in text.splitlines() if line.startswith("import torch"))
        assert "dist.all_" not in text and "dist.broadcast" not in text
