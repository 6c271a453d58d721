"""A step of each command on the meta device, as a GPU would run it: shapes without values.

There, reading a value back, a shape that depends on values, and a tensor left on the CPU are errors; on a GPU the first two
make the loop wait for all that is queued.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec

import helpers
import pytest
import torch
from retromae_models import make_batch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM

from bge_ds.config.arguments import FinetuneArguments
from bge_ds.data.collate import ContrastiveBatch
from bge_ds.kernels.packed import chunk_bounds, pack
from bge_ds.losses.contrastive import Temperature
from bge_ds.modeling.compilation import pad_to_bucket
from bge_ds.modeling.encoder import FAMILIES, Encoder, load_backbone
from bge_ds.modeling.retromae import RetroMAE, RetroMAESettings
from bge_ds.objectives import contrastive, retromae

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the GPU's code path needs the triton package")


class NoHostData(TorchFunctionMode):
    """Refuses a tensor made on the device of numbers of the host: the copy waits for all that is queued."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func in (torch.tensor, torch.as_tensor) and torch.device((kwargs or {}).get("device") or "cpu").type == "meta"
        assert not made, f"{func.__name__} of host data waits for the device"
        return func(*args, **(kwargs or {}))


class NoBlockingCopies(TorchDispatchMode):
    """Refuses what a GPU would wait for and meta might not: looks at values, copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        reads = name in ("_local_scalar_dense", "nonzero") and args[0].device.type == "meta"
        assert not reads, f"{func} waits for the device"
        if name in ("_to_copy", "copy_"):
            wanted = (kwargs or {}).get("device") or args[0].device
            # A number (no dimensions) travels with the launch of the kernel that takes it.
            moved = [x for x in args if isinstance(x, torch.Tensor) and x.dim() and x.device.type != torch.device(wanted).type]
            assert not moved, f"{func} copies between devices"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["retromae", "dupmae", "mlm"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "roberta", "nomic_bert"])
def test_a_step_of_pretraining_never_waits(tmp_path, family, objective):
    """Forward and backward of every family and objective, dropout on; the step's counts come from the batch's host data."""
    path = helpers.make_model(family, tmp_path, dropout=0.1)
    backbone = load_backbone(AutoModelForMaskedLM, str(path))
    model = RetroMAE(backbone, RetroMAESettings(mask_id=4, objective=objective)).to("meta").train()
    batch = make_batch([12, 3, 7, 12, 2, 21]).to("meta", non_blocking=True)
    targets = retromae.divisors([batch], [retromae.count_targets([batch])])
    with NoHostData(), NoBlockingCopies():
        losses_5 = model(batch)
        retromae.weighted(losses_5, 0.2, targets[0]).backward()
    assert losses_5.shape == (5,) and losses_5.device.type == "meta"
    assert all(p.grad is not None for p in model.decoder.parameters()) if model.decoder else True


class PlainEngine:
    """What a fine-tuning step asks of DeepSpeed's engine, by torch alone."""

    def __init__(self, module):
        self.module = module
        self.optimizer = type("Optimizer", (), {"_coalesce_grad_reduction": True})()

    def __call__(self, texts):
        return self.module(texts)

    def backward(self, loss, **_):
        loss.backward()

    def coalesce_grad_reduction(self):
        return nullcontext()


def contrastive_batch(queries: int, group: int, max_tokens: int | None) -> ContrastiveBatch:
    """Groups of texts of many lengths; the last one is short, and one query sees its own group only."""
    own_BG = torch.arange(queries * group).view(queries, group)
    own_BG[-1, 1:] = -1
    passages = queries * group - group + 1
    lengths = [3 + 5 * k % 17 for k in range(queries + passages)]
    hashes_P = torch.arange(passages)
    texts, _ = pack(helpers.random_texts(lengths, vocab_size=60))
    return ContrastiveBatch(
        texts=texts, queries=queries, own_BG=own_BG, hashes_P=hashes_P,
        known_BK=hashes_P[own_BG[:, :1]].repeat(1, 2), own_only_B=torch.arange(queries) == 1, rows_B=torch.arange(queries),
        teacher_BG=torch.rand(queries, group),
        bounds=chunk_bounds(texts.runs, None, max_tokens) if max_tokens else None,
    )  # fmt: skip


FLAGS = {
    "as it is": {},
    "every objective": {"bidirectional": True, "false_negative_margin": 0.1, "use_mrl": True, "mrl_dims": [8, 16],
                        "learnable_temperature": True},
    "teacher": {"knowledge_distillation": True, "kd_loss_type": "m3_kd_loss"},
    "own group": {"use_inbatch_neg": False},
    "in pieces": {"sub_batch_tokens": 40},
}  # fmt: skip


POOLINGS = {"bert": "cls", "roberta": "mean", "modernbert": "mean"}


@pytest.mark.parametrize(
    ("family", "flags"),
    [(family, "as it is") for family in sorted(FAMILIES) if FAMILIES[family].unpadded]
    + [("bert", name) for name in FLAGS if name != "as it is"],
)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_of_fine_tuning_never_waits(tmp_path, family, flags, precision):
    """Forward and backward of every family and objective, dropout on, whole and in pieces."""
    pooling = POOLINGS.get(family, "last_token")
    model = Encoder.load(helpers.make_model(family, tmp_path, dropout=0.1), pooling)
    args = FinetuneArguments.build(
        output_dir="none", train_data="none", model_name_or_path="none", train_group_size=3, bf16=precision == "bf16",
        sentence_pooling_method=pooling, temperature=0.05, **FLAGS[flags],
    )  # fmt: skip
    if args.learnable_temperature:
        model.temperature = Temperature(args.temperature)
    engine = PlainEngine(model.to("meta", torch.bfloat16 if args.bf16 else torch.float32).train())
    batch = contrastive_batch(4, 3, args.sub_batch_tokens).to("meta", non_blocking=True)
    with NoHostData(), NoBlockingCopies():
        parts = contrastive.backward(engine, batch, args, contrastive.objective_of(args), lambda piece: None)
    assert parts.loss.device.type == "meta" and not parts.loss.shape
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_value_read_back_is_an_error(tmp_path):
    """The net holds: what the step is forbidden is caught."""
    with NoHostData(), pytest.raises(AssertionError, match="waits for the device"):
        torch.tensor([1.0, 2.0], device="meta")
    with NoBlockingCopies(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        torch.empty(3, device="meta").nonzero()


def test_filling_a_row_up_never_waits():
    """The sizes of the filler are known on the host: no value is read back, nothing is copied."""
    texts = make_batch([12, 3, 7, 12, 2, 21]).texts.to("meta", non_blocking=True)
    with NoHostData(), NoBlockingCopies():
        filled, ids_T = pad_to_bucket(texts, texts.ids_T, 64)
    assert ids_T.device.type == "meta" and ids_T.numel() == filled.tokens == 64
    assert filled.cu_seqlens.shape == (8,) and filled.positions_T.shape == (64,)
