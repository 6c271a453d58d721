"""The engine: which weights decay, and what 16 bits and each Adam make of them."""

from __future__ import annotations

import helpers
import pytest
from transformers import BertModel

from bge_ds.deepspeed_engine.engine import parameter_groups


def test_biases_and_norms_do_not_decay():
    """Weight decay falls on matrices and embeddings; on no bias, no norm; frozen parameters are in no group."""
    model = BertModel(helpers.tiny_config("bert"))
    model.pooler.requires_grad_(False)
    decayed, spared = (g["params"] for g in parameter_groups(model, 0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in spared)
    assert not any("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in decayed)
    assert len(decayed) + len(spared) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_saved_weights_are_the_fp32_masters(stage):
    """After steps far below bf16's resolution the saved weights are not bf16 numbers: the rounded copy would lose them."""
    out = helpers.run_ranks("tiny_engines", 1, "masters", stage)
    assert float(out.rsplit(":", 1)[1]) < 0.1


def test_buffers_keep_their_precision():
    """In 16-bit runs weights are rounded, and nothing else: rounded rotary frequencies turn late tokens by wrong angles."""
    helpers.run_ranks("tiny_engines", 1, "buffers")


def test_every_adam_is_the_same_adam():
    """DeepSpeed's Adam, compiled here, takes the steps of torch's; the summary names what runs."""
    out = helpers.run_ranks("tiny_engines", 1, "adams").splitlines()
    assert [line for line in out if "Adam" in line and "Time" not in line and "Config" not in line][:2] == [
        "AdamW",
        "AdamW (fused)",
    ]
    assert "DeepSpeedCPUAdam" in out
