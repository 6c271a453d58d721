"""Operations counted from shapes, against what torch counts while it runs."""

from __future__ import annotations

import helpers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from bge_ds.kernels.packed import pack
from bge_ds.modeling.encoder import Encoder
from bge_ds.modeling.flops import attention_flops, backbone_flops


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_backbone_s_operations(tmp_path, family):
    """Linear layers and attention, forward and backward, of the padded model on texts of one length: nothing is padded."""
    helpers.make_model(family, tmp_path, attention_dropout=0.0)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    texts, _ = pack(helpers.random_texts([12] * 4))
    with FlopCounterMode(display=False) as counter:
        hidden = model(input_ids=texts.ids_T.view(4, 12)).last_hidden_state
        hidden.sum().backward()
    counted = counter.get_total_flops()
    # torch counts the gradient of the first layer's input, which embeddings need, and ModernBERT's rotary angles.
    assert backbone_flops(model, texts.runs) == pytest.approx(counted, rel=0.01)


def test_a_window_and_frozen_weights_save_operations(tmp_path):
    """Attention is counted as far as a window reaches; a frozen weight has no gradient to compute."""
    helpers.make_model("modernbert", tmp_path)
    encoder = Encoder.load(str(tmp_path))
    texts, _ = pack(helpers.random_texts([100]))
    whole = backbone_flops(encoder.backbone, texts.runs)
    window = encoder.backbone.config.sliding_window
    encoder.backbone.config.sliding_window = 1000
    assert backbone_flops(encoder.backbone, texts.runs) - whole == attention_flops(32, 100 * (100 - 2 * window))
    encoder.backbone.requires_grad_(False)
    linear = whole - attention_flops(32, 100 * 100 + 100 * 2 * window)
    assert backbone_flops(encoder.backbone, texts.runs) == pytest.approx(linear * 2 / 3 + attention_flops(32, 2 * 100 * 100))


def test_zero_for_no_texts(tmp_path):
    """No texts, no operations."""
    model = AutoModel.from_pretrained(helpers.make_model("bert", tmp_path))
    assert backbone_flops(model, []) == 0
    assert torch.isfinite(torch.tensor(backbone_flops(model, pack(helpers.random_texts([2]))[0].runs)))
