"""Ranks that take a GPU's way on the CPU; each writes to `OUTPUT_DIR.RANK.json` where its steps waited for the device.

Arguments: JSON of [[command, flags]], steps of a run. Needs TRITON_INTERPRET=1 in the environment.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bge_ds.distributed import collectives, communication_profile
from bge_ds.kernels import triton_support
from bge_ds.training import recorder
from programs.train import train

OPERATIONS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero"}
READS = {"tolist", "numpy", "cpu", "__array__", "cuda"}
IS_GPU = triton_support.is_gpu
found: list[str] = []


def place() -> str:
    frames = [f for f in traceback.extract_stack() if ("/bge_ds/" in f.filename or "/deepspeed/" in f.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"


def on_host(x):
    """Mark a tensor that would be on the host: what is computed of it and read costs no wait."""
    if isinstance(x, torch.Tensor):
        x.on_host = True
    return x


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in args if isinstance(x, torch.Tensor)]
        if given and all(hasattr(x, "on_host") for x in given):
            return on_host(func(*args, **(kwargs or {})))
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_", "index_put") and any(x is not None and x.dtype == torch.bool for x in args[1])
        unsized = name == "repeat_interleave" and func._overloadname == "Tensor" and (kwargs or {}).get("output_size") is None
        if name in OPERATIONS or masks or unsized:
            found.append(f"{name} at {place()}")
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, result = getattr(func, "__name__", ""), func(*args, **(kwargs or {}))
        if name in READS and not hasattr(args[0], "on_host"):
            found.append(f"{name} at {place()}")
        return on_host(result.clone()) if name == "cpu" else result


class Pace(communication_profile.Pace):
    began_steps, modes, steps_of_run = 0, (), 0

    def begin(self):
        super().begin()
        self.began_steps += 1
        # Two set up what the others use (ZeRO-3 its order), and then the model is saved.
        if 2 < self.began_steps <= self.steps_of_run:
            found.append("step")
            self.modes = Called(), Dispatched()
            for mode in self.modes:
                mode.__enter__()

    def end(self, tokens):
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)
        self.modes = ()
        super().end(tokens)


def main(runs: str, steps: str) -> None:
    for module in list(sys.modules.values()):  # those that have taken the function by name, too
        if getattr(module, "is_gpu", None) is IS_GPU:
            module.is_gpu = lambda device_type: True
    Pace.steps_of_run, recorder.Pace = int(steps), Pace
    for command, flags in json.loads(runs):
        found.clear()
        train(command, flags)
        Path(f"{flags['output_dir']}.{collectives.rank()}.json").write_text(json.dumps(found))
