"""The padding-free forward is the padded stock model, output and gradients."""

from __future__ import annotations

import helpers
import pytest
import torch
from transformers import AutoConfig

from bge_ds.data.batches import pack
from bge_ds.modeling.encoder import Encoder, check_lengths

# fp32 sums in another order: observed 4e-7 on the output.
TOLERANCE = 2e-6


def build(path, attention=None, pooling="mean"):
    return Encoder.load(path, pooling=pooling, attention=attention).eval()


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_free_equals_padded(tmp_path, family, pooling):
    """Same vectors and same gradient of every parameter; without it, texts would see each other or sit at wrong places."""
    path = helpers.make_model(family, tmp_path)
    texts, _ = pack(helpers.random_texts([5, 17, 3, 40, 17, 100, 5, 1], first=0, last=2))
    weights = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    ours, padded = build(path, None, pooling), build(path, "sdpa", pooling)
    assert ours.backbone.config._attn_implementation != padded.backbone.config._attn_implementation
    out, expected = ours(texts), padded(texts)
    assert (out - expected).abs().max() < TOLERANCE
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(padded.named_parameters())
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None, name
            continue
        difference = (parameter.grad - theirs[name].grad).abs().max()
        # Key biases have a true gradient of zero: compare with the size of the layer's, not of their own noise.
        assert difference <= 1e-5 * max(theirs[name].grad.abs().max(), 1e-1), name


def test_a_text_does_not_see_its_neighbours(tiny_bert_path):
    """A text's vector is the same alone and in any company, and vectors come back in the caller's order."""
    encoder = build(tiny_bert_path)
    texts = helpers.random_texts([9, 30, 4, 9, 9])
    together = encoder(pack(texts)[0])
    alone = torch.cat([encoder(pack([text])[0]) for text in texts])
    assert (together - alone).abs().max() < TOLERANCE
    assert (together[0] - together[3]).abs().max() > 1e-3  # two texts of one length are not one text


def test_encode_ids_batches_change_nothing(tiny_bert_path):
    """encode_ids gives each text's vector whatever the batch it falls into, in the caller's order."""
    encoder = build(tiny_bert_path)
    texts = helpers.random_texts([9, 30, 4, 9, 50, 2])
    assert (encoder.encode_ids(texts, batch_tokens=20) - encoder(pack(texts)[0])).abs().max() < TOLERANCE


def test_real_model_keeps_its_vectors(minilm_path):
    """all-MiniLM-L6-v2 through our forward gives sentence-transformers' vectors."""
    from sentence_transformers import SentenceTransformer

    from bge_ds.data.records import load_tokenizer

    sentences = [s * k for s, k in zip(helpers.SENTENCES, [1, 3, 1, 2, 1, 8], strict=True)]
    reference = SentenceTransformer(str(minilm_path), device="cpu")
    reference.max_seq_length = 256
    ids = load_tokenizer(str(minilm_path))(sentences, truncation=True, max_length=256)["input_ids"]
    ours = build(minilm_path).encode_ids(ids)
    assert (ours - torch.from_numpy(reference.encode(sentences, normalize_embeddings=True))).abs().max() < TOLERANCE


def test_texts_longer_than_the_positions_are_refused(tiny_bert_path, tmp_path):
    """A length the position embeddings do not reach is an error before training, not an index error inside it."""
    check_lengths(AutoConfig.from_pretrained(tiny_bert_path), passage_max_len=130)
    with pytest.raises(ValueError, match="--passage_max_len 131 is more than the 130 positions"):
        check_lengths(AutoConfig.from_pretrained(tiny_bert_path), passage_max_len=131)
    roberta = AutoConfig.from_pretrained(helpers.make_model("roberta", tmp_path))
    with pytest.raises(ValueError, match="128 positions"):
        check_lengths(roberta, query_max_len=129)
