"""A process group with NCCL's rules on a CPU: gloo underneath, what NCCL would refuse raises, every collective is recorded.

It is registered as `strict`, so that no code takes it for gloo. `record` lists what this rank has issued:
[phase of the run, collective, type, elements, ranks of the group, name of the collective of objects it is part of or ""].
What it cannot tell is where a tensor would lie on a GPU: `test_nccl_rules.py` asks that of the `meta` device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist

# The types of ProcessGroupNCCL's table.
KNOWN = {torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
         torch.bool}  # fmt: skip
OBJECTS = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
           "recv_object_list")  # fmt: skip
# Of gloo alone, or by any source: what NCCL has not.
MISSING = ("monitored_barrier", "recv_anysource")
# Each under its names in torch 2.11 and later.
COLLECTIVES = ("allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "all_gather_single", "allgather_coalesced",
               "allgather_into_tensor_coalesced", "all_gather_single_coalesced", "reduce_scatter", "_reduce_scatter_base",
               "reduce_scatter_single", "reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced", "alltoall_base",
               "all_to_all_single", "alltoall", "broadcast", "reduce", "gather", "scatter", "send", "recv",
               "barrier")  # fmt: skip

record: list[list] = []
phases = ["start"]
_objects = [""]


def tensors_of(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for one in value for tensor in tensors_of(one)] if isinstance(value, list | tuple) else []


def check(name: str, tensors: list[torch.Tensor]) -> None:
    """Raise where NCCL would, or would take other elements than are meant."""
    for tensor in tensors:
        if tensor.dtype not in KNOWN or (tensor.dtype == torch.bool and "reduce" in name):
            raise TypeError(f"{name}: NCCL does not know {tensor.dtype} there")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: a tensor of strides {tensor.stride()} is not contiguous")


class StrictGroup(dist.ProcessGroup):
    """Every collective is checked, recorded and then done by gloo."""

    def __init__(self, store, rank: int, size: int, timeout):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroup(store, rank, size)
        backend, kind = dist.ProcessGroupGloo(store, rank, size, timeout), dist.ProcessGroup.BackendType.GLOO
        self.gloo._register_backend(torch.device("cpu"), kind, backend)
        self.gloo._set_default_backend(kind)

    def getBackendName(self) -> str:
        return "strict"

    def issue(self, name: str, *args, **kwargs):
        tensors = tensors_of([*args, *kwargs.values()])
        check(name, tensors)
        largest = max(tensors, key=torch.numel, default=None)
        what = ("", 0) if largest is None else (str(largest.dtype), largest.numel())
        record.append([phases[-1], name, *what, self.size(), _objects[-1]])
        return getattr(self.gloo, name)(*args, **kwargs)


def _refuse(self, *args, **kwargs):
    raise NotImplementedError("NCCL has no such collective")


for _name in COLLECTIVES:
    if hasattr(dist.ProcessGroup, _name):
        setattr(StrictGroup, _name, functools.partialmethod(StrictGroup.issue, _name))
for _name in MISSING:
    setattr(StrictGroup, _name, _refuse)


def within(stack: list[str], name: str, function: Callable) -> Callable:
    """The function; while it runs, its name is on top of `stack` (`phases` or `_objects`), and recorded with what is issued."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        stack.append(name)
        try:
            return function(*args, **kwargs)
        finally:
            stack.pop()

    return wrapped


def then(phase: str, function: Callable) -> Callable:
    """The function; what is issued after it is recorded under that phase."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        phases[-1] = phase
        return function(*args, **kwargs)

    return wrapped


def install() -> None:
    """Make the backend known and have bge_ds's runs use it; their phases: start, step, between, log, save, evaluate, end."""
    from bge_ds.deepspeed_engine import engine
    from bge_ds.distributed import communication_profile
    from bge_ds.evaluation import evaluators
    from bge_ds.training import loop, metrics, recorder, resume

    dist.Backend.register_backend("strict", StrictGroup, devices=["cpu"])
    for name in OBJECTS:
        setattr(dist, name, within(_objects, name, getattr(dist, name)))
    start = engine.start
    engine.start = lambda **given: start(**given | {"backend": "strict"})
    communication_profile.Pace.begin = then("step", communication_profile.Pace.begin)
    communication_profile.Pace.end = then("between", communication_profile.Pace.end)
    metrics.Meter.read = within(phases, "log", metrics.Meter.read)
    recorder.Recorder.rates = within(phases, "log", recorder.Recorder.rates)
    resume.Saver.save = within(phases, "save", resume.Saver.save)
    evaluators.Evaluator.__call__ = within(phases, "evaluate", evaluators.Evaluator.__call__)
    loop.place_model = within(phases, "end", loop.place_model)
