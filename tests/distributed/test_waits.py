"""How often a whole step, engine and optimizer with it, makes the host wait for the device: each time, the GPU runs dry.

Two ranks run both commands on the CPU, and there take a GPU's way with the kernels in Triton's interpreter. Every operation
that hands a value of a tensor to the host, or whose result has a size that depends on values, is counted with the place that
called it. (Dropout is off: it takes its seeds from the host's own generator, which here looks the same. `test_on_meta` has it.)
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import helpers
import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the GPU's way needs the triton package")

RANK_SCRIPT = """
import json, os, sys, traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
from bge_ds.kernels import triton_support
triton_support.is_gpu = lambda device_type: True

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from bge_ds import finetune, pretrain
from bge_ds.config.arguments import FinetuneArguments, PretrainArguments
from bge_ds.distributed import collectives, communication_profile as timing

OPERATIONS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero"}
READS = {"tolist", "numpy", "cpu", "__array__", "cuda"}
found = []

def place():
    frames = [f for f in traceback.extract_stack() if ("/bge_ds/" in f.filename or "/deepspeed/" in f.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"

def on_host(x):
    "Mark a tensor that would be on the host: what is computed of it and read costs no wait."
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

class Pace(timing.Pace):
    began_steps, modes = 0, ()

    def begin(self):
        super().begin()
        self.began_steps += 1
        if 2 < self.began_steps <= STEPS:  # two set up what the others use (ZeRO-3 its order), and then the model is saved
            found.append("step")
            self.modes = Called(), Dispatched()
            for mode in self.modes:
                mode.__enter__()

    def end(self, tokens):
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)
        self.modes = ()
        super().end(tokens)

from bge_ds.training import recorder
recorder.Pace = Pace
STEPS = int(sys.argv[2])
for command, flags in json.loads(sys.argv[1]):
    train, kind = (finetune.train, FinetuneArguments) if command == "finetune" else (pretrain.train, PretrainArguments)
    found.clear()
    train(kind.build(**flags, use_cpu=True))
    Path(f"{flags['output_dir']}.{collectives.rank()}.json").write_text(json.dumps(found))
"""
STEPS = 4
# Each with its reason.
ALLOWED = {
    # Whether the step counts: the norm of the gradient, at the end of the backward pass.
    "_local_scalar_dense at utils.py:is_invalid_grad_norm",  # DeepSpeed's own look at it, ZeRO 3
    "cpu at corrections.py:scaled_global_norm",  # ours, ZeRO 1 and 2
    "_local_scalar_dense at corrections.py:step",  # ours, ZeRO 0
}
# The numbers of the step to come, sent before this one's work: they have arrived, in the host's own memory.
AHEAD = "tolist at collectives.py:result"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(command, ZeRO stage) -> the waits of rank 0 in the last two steps, each behind a mark."""
    base = helpers.make_training_folder(tmp_path_factory.mktemp("waits"))
    helpers.make_model("bert", base / "model", num_hidden_layers=1, num_attention_heads=1)
    common = {
        "model_name_or_path": str(base / "model"), "cache_dir": str(base / "cache"), "learning_rate": 1e-3, "max_steps": STEPS,
        "logging_steps": STEPS, "per_device_train_batch_size": 2, "save_strategy": "no", "dataloader_num_workers": 1,
    }  # fmt: skip
    own = {
        "finetune": {"train_data": str(base / "groups.jsonl"), "train_group_size": 3, "negatives_cross_device": True,
                     "temperature": 0.05, "query_max_len": 16, "passage_max_len": 40},
        "pretrain": {"train_data": str(base / "texts.jsonl"), "max_seq_length": 40},
    }  # fmt: skip
    runs = [
        (command, common | own[command] | {"deepspeed": f"zero{stage}", "output_dir": str(base / f"{command}{stage}")})
        for command in own
        for stage in range(4)
    ]
    helpers.run_ranks(RANK_SCRIPT, 2, json.dumps(runs), str(STEPS), fresh=True)
    return {(c, s): json.loads((base / f"{c}{s}.0.json").read_text()) for c in own for s in range(4)}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_a_step_waits_once_at_its_end(found, command, stage):
    """A step reads one value, which says whether it counts; a second wait would leave the GPU idle amid a step."""
    steps = [[]]
    for one in found[command, stage]:
        if one == "step":
            steps.append([])
        elif one != AHEAD:
            steps[-1].append(one)
    assert len(steps) == STEPS - 1 and not steps[0]
    for waits in steps[1:]:
        assert len(waits) == 1 and set(waits) <= ALLOWED, waits
