"""RetroMAE's loss against a reference with loops, written from the formula, one text and one row at a time."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from bge_ds.data.batches import PretrainBatch, pack
from bge_ds.data.order import mix64
from bge_ds.kernels import masks
from bge_ds.modeling.encoder import load_backbone
from bge_ds.modeling.retromae import EnhancedDecoder, RetroMAE, RetroMAESettings


def make_batch(lengths, seed=0, epoch=0) -> PretrainBatch:
    rng = np.random.default_rng(seed)
    texts, order = pack(helpers.random_texts(lengths, seed=seed))
    words = []
    for i in order:
        steps = rng.integers(0, 2, lengths[i])  # words of one, two or more tokens
        steps[0], steps[-1:] = 0, 1
        if lengths[i] > 1:
            steps[1] = 1
        words.append(np.cumsum(steps))
    keys = mix64(seed, epoch, np.arange(len(lengths)))[order].view(np.int64)
    return PretrainBatch(texts, torch.from_numpy(np.concatenate(words)), torch.from_numpy(keys), torch.from_numpy(order))


def make(family, path, **settings) -> RetroMAE:
    helpers.make_model(family, path)
    torch.manual_seed(5)
    model = RetroMAE(load_backbone(AutoModelForMaskedLM, str(path)), RetroMAESettings(mask_id=4, **settings))
    for parameter in model.decoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def reference(model: RetroMAE, stock, batch: PretrainBatch):
    """Sums of both cross entropies: the stock padded model for the encoder, loops over rows and heads for the decoder."""
    texts, settings, decoder = batch.texts, model.settings, model.decoder
    config = stock.config
    roberta = config.model_type == "roberta"
    embeddings = stock.base_model.embeddings
    masked_T = model.masked(batch)
    corrupted_T = masks.corrupt(
        texts.ids_T, batch.keys_N.repeat_interleave(texts.cu_seqlens.diff()), texts.positions_T, masked_T,
        mask_id=settings.mask_id, vocab_size=config.vocab_size,
    )  # fmt: skip
    encoder_loss = decoder_loss = torch.zeros((), dtype=torch.float64)
    for n in range(len(batch.keys_N)):
        part = slice(int(texts.cu_seqlens[n]), int(texts.cu_seqlens[n + 1]))
        ids, words = texts.ids_T[part], batch.words_T[part]
        length = len(ids)
        out = stock(input_ids=corrupted_T[part][None], output_hidden_states=True)
        if masked_T[part].any():
            loss = F.cross_entropy(out.logits[0][masked_T[part]], ids[masked_T[part]], reduction="sum")
            encoder_loss = encoder_loss + loss
        h = out.hidden_states[-1][0, 0]
        positions = torch.arange(length) + (2 if roberta else 0)
        plain = embeddings(input_ids=ids[None], position_ids=positions[None])[0]
        keys = torch.cat([h[None], plain[1:]])
        visible = masks.decoder_visible(batch.keys_N[n : n + 1], words[None], settings.decoder_share)[0]
        head_dim = config.hidden_size // config.num_attention_heads
        for i in range(1, length - 1):
            if settings.decoder_query == "raw":
                query = h + embeddings.position_embeddings.weight[positions[i]]
            else:
                parts = h + embeddings.token_type_embeddings.weight[0] + embeddings.position_embeddings.weight[positions[i]]
                query = embeddings.LayerNorm(parts)
            seen = [j for j in range(length) if visible[i, j]]
            contexts = []
            for head in range(config.num_attention_heads):
                s = slice(head * head_dim, (head + 1) * head_dim)
                q = decoder.query(query)[s]
                scores = torch.stack([q @ decoder.key(keys[j])[s] / head_dim**0.5 for j in seen])
                contexts.append(sum(p * decoder.value(keys[j])[s] for p, j in zip(scores.softmax(0), seen, strict=True)))
            x = decoder.attention_norm(query + decoder.attention_out(torch.cat(contexts)))
            x = decoder.output_norm(x + decoder.down(F.gelu(decoder.up(x))))
            logits = stock.lm_head(x) if roberta else stock.cls(x)
            decoder_loss = decoder_loss + F.cross_entropy(logits, ids[i], reduction="sum")
    return encoder_loss, decoder_loss


@pytest.mark.parametrize("query", ["embeddings", "raw"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_loss_and_gradients_equal_the_loops(tmp_path, family, query):
    """Both losses and the gradient of every parameter, tied head included, equal the formula's, in fp64."""
    model = make(family, tmp_path, decoder_query=query)
    stock = load_backbone(AutoModelForMaskedLM, str(tmp_path), attention="eager").double().eval()
    batch = make_batch([12, 3, 7, 12, 2, 21])
    ours = model(batch)
    encoder_loss, decoder_loss = reference(model, stock, batch)
    assert torch.allclose(ours[0], encoder_loss.float(), rtol=1e-6)
    assert torch.allclose(ours[1], decoder_loss.float(), rtol=1e-6)
    (3 * ours[0] + ours[1]).backward()
    decoder_gradients = {k: p.grad.clone() for k, p in model.decoder.named_parameters()}
    model.decoder.zero_grad()
    (3 * encoder_loss + decoder_loss).backward()
    for name, parameter in model.decoder.named_parameters():
        difference = (parameter.grad - decoder_gradients[name]).abs().max()
        assert difference <= 1e-6 * max(parameter.grad.abs().max(), 1e-2), name
    theirs = dict(stock.named_parameters())
    for name, parameter in model.model.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None, name
            continue
        assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-6 * max(theirs[name].grad.abs().max(), 1e-2), name


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
    config = DistilBertConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    with pytest.raises(ValueError, match=r"distilbert.*bert, roberta, xlm-roberta"):
        RetroMAE(DistilBertForMaskedLM(config), RetroMAESettings(mask_id=4))


def test_decoder_starts_random_and_small():
    """The decoder is initialised as the backbone's layers are, zero biases, not from the encoder."""
    decoder = EnhancedDecoder(helpers.tiny_config("bert", hidden_size=64))
    assert 0.13 < decoder.up.weight.std().item() < 0.17  # the config's initializer_range is 0.15
    assert not decoder.up.bias.any()


def test_a_head_from_scratch_starts_at_the_token_frequencies():
    """The bias alone predicts the data's unigrams, smoothed; a token never seen is unlikely, not impossible."""
    from bge_ds.pretrain import start_at_frequencies

    class Rows(list):
        def ids(self, row):
            return self[row]

    bias = torch.zeros(6)
    start_at_frequencies(bias, Rows([np.array([1, 1, 2]), np.array([2, 1, 3])]))
    assert torch.allclose(bias.exp(), torch.tensor([1, 4, 3, 2, 1, 1]) / 12)
