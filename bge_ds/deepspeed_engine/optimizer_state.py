"""Where this rank keeps the optimizer state of each trained parameter, at every ZeRO stage.

The values are the same at every stage, in other places: of each parameter an fp32 master copy, and of that copy the optimizer's
state (Adam's two moments, its number of steps). A `Fragment` says where a part of one parameter lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

_COUNTERS = ("global_steps", "skipped_steps", "global_samples")
_GROUP = ("lr", "initial_lr", "betas", "momentum")  # what a schedule may change
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Fragment(NamedTuple):
    """Elements [start, start + numel) of a flat trained parameter, as an optimizer of this rank keeps them.

    master: the tensor that `optimizer` updates; the fragment begins at its element `offset`. replicated: on every rank.
    """

    name: str
    start: int
    numel: int
    master: torch.Tensor
    offset: int
    optimizer: torch.optim.Optimizer
    replicated: bool = False

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fragment's numel elements of a tensor that is laid out as the master is."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    def state_tensor(self, key: str) -> torch.Tensor:
        """The state `key`, of the master's shape; a missing one is made here as the optimizer's first step would make it."""
        state = self.optimizer.state[self.master]
        if key not in state:
            wide = getattr(self.optimizer, "fp32_optimizer_states", False)  # DeepSpeed's CPUAdam
            state[key] = torch.zeros_like(self.master, dtype=torch.float32 if wide else None, requires_grad=False)
        return state[key]

    def set_number(self, key: str, value: float) -> None:
        """A count in the type of this optimizer: torch's own keep it in a tensor, DeepSpeed's as an integer."""
        number: torch.Tensor | int = int(value)
        if type(self.optimizer).__module__.startswith("torch."):
            on_device = any(self.optimizer.defaults.get(name) for name in ("fused", "capturable"))
            number = torch.tensor(value, dtype=torch.float32, device=self.master.device if on_device else "cpu")
        self.optimizer.state[self.master][key] = number


def fragments(engine) -> Iterator[Fragment]:
    """All that this rank's optimizer keeps, in the order of the parameters. Raises ValueError where it lies on a disk."""
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise ValueError(
            '--deepspeed offloads to NVMe, where checkpoints do not reach; offload to "cpu", or give --save_only_model'
        )
    base, masters = base_optimizer(optimizer), fp32_masters(optimizer)
    # ZeRO 1 and 2, and DeepSpeed's wrapper for 16-bit weights with fp32 gradients at stage 1.
    partitions = getattr(optimizer, "single_partition_of_fp32_groups", None)
    partitions = partitions or getattr(optimizer, "fp32_groups_flat_partition", None)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            yield from _sharded(optimizer, base, name, parameter)
        elif hasattr(parameter, "_hp_mapping"):
            if (mapping := parameter._hp_mapping) is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(name, here.start, here.numel, partitions[mapping.param_group_index], there.start, base)
        else:
            master, offset = masters.get(id(parameter), (parameter, 0))
            yield Fragment(name, 0, parameter.numel(), master, offset, base, replicated=True)


def _sharded(optimizer, base: torch.optim.Optimizer, name: str, parameter) -> Iterator[Fragment]:
    """ZeRO 3: equal shares, the last ones padded. Where a part of the states is offloaded, two optimizers have them."""
    group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = torch.distributed.get_rank(parameter.ds_process_group) * share
    numel = min(share, parameter.ds_numel - start)
    on_device = optimizer.offload_optimizer and optimizer.subgroup_to_device[group] != "cpu"
    if numel > 0:
        master = optimizer.fp32_partitioned_groups_flat[group]
        yield Fragment(name, start, numel, master, offset, optimizer.backup_optimizer if on_device else base)


def base_optimizer(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def fp32_masters(optimizer) -> dict[int, tuple[torch.Tensor, int]]:
    """id of a 16-bit parameter -> (tensor that holds its fp32 master copy, where in it), at ZeRO 0.

    DeepSpeed's own accessor knows of none there.
    """
    found = {}
    if isinstance(wholes := getattr(optimizer, "fp32_groups", None), list):
        for halves, group in zip(optimizer.fp16_groups, wholes, strict=True):
            found |= {id(half): (whole, 0) for half, whole in zip(halves, group, strict=True)}
    elif isinstance(flats := getattr(optimizer, "fp32_groups_flat", None), list) and hasattr(optimizer, "fp16_groups"):
        for halves, flat in zip(optimizer.fp16_groups, flats, strict=True):
            offset = 0
            for half in halves:
                found[id(half)] = (flat, offset)
                offset += half.numel()
    return found


def trained_shapes(engine) -> dict[str, list[int]]:
    """The trained parameters, whole."""
    named = engine.module.named_parameters()
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in named if p.requires_grad}


def describe(engine) -> dict:
    """What is the same on all ranks, in plain numbers and lists."""
    scaler = _scaler(engine.optimizer)
    return {
        "optimizer": type(base_optimizer(engine.optimizer)).__name__,
        "parameters": trained_shapes(engine),
        "counters": {name: int(getattr(engine, name)) for name in _COUNTERS},
        "schedule": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
        "groups": [{key: group[key] for key in _GROUP if key in group} for group in engine.optimizer.param_groups],
        "scaler": {name: getattr(scaler, name) for name in _SCALER if getattr(scaler, name, None) is not None},
    }


def restore_described(engine, described: dict) -> None:
    """Put back what `describe` gave: counters, schedule, learning rates, loss scale."""
    for name, value in described["counters"].items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if engine.lr_scheduler is not None and described["schedule"] is not None:
        engine.lr_scheduler.load_state_dict(described["schedule"])
    for group, saved in zip(engine.optimizer.param_groups, described["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    scaler = _scaler(engine.optimizer)
    for name, value in described["scaler"].items():
        if getattr(scaler, name, None) is not None:
            setattr(scaler, name, value)


def _scaler(optimizer):
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


@contextmanager
def overwriting(engine) -> Iterator[list[Fragment]]:
    """All fragments, whose masters may be overwritten within; at the end, the weights that compute are made from them."""
    optimizer, found = engine.optimizer, list(fragments(engine))
    sharded = hasattr(optimizer, "fp32_partitioned_groups_flat")
    if sharded:
        optimizer.checkpoint_event_prologue()
    yield found
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif sharded:
        for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            if master.numel():
                optimizer.fp16_partitioned_groups_flat[number].data.copy_(master.data)
            optimizer._unflatten_partitioned_parameters(number)
        # Small ones are kept whole on every rank: given up here, they are gathered again by the epilogue.
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
    else:
        named = dict(engine.module.named_parameters())
        for fragment in found:
            if fragment.master is not named[fragment.name]:
                named[fragment.name].data.view(-1).copy_(fragment.view(fragment.master))
