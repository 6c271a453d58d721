"""What DeepSpeed's engines do otherwise than a training run needs, put right on the engine that was built.

Each function says what DeepSpeed does, at which ZeRO stage, and looks for the attribute that it changes: a version that does
right by itself is left alone.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from bge_ds.deepspeed_engine import optimizer_state


def apply(engine) -> None:
    """All that this engine needs, once, before its first step."""
    _forget_empty_step(engine)
    _skip_what_is_not_finite(engine)
    _read_norm_once(engine.optimizer)
    if engine.fp16_enabled() and not hasattr(engine.optimizer, "scale_if_loss"):
        _scale_losses(engine)


def _skip_what_is_not_finite(engine) -> None:
    """Have the engine's step change nothing, the schedule included, where any rank's gradient is not finite.

    DeepSpeed does so by itself in fp16, and from 0.19.8 on wherever it wraps the optimizer (ZeRO 1 to 3, and 16 bits).
    Older versions take NaN for a norm of -1 and go on; at ZeRO 0 in fp32 no version looks. How an optimizer tells the engine
    that it has not stepped is its attribute `overflow`.
    """
    from deepspeed.runtime import utils

    optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # how many steps may be skipped is --max_nonfinite_steps
    if isinstance(optimizer, torch.optim.Optimizer):
        _check_norm_first(engine, optimizer)
    elif hasattr(utils, "is_invalid_grad_norm"):
        return
    elif hasattr(optimizer, "check_grad_overflow"):  # ZeRO 1 and 2
        optimizer.check_grad_overflow = True
    elif hasattr(optimizer, "_get_norm_groups") and not engine.fp16_enabled():  # ZeRO 3
        norms, go_on = optimizer._get_norm_groups, optimizer._overflow_check_and_loss_scale_update

        def check_norms_first() -> bool:
            found = norms()
            optimizer._get_norm_groups = lambda: found
            optimizer.overflow = any(float(norm) < 0 for norm in found)
            return go_on()

        optimizer._overflow_check_and_loss_scale_update = check_norms_first


def _check_norm_first(engine, optimizer: torch.optim.Optimizer) -> None:
    """ZeRO 0 in fp32: norm, clipping and step in one place. The gradient is reduced by then: all ranks find the same."""
    clip, take = engine.gradient_clipping(), optimizer.step
    optimizer.overflow = False
    engine.clip_fp32_gradients = lambda: None  # DeepSpeed's would compute the norm once more, and tell it to nobody

    @functools.wraps(take)  # a schedule has marked the step as seen
    def step(closure=None):
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        optimizer._global_grad_norm = float(norm)
        optimizer.overflow = not math.isfinite(optimizer._global_grad_norm)
        if optimizer.overflow:
            return
        if clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        take(closure)

    optimizer.step = step


def _read_norm_once(optimizer) -> None:
    """ZeRO 1 and 2: bring the norm of the gradient to the host as soon as it is known.

    DeepSpeed looks at it again for each group of parameters; on a GPU, every look would wait for the update before it.
    """
    if not hasattr(optimizer, "scaled_global_norm"):
        return
    find = optimizer.scaled_global_norm

    @functools.wraps(find)
    def scaled_global_norm(*args, **kwargs):
        norm = find(*args, **kwargs)
        return norm.cpu() if isinstance(norm, torch.Tensor) else norm

    optimizer.scaled_global_norm = scaled_global_norm


def _forget_empty_step(engine) -> None:
    """ZeRO 0 in 16 bits: undo the step with gradients of 0 by which DeepSpeed's wrapper makes the optimizer's states.

    It would count: Adam's correction of its moments would be a step ahead, which halves the first real one, and the weights
    would have decayed once more than at other stages.
    """
    copies = optimizer_state.fp32_masters(engine.optimizer)
    if not copies:
        return
    optimizer_state.base_optimizer(engine.optimizer).state.clear()
    with torch.no_grad():
        for parameter in engine.module.parameters():
            if id(parameter) in copies:
                holder, offset = copies[id(parameter)]
                holder.view(-1).narrow(0, offset, parameter.numel()).copy_(parameter.view(-1))


def _scale_losses(engine) -> None:
    """fp16 at ZeRO 0: multiply the loss by the scale that the step divides the gradients by.

    DeepSpeed's `backward` does so for its ZeRO optimizers alone (0.19.8). At stage 0 gradients would be divided by 65,536 that
    were never multiplied: too small to be clipped, and below Adam's epsilon, so that a run learns next to nothing. The value
    that the backward pass starts from is set, not multiplied: a version that scales by itself is not counted twice.
    """
    optimizer, run_backward = engine.optimizer, engine.backward
    take = optimizer.step

    @functools.wraps(run_backward)
    def backward(loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True):
        first = optimizer.loss_scale / (engine.gradient_accumulation_steps() if scale_wrt_gas else 1)
        loss.register_hook(lambda grad: torch.full_like(grad, first))
        return run_backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)

    @functools.wraps(take)
    def step(closure=None):
        scale = optimizer.loss_scale
        take(closure)
        if hasattr(optimizer, "fp32_groups"):  # the wrapper of torch's optimizers keeps the norm as it was scaled
            optimizer._global_grad_norm /= scale

    engine.backward, optimizer.step = backward, step
