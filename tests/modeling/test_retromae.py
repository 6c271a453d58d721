"""The losses of pre-training against a reference written from the formulas, one text at a time, with full logits and masks."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from retromae_models import make, make_batch
from transformers import AutoModelForMaskedLM, ElectraForMaskedLM

from bge_ds.data.collate import PretrainBatch
from bge_ds.kernels import masks
from bge_ds.modeling import vocabulary
from bge_ds.modeling.encoder import load_backbone
from bge_ds.modeling.retromae import EnhancedDecoder, RetroMAE, RetroMAESettings, load_decoder, save_decoder


def turned(x_LE, theta):
    """Rotary positions by complex numbers: features e and e + E/2 of position i turned by i * theta^(-2e/E)."""
    length, width = x_LE.shape
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    z = torch.complex(*x_LE.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


def theta_of(config):
    rope = getattr(config, "rope_parameters", None)
    return None if rope is None else rope.get("full_attention", rope)["rope_theta"]


def reference(model: RetroMAE, stock, batch: PretrainBatch):
    """Sums of all losses: the stock padded model with full logits, and the decoder from its formula, text by text."""
    texts, settings, decoder, config = batch.texts, model.settings, model.decoder, stock.config
    embeddings = stock.base_model.embeddings
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert") else 0
    masked_T = torch.zeros(texts.tokens, dtype=torch.bool)
    masked_T[batch.masked_M] = True
    corrupted_T = masks.corrupt(
        texts.ids_T, batch.keys_N.repeat_interleave(texts.cu_seqlens.diff()), texts.positions_T,
        mask_id=settings.mask_id, vocab_size=config.vocab_size,
    ).where(masked_T, texts.ids_T)  # fmt: skip
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
    for n in range(len(batch.keys_N)):
        part = slice(int(texts.cu_seqlens[n]), int(texts.cu_seqlens[n + 1]))
        ids, words, hidden_T = texts.ids_T[part], batch.words_T[part], masked_T[part]
        hidden = stock.base_model(input_ids=corrupted_T[part][None]).last_hidden_state[0]
        logits = vocabulary_logits(stock, hidden)
        losses[0] = losses[0] + F.cross_entropy(logits[hidden_T], ids[hidden_T], reduction="sum")
        if len(ids) > 2 and decoder is not None:
            states = decoder_states(model, embeddings, batch.keys_N[n], ids, words, hidden[0], offset, theta_of(config))
            losses[1] = losses[1] + F.cross_entropy(vocabulary_logits(stock, states), ids[1:-1], reduction="sum")
        if len(ids) > 2 and settings.objective == "dupmae":
            shares = logits[1:].max(0).values.log_softmax(-1)
            losses[2] = losses[2] - shares[ids[1:-1].unique()].sum() / (len(ids) - 2)
    return losses


def vocabulary_logits(stock, x):
    if stock.config.model_type == "distilbert":
        return stock.vocab_projector(stock.vocab_layer_norm(F.gelu(stock.vocab_transform(x))))
    if stock.config.model_type == "modernbert":
        return stock.decoder(stock.head(x))
    return stock.cls(x) if hasattr(stock, "cls") else stock.lm_head(x)


def decoder_states(model, embeddings, key, ids, words, h, offset, theta):
    settings, decoder, length = model.settings, model.decoder, len(ids)
    positions = torch.arange(length) + offset
    placed = embeddings.position_embeddings.weight[positions] if hasattr(embeddings, "position_embeddings") else 0.0
    kind = embeddings.token_type_embeddings.weight[0] if hasattr(embeddings, "token_type_embeddings") else 0.0
    norm = getattr(embeddings, "LayerNorm", None) or getattr(embeddings, "norm", torch.nn.Identity())
    lookup = embeddings.tok_embeddings if hasattr(embeddings, "tok_embeddings") else embeddings.word_embeddings
    keys = torch.cat([h[None], norm(lookup.weight[ids] + kind + placed)[1:]])
    query = (h + placed if settings.decoder_query == "raw" else norm(h + kind + placed)).expand(length, -1)
    visible = masks.decoder_visible(key[None], words[None], settings.decoder_share)[0]
    size, heads = len(h) // decoder.heads, []
    for head in range(decoder.heads):
        s = slice(head * size, (head + 1) * size)
        q, k, v = decoder.query(query)[:, s], decoder.key(keys)[:, s], decoder.value(keys)[:, s]
        if theta is not None:
            q, k = turned(q, theta), turned(k, theta)
        scores = (q @ k.T / size**0.5).masked_fill(~visible, float("-inf"))
        heads.append(scores[1:-1].softmax(-1) @ v)
    x = decoder.attention_norm(query[1:-1] + decoder.attention_out(torch.cat(heads, -1)))
    return decoder.output_norm(x + decoder.down(decoder.activation(decoder.up(x))))


def check_against_reference(model, path, batch, tolerance=1e-6):
    """Every loss, and the gradient of every parameter, in fp64."""
    stock = load_backbone(AutoModelForMaskedLM, str(path), attention="eager").double().eval()
    ours = model(batch)
    expected = reference(model, stock, batch)
    assert expected[0] > 0
    for mine, theirs in zip(ours, expected, strict=False):
        assert torch.allclose(mine, theirs.float(), rtol=1e-6)
    weights = torch.tensor([3.0, 1.0, 0.7])
    (weights * ours[:3]).sum().backward()
    mine = {k: p.grad for k, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    sum(w * loss for w, loss in zip(weights, expected, strict=True)).backward()
    theirs = {f"model.{k}": p.grad for k, p in stock.named_parameters()}
    theirs |= {k: p.grad for k, p in model.named_parameters() if k.startswith("decoder.")}
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (gradient is None) == (mine[name] is None), name
        if gradient is not None:
            assert (mine[name] - gradient).abs().max() <= tolerance * max(gradient.abs().max(), 1e-2), name


@pytest.mark.core
@pytest.mark.parametrize("query", ["embeddings", "raw"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "ernie", "modernbert", "nomic_bert", "roberta", "xlm-roberta-xl"])
def test_loss_and_gradients_equal_the_formula(tmp_path, family, query):
    """Every loss and the gradient of every parameter, tied head included, equal the formula's in fp64, at odd lengths."""
    model = make(family, tmp_path, decoder_query=query, objective="dupmae")
    check_against_reference(model, tmp_path, make_batch([12, 3, 7, 12, 2, 21, 1]))


def test_the_same_at_the_vocabulary_of_xlm_r(tmp_path):
    """250,002 words: blocks of the vocabulary and of positions add up to the full matrix."""
    model = make("xlm-roberta", tmp_path, {"vocab_size": 250_002}, objective="dupmae")
    check_against_reference(model, tmp_path, make_batch([9, 5]))


def test_the_same_for_a_long_text(tmp_path):
    """2,048 tokens, beside a short text: attention, masks and heads in many blocks."""
    model = make("bert", tmp_path, {"max_position_embeddings": 2048})
    check_against_reference(model, tmp_path, make_batch([2048, 4]))


def test_texts_of_8192_tokens_train(tmp_path):
    """Rotary positions reach so far, and no part of a step holds a matrix of tokens by tokens: 1 GiB, for all heads.

    In a process of its own: the peak of one that ran other tests would hide what is asked.
    """
    helpers.run_ranks("long_text", 1, tmp_path)


def test_bag_of_words_by_starts_is_that_by_runs(tmp_path, monkeypatch):
    """A GPU's kernel finds the texts by cu_seqlens, the CPU by runs: both mean the texts without their first tokens."""
    model, batch = make("bert", tmp_path, objective="dupmae"), make_batch([12, 3, 7, 12, 2, 21, 1])
    expected = model(batch)

    def by_starts(x_TD, w_VD, bias_V, cu_seqlens, runs):
        assert cu_seqlens.dtype == torch.int32
        parts = (x_TD @ w_VD.T + bias_V).split(cu_seqlens.diff().tolist())
        return torch.stack([part.amax(0) for part in parts])

    monkeypatch.setattr(vocabulary, "max_logits", by_starts)
    assert expected[2] > 0 and torch.allclose(model(batch), expected)


def test_masked_words_alone(tmp_path):
    """The objective mlm is the encoder's part: same loss and gradient, no decoder, nothing else."""
    model = make("bert", tmp_path, objective="mlm")
    assert model.decoder is None
    check_against_reference(model, tmp_path, make_batch([12, 3, 7]))
    losses = model(make_batch([12, 3, 7]))
    assert losses[0] > 0 and not losses[1:3].any()


def test_first_and_last_tokens_are_not_predicted(tmp_path):
    """A text of n tokens has n - 2 decoder targets; changing the special tokens' ids changes no target."""
    model = make("bert", tmp_path)
    counted = []
    model.head.register_forward_hook(lambda module, inputs, output: counted.append(inputs[1]))
    batch = make_batch([6, 9, 2])
    model(batch)
    inner = torch.cat([batch.texts.ids_T[a + 1 : b - 1] for a, b in batch.texts.cu_seqlens.unfold(0, 2, 1).tolist()])
    assert torch.equal(counted[1], inner)
    assert len(counted[1]) == 4 + 7


def test_other_families_are_refused_with_the_list():
    """A model whose head and embeddings we do not know is an error that names those we know."""
    model = ElectraForMaskedLM(helpers.tiny_config("electra"))
    with pytest.raises(ValueError, match=r"electra.*bert, .*modernbert, .*xlm-roberta"):
        RetroMAE(model, RetroMAESettings(mask_id=4))


def test_a_decoder_of_another_shape_is_refused(tmp_path):
    """Weights that do not fit name the file and the first that differs, before anything is loaded."""
    model = make("bert", tmp_path / "a")
    save_decoder(model.decoder.state_dict(), model.settings, tmp_path)
    load_decoder(make("bert", tmp_path / "b").decoder, tmp_path)
    with pytest.raises(
        ValueError, match=r"decoder.safetensors is no decoder of this encoder: down.weight is \[32, 64\], \[32, 96\]"
    ):
        load_decoder(make("bert", tmp_path / "c", {"intermediate_size": 96}).decoder, tmp_path)


def test_decoder_starts_random_and_small():
    """The decoder is initialised as the backbone's layers are, zero biases, not from the encoder."""
    decoder = EnhancedDecoder(helpers.tiny_config("bert", hidden_size=64))
    assert 0.13 < decoder.up.weight.std().item() < 0.17  # the config's initializer_range is 0.15
    assert not decoder.up.bias.any()


def test_an_untrained_head_starts_at_the_token_frequencies():
    """The bias alone predicts the data's unigrams, smoothed: a token never seen is not impossible. A trained bias stays."""
    from bge_ds.data.ragged import RaggedArrays
    from bge_ds.objectives.retromae import start_at_frequencies

    class Rows(list):
        def texts(self, rows):
            return RaggedArrays.of([self[row] for row in rows]), None

    rows = Rows([np.array([1, 1, 2]), np.array([2, 1, 3])])
    untrained, trained = torch.zeros(6), torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    assert start_at_frequencies(untrained, rows) and torch.allclose(untrained.exp(), torch.tensor([1, 4, 3, 2, 1, 1]) / 12)
    assert not start_at_frequencies(trained, rows) and trained.tolist() == [0.0, 0.0, 0.5, 0.0, 0.0, 0.0]
    assert not start_at_frequencies(None, rows)  # a head without a bias
