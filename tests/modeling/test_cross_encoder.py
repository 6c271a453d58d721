"""The packed cross-encoder is the stock model on padded pairs: scores and gradients."""

from __future__ import annotations

import pickle

import helpers
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bge_ds.kernels.packed import pack_pairs
from bge_ds.modeling import cross_encoder
from bge_ds.modeling.compilation import compile_layers
from bge_ds.modeling.cross_encoder import CrossEncoder
from bge_ds.modeling.encoder import FAMILIES

LENGTHS = [5, 17, 9, 40, 17, 100, 5]
TOLERANCE = 1e-5
YES = 7
CLASSIFIERS = ("bert", "electra", "distilbert", "roberta", "xlm-roberta", "modernbert", "mpnet")
DECODERS = ("qwen3", "llama", "granite", "gemma")


def make(family: str, folder, auto=AutoModelForSequenceClassification, **changes):
    torch.manual_seed(0)
    labels = {} if auto is AutoModelForCausalLM else {"num_labels": 1}
    model = auto.from_config(helpers.tiny_config(family, **labels, **changes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def pairs_of(lengths=LENGTHS):
    """Token ids of pairs, and where the second text of each begins."""
    return helpers.random_texts(lengths, first=0, last=2), np.array([max(1, length // 3) for length in lengths])


def stock_scores(model, ids, second=None, yes=None):
    """What transformers' own model gives for a padded rectangle in the caller's order."""
    rows = [torch.from_numpy(row) for row in ids]
    inputs = {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id or 0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    if second is not None:
        types = [(torch.arange(len(row)) >= at).long() for row, at in zip(rows, second.tolist(), strict=True)]
        inputs["token_type_ids"] = pad_sequence(types, batch_first=True)
    logits = model(**inputs).logits
    if yes is None:
        return logits[:, 0]
    return torch.stack([logits[n, len(row) - 1, yes] for n, row in enumerate(rows)])


def assert_is_stock(path, auto, typed: bool, yes=None, **changes):
    ids, second = pairs_of()
    ours, stock = CrossEncoder.load(path, yes=yes).eval(), auto.from_pretrained(path).eval()
    scores = ours(pack_pairs(ids, second))
    expected = stock_scores(stock, ids, second if typed else None, yes)
    assert scores.shape == (len(ids),) and scores.dtype == torch.float32
    assert (scores - expected).abs().max() < TOLERANCE
    assert expected.std() > 1e-2  # pairs differ
    weights = torch.randn(len(ids), generator=torch.Generator().manual_seed(1))
    (scores * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.model.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None, name
            continue
        difference = (parameter.grad - theirs[name].grad).abs().max()
        # Key biases have a true gradient of zero: compare with the size of the layer's, not of their own noise.
        assert difference <= TOLERANCE * max(theirs[name].grad.abs().max(), 1e-1), name
    return ours


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classifiers_equal_the_stock_model(tmp_path, family):
    """Same scores and same gradient of every parameter, poolers and heads included; types reach models that have them."""
    typed = family in ("bert", "electra")
    one_type = {"type_vocab_size": 1} if "roberta" in family else {}
    ours = assert_is_stock(make(family, tmp_path, **one_type), AutoModelForSequenceClassification, typed)
    assert ours.packed == FAMILIES[family].unpadded


@pytest.mark.parametrize(("family", "pooling"), [("modernbert", "mean"), ("eurobert", "mean"), ("eurobert", "late")])
def test_heads_over_all_tokens_equal_the_stock_model(tmp_path, family, pooling):
    """A mean over a pair's tokens is that of the pair alone; a head that needs every token runs padded."""
    path = make(family, tmp_path, classifier_pooling=pooling)
    assert assert_is_stock(path, AutoModelForSequenceClassification, False).packed == (pooling != "late")


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_equal_the_stock_model(tmp_path, family):
    """The score is the logit of one token at each pair's own last token."""
    assert_is_stock(make(family, tmp_path, AutoModelForCausalLM), AutoModelForCausalLM, False, YES)


def test_a_pair_does_not_see_its_neighbours(tmp_path):
    """Scores in one row, in many passes and alone are the same, in the caller's order; types are each pair's own."""
    model = CrossEncoder.load(make("bert", tmp_path)).eval()
    ids, second = pairs_of()
    told = []
    many = model.score_ids(ids, second, batch_tokens=45, tell=lambda pairs, tokens: told.append((pairs, tokens)))
    alone = torch.cat([model.score_ids([row], second[k : k + 1]) for k, row in enumerate(ids)])
    assert (model(pack_pairs(ids, second)) - many).abs().max() < TOLERANCE and (many - alone).abs().max() < TOLERANCE
    assert told[0] == (1, 100) and sum(pairs for pairs, _ in told) == len(ids) and len(told) > 3
    assert (model(pack_pairs(ids)) - many).abs().max() > 1e-3  # types matter


def test_packed_pairs_survive_pickling_and_cutting():
    """What a loader worker sends, and pieces of a row, hold the types of each pair; an empty piece holds the first pair."""
    ids, second = pairs_of()
    packed = pack_pairs(ids, second)
    sent = pickle.loads(pickle.dumps(packed))
    assert torch.equal(sent.types_T, packed.types_T) and torch.equal(sent.texts.ids_T, packed.texts.ids_T)
    pieces = packed.split([0, 2, 2, 7])
    assert torch.equal(torch.cat([pieces[0].types_T, pieces[2].types_T]), packed.types_T)
    assert torch.equal(pieces[1].types_T, packed.types_T[:5])


def test_compiled_layers_train_the_same(tmp_path):
    """A row padded to a multiple of tokens for a compiled graph gives the scores of the row itself."""
    model = CrossEncoder.load(make("bert", tmp_path)).train()
    ids, second = pairs_of()
    expected = model(pack_pairs(ids, second))
    compile_layers(model.model.base_model, token_bucket=64, backend="eager")
    assert (model(pack_pairs(ids, second)) - expected).abs().max() < TOLERANCE


def test_heads_that_are_missing_or_wrong_are_refused(tmp_path):
    """A head is random only where that is asked for; several labels, embedders and decoders with heads are named."""
    bert = helpers.make_model("bert", tmp_path / "bert")
    with pytest.raises(ValueError, match="BertForMaskedLM, no cross-encoder"):
        CrossEncoder.load(bert)
    fresh = CrossEncoder.load(bert, new_head=True)
    assert fresh.model.config.num_labels == 1 and cross_encoder.kind_of(fresh.model.config) is None
    config = helpers.tiny_config("bert", num_labels=1, architectures=["BertForSequenceClassification"])
    with pytest.raises(ValueError, match=r"does not hold a whole bert model: wrong or missing .*classifier"):
        CrossEncoder.load(bert, config=config)
    two = helpers.tiny_config("bert", num_labels=2, architectures=["BertForSequenceClassification"])
    with pytest.raises(ValueError, match="has 2 labels"):
        cross_encoder.check(two, cross_encoder.kind_of(two))
    with pytest.raises(ValueError, match="decoder with a classification head"):
        cross_encoder.check(helpers.tiny_config("qwen3", num_labels=1), "classifier")
    with pytest.raises(ValueError, match=r"gpt2 is not among the decoders that score by 'Yes': .*qwen3"):
        cross_encoder.check(helpers.tiny_config("gpt2"), "decoder")
