"""Ranks that load models under ZeRO 3: every weight and buffer is that of whole loading, and no rank holds a whole one.

Arguments: model folders. Prints "ok" once a folder, and "refused" on each rank for a config that does not fit the last one.
"""

import deepspeed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.modeling.encoder import load_backbone


def compare(kind, folder: str, bf16: bool) -> None:
    whole = load_backbone(kind, folder)
    with engines.sharded_loading("zero3", bf16=bf16):
        shared = load_backbone(kind, folder)
    assert engines.count_elements(shared) == engines.count_elements(whole)
    names = dict(whole.named_parameters())
    assert list(names) == [name for name, _ in shared.named_parameters()]
    for name, parameter in shared.named_parameters():
        assert parameter.numel() == 0 and parameter.ds_tensor.numel() <= parameter.ds_numel // 2 + 1, name
        with deepspeed.zero.GatheredParameters([parameter]):
            assert parameter.dtype == (torch.bfloat16 if bf16 else torch.float32)
            assert "pooler" in name or torch.equal(parameter, names[name].to(parameter.dtype)), name
    for (name, buffer), other in zip(whole.named_buffers(), shared.buffers(), strict=True):
        assert buffer.dtype == other.dtype and torch.equal(buffer, other), name


def main(*folders: str) -> None:
    engines.start(use_cpu=True)
    for folder in folders:
        for kind in (AutoModel, AutoModelForMaskedLM) if "bert" in folder else (AutoModel,):
            for bf16 in (False, True):
                compare(kind, folder, bf16)
        with engines.sharded_loading("zero2"):
            assert all(p.numel() for p in load_backbone(AutoModel, folder).parameters())
        # Outside of the block, transformers loads as it always did: the check of the saved model runs on rank 0 alone.
        if collectives.rank() == 0:
            assert all(p.numel() for p in load_backbone(AutoModel, folder).parameters())
            print("ok", end=" ")

    config = AutoConfig.from_pretrained(folders[-1])
    config.intermediate_size += 2
    try:
        with engines.sharded_loading("zero3"):
            load_backbone(AutoModel, folders[-1], config=config)
    except (RuntimeError, ValueError) as error:
        assert "size mismatch" in str(error)
        print("refused", end=" ")
