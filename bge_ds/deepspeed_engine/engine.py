"""The DeepSpeed engine: a model sharded while it loads, the optimizer, the building, one reduction a step, whole weights.

The only importer of deepspeed.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import nn

from bge_ds.deepspeed_engine import corrections, op_builds, optimizer_state
from bge_ds.deepspeed_engine.ds_config import read_config
from bge_ds.distributed import collectives, communication_profile
from bge_ds.health import failure_detector

logger = logging.getLogger(__name__)
_MARKED = 256  # values of each frozen weight that its mark holds


def _deepspeed():
    """Imported when a run starts: it is slow to import, and chooses its accelerator by the environment as it is then."""
    import deepspeed

    return deepspeed


def start(*, use_cpu: bool = False, backend: str | None = None, timeout_s: int = 1800) -> torch.device:
    """Join the process group as the launcher's environment says (alone without one); the device of this rank."""
    if use_cpu or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        os.environ.update(alone)
    deepspeed = _deepspeed()
    accelerator = deepspeed.get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        backend = backend or "gloo"
        # oneDNN keeps a primitive for each shape of a 16-bit product, a thousand by default. Rows of texts hardly ever have
        # the same length twice: what is kept is memory (0.5 GB for a BERT of 6 layers) that serves nobody.
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(name, "32")
        _fit_allocator()
        # An all-reduce for inference that training never calls; compiling it costs half a minute and needs a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        # Before the group is made: NCCL, its barriers and collectives of objects take the current device.
        _check_local_rank(local_rank, accelerator.device_count())
        accelerator.set_device(local_rank)
    timeout, store = timedelta(seconds=timeout_s), failure_detector.store()
    if store is not None and not torch.distributed.is_initialized():
        # The ranks have met already; a second store would need a second port. DeepSpeed takes the group that is there.
        store.set_timeout(timeout)
        name = backend or accelerator.communication_backend_name()
        torch.distributed.init_process_group(
            name,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
            # Bound to it, NCCL connects at once, not in the first step, and need never guess.
            device_id=torch.device("cuda", local_rank) if name == "nccl" else None,
        )
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
    return torch.device("cpu" if on_cpu else accelerator.device_name(local_rank))


def _check_local_rank(local_rank: int, devices: int) -> None:
    """Refuse a rank without a GPU of its own: torch would say "invalid device ordinal", and not why."""
    if local_rank < devices:
        return
    seen = f"{devices} GPU{'s' * (devices != 1)}"
    raise ValueError(
        f"LOCAL_RANK is {local_rank} and this process sees {seen}; start at most as many ranks on a host as it has GPUs "
        "(--num_gpus, slots=), and let each process see all of them: under Slurm --gpus-per-node, not --gpus-per-task"
    )


def _fit_allocator() -> None:
    """Have glibc keep a training loop's memory together: large blocks by themselves, all others in one place.

    By itself it raises the size from which a block gets pages of its own, which go back when it is freed, to 32 MiB as blocks
    of that size come and go, and gives every thread a place of its own; a step's activations, of 10 MiB or so each, then leave
    holes that grow with the steps. Measured with 16 texts of 512 tokens (all-MiniLM-L6-v2's shape): 2.6 GiB at the peak in
    place of 3.1 to 3.3. Settings in the environment are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mmap_threshold, arena_max = -3, -8  # glibc's malloc.h
    mallopt(arena_max, 1)
    mallopt(mmap_threshold, 8 << 20)


def _free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


class _ShardedLoading:
    """What transformers looks for while it loads a model: that ZeRO 3 is on, and its settings."""

    def __init__(self, config: dict):
        self.config = config

    def is_zero3(self) -> bool:
        return True


@contextmanager
def sharded_loading(name_or_path: str, *, bf16: bool = False, fp16: bool = False):
    """Where the DeepSpeed config says ZeRO 3, a model loaded in here is sharded over the ranks as it is built.

    No rank but the first reads the weights, and none holds more than its share and one layer's; the values and their order
    are those of a model loaded whole and sharded afterwards. In a 16-bit run the shares are 16-bit, as the engine
    would make them: it takes its fp32 master copy from the 16-bit weights at every stage, so this rounds nothing else.
    To be entered after `start`, on every rank, around the loading alone.
    """
    zero = read_config(name_or_path)[0].get("zero_optimization", {})
    if zero.get("stage", 0) < 3:
        yield
        return
    from transformers.integrations import deepspeed as integration

    # What is "auto" depends on the model's size and plays no part in the building.
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {key: value for key, value in zero.items() if value != "auto"},
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": fp16},
    }
    holder = _ShardedLoading(config)  # transformers keeps a weak reference only
    integration.set_hf_deepspeed_config(holder)
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    finally:
        integration.unset_hf_deepspeed_config()
    # Weights of a wrong shape are seen by the rank that reads them, when all have loaded: the others would wait for it.
    message = collectives.broadcast_object(failure and str(failure))
    if failure is not None:
        raise failure
    if message is not None:
        raise ValueError(f"the first rank could not load the model: {message}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: those that decay, and those that do not: biases, norms, `no_weight_decay` modules."""
    norms = tuple(t for t in vars(nn).values() if isinstance(t, type) and "Norm" in t.__name__)
    spared = {
        id(p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if name == "bias"
        or isinstance(module, norms)
        or "norm" in type(module).__name__.lower()
        or getattr(module, "no_weight_decay", False)
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in spared], "weight_decay": 0.0},
    ]


def count_elements(model: nn.Module, trainable: bool = False) -> int:
    """Elements of all parameters, or of those that train; a sharded one counts whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or not trainable)


def build(
    model: nn.Module, config: dict, groups: list[dict], *, adam: dict, optim: str, schedule: Callable | None,
):  # fmt: skip
    """The DeepSpeedEngine around `model`, which it casts and moves.

    groups: of `parameter_groups`. adam: lr, betas, eps of AdamW, and optim, which of them: used where the
    config names no optimizer.
    schedule: optimizer -> torch scheduler, used where the config names none.
    """
    deepspeed = _deepspeed()
    accelerator = deepspeed.get_accelerator()
    for name, supported in (("fp16", accelerator.is_fp16_supported), ("bf16", accelerator.is_bf16_supported)):
        if config.get(name, {}).get("enabled") and not supported():
            other = "--bf16" if name == "fp16" else "--fp16"
            device = accelerator.device_name()
            raise ValueError(f"--{name}: this {device} device does not train in {name}; use {other} or neither")
    zero = config.get("zero_optimization", {})
    sharded = next((p.dtype for p in model.parameters() if hasattr(p, "ds_id") and p.is_floating_point()), None)
    if sharded is not None:
        # DeepSpeed takes a model built sharded as being in its type already; what was added since (adapters) is not.
        for parameter in model.parameters():
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(sharded)
    groups = [group for group in groups if group["params"]]
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    named = config.get("optimizer", {})
    if accelerator.device_name() == "cpu" and not offload and str(named.get("type")).lower() in ("adam", "adamw"):
        # What the file means by it is DeepSpeed's FusedAdam, which needs a compiler and has no advantage here.
        config = config | {"optimizer": named | {"params": {"torch_adam": True} | named.get("params", {})}}
    optimizer = None if "optimizer" in config else _make_optimizer(groups, adam, optim, offload)
    # DeepSpeed casts what is computed in 16 bits whole. Buffers are no weights: rotary frequencies in 16 bits would turn
    # later positions by wrong angles, other ones than the saved model's.
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=groups if optimizer is None else None,
        config=config,
        lr_scheduler=schedule if "scheduler" not in config else None,
        dist_init_required=False,
    )
    for name, buffer in model.named_buffers():
        if name in exact:
            buffer.data = exact[name].to(buffer.device)
    corrections.apply(engine)
    communication_profile.watch(deepspeed.comm.comm.cdb)
    return engine


def all_or_nothing(loss: torch.Tensor) -> torch.Tensor:
    """The same loss; where it is not finite, its gradients are not either, so that they alone tell whether a step counts."""
    return loss * (loss.detach() * 0 + 1)


def take_step(engine) -> bool:
    """The engine's step after a micro batch. At a step's last: whether the weights moved (not where the gradient of any rank
    was not finite; the same on every rank)."""
    engine.step()
    return engine.was_step_applied()


def _make_optimizer(groups: list[dict], adam: dict, optim: str, offload: bool) -> torch.optim.Optimizer:
    """AdamW by the name that --optim takes; where states are offloaded, DeepSpeed asks for its own."""
    deepspeed = _deepspeed()
    on_cpu = offload or deepspeed.get_accelerator().device_name() == "cpu"
    if optim != "adamw_deepspeed" and not offload:
        return torch.optim.AdamW(groups, **adam, fused=optim == "adamw_torch_fused" or None)
    try:
        with op_builds.turn("cpu_adam" if on_cpu else "fused_adam"):
            if on_cpu:
                return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **adam, adamw_mode=True)
            return deepspeed.ops.adam.FusedAdam(groups, **adam, adam_w_mode=True)
    except Exception as error:  # whatever a compiler may say
        kind = "CPUAdam" if on_cpu else "FusedAdam"
        raise ValueError(
            f"DeepSpeed's {kind} could not be built ({type(error).__name__}: {error}); it needs a C++ compiler"
            f"{'' if on_cpu else ' and the CUDA toolkit'}; install them, or take --optim adamw_torch_fused without offload"
        ) from error


def optimizer_name(engine) -> str:
    """The class that updates the weights, such as AdamW (fused) or DeepSpeedCPUAdam."""
    inner = optimizer_state.base_optimizer(engine.optimizer)
    fused = " (fused)" if getattr(inner, "defaults", {}).get("fused") else ""
    return type(inner).__name__ + fused


@contextmanager
def one_reduction(engine, passes: int):
    """Gives the backward function of `passes` backward passes that together are one step's gradient.

    They add up on each rank, in fp32 whatever the weights' type, and are reduced over the ranks once, at the end of the block.
    """
    if passes == 1:
        yield engine.backward
        return
    sums: dict[nn.Parameter, torch.Tensor] = {}

    def run_backward(loss: torch.Tensor) -> None:
        engine.backward(loss, scale_wrt_gas=False)
        for parameter in engine.module.parameters():
            gradient = parameter.grad
            if gradient is None or gradient.dtype in (torch.float32, torch.float64):
                continue
            # 16-bit sums of many passes would lose the small ones. In place: under ZeRO 3 a gradient cannot be assigned.
            if parameter in sums:
                sums[parameter] += gradient
            else:
                sums[parameter] = gradient.float()
            gradient.zero_()

    def finish() -> None:
        for parameter, total in sums.items():
            parameter.grad.copy_(total)

    if hasattr(engine.optimizer, "_coalesce_grad_reduction"):
        with engine.coalesce_grad_reduction():
            yield run_backward
            finish()
    elif engine.zero_optimization_stage() <= 1:
        # DeepSpeed's wrappers without partitioned gradients: they reduce when told to.
        with engine.no_sync():
            yield run_backward
        finish()
        engine.allreduce_gradients()
    else:
        raise ValueError(
            f"--sub_batch_size and --sub_batch_tokens do not work with DeepSpeed's {type(engine.optimizer).__name__}; "
            "take another ZeRO stage, or a batch that fits without them"
        )


def precision(engine) -> torch.dtype:
    """What the engine computes in."""
    return next(p.dtype for p in engine.module.parameters() if p.is_floating_point())


def full_parameters(engine, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """fp32 copies on the CPU of the trained weights by name, whatever the ZeRO stage. To be called on every rank.

    Rank 0 gets the dictionary, the others an empty one. Where the optimizer keeps an fp32 master copy it is taken:
    the computed (16-bit) weights are its rounding, so nothing is lost.
    """
    deepspeed = _deepspeed()
    out, masters = {}, optimizer_state.fp32_masters(engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        if not wanted(name):
            continue
        full = None
        if id(parameter) in masters:
            master, offset = masters[id(parameter)]
            full = master.detach().view(-1).narrow(0, offset, parameter.numel()).view(parameter.shape)
        elif parameter.requires_grad:
            full = deepspeed.utils.safe_get_full_fp32_param(parameter)
        if full is None:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                full = parameter.detach().clone()
        if collectives.rank() == 0:
            out[name] = full.to("cpu", torch.float32, copy=True)
    return out


@contextmanager
def whole(parameter: nn.Parameter):
    """The parameter is whole in here, under ZeRO 3 too; what the first rank writes into it stays. On every rank."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    with _deepspeed().zero.GatheredParameters([parameter], modifier_rank=0):
        yield


def mark_of_frozen(engine) -> str | None:
    """A hash of the names, shapes and first values of the weights that do not train, on every rank; None where all train.

    The same for any ZeRO stage and number of ranks.
    """
    frozen = [(name, p) for name, p in engine.module.named_parameters() if not p.requires_grad]
    if not frozen:
        return None
    digest, firsts = hashlib.sha256(), []
    for name, parameter in frozen:
        digest.update(f"{name} {list(getattr(parameter, 'ds_shape', parameter.shape))} ".encode())
        first = torch.zeros(min(_MARKED, getattr(parameter, "ds_numel", parameter.numel())), device=engine.device)
        own, start = parameter, 0 if collectives.rank() == 0 else len(first)
        if hasattr(parameter, "ds_id"):
            own = parameter.ds_tensor
            start = torch.distributed.get_rank(parameter.ds_process_group) * own.ds_numel
        own = own.detach().flatten()[: max(0, len(first) - start)]
        first[start : start + len(own)] = own.to(first)
        firsts.append(first)
    # Each value comes from one rank, the others add zeros to it.
    digest.update(collectives.sum_over_ranks(torch.cat(firsts)).cpu().numpy().tobytes())
    return digest.hexdigest()


def gradient_norm(engine) -> float | None:
    """The norm of the last step's whole gradient, before clipping, where the engine measured it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def skipped_steps(engine) -> dict[str, int]:
    """How many steps were skipped so far: in fp16 by the loss scaler, as is its way; otherwise as not finite."""
    return {"skipped_steps" if engine.fp16_enabled() else "nonfinite_steps_total": engine.skipped_steps}
