"""Weights from examples: the loss against loops over a padded model, the softmax against figures worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from bge_ds.evaluation.embedder import Embedder
from bge_ds.merging import example_losses

GROUPS = [
    {"query": "the quick brown fox", "pos": ["jumps over the lazy dog", "unbelievable thunderstorms"], "neg": ["one vector"]},
    {"query": "retrieval models", "pos": ["embed questions"], "neg": ["gradients of a single process", "the whole batch"]},
    {"query": "arrow shards", "pos": ["opened instantly"], "neg": []},
    # Its negative is a positive of the first query, and so no negative of that one; its positive is the second's.
    {"query": "memory", "pos": ["embed questions"], "neg": ["unbelievable thunderstorms"]},
]


def plain_vectors(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """[CLS] of the stock model, one text at a time, normalised."""
    rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in texts]
    return F.normalize(torch.stack(rows), dim=1)


def plain_loss(model, tokenizer, groups: list[dict], temperature: float) -> torch.Tensor:
    """InfoNCE written out pair by pair."""
    passages = [text for group in groups for text in (group["pos"][0], *group["neg"])]
    p_PD = plain_vectors(model, tokenizer, passages)
    losses, first = [], 0
    for group, q_D in zip(groups, plain_vectors(model, tokenizer, [group["query"] for group in groups]), strict=True):
        scores = [
            q_D @ p_D / temperature
            for k, (p_D, text) in enumerate(zip(p_PD, passages, strict=True))
            if k == first or text not in group["pos"]
        ]
        losses.append(torch.stack(scores).logsumexp(0) - q_D @ p_PD[first] / temperature)
        first += 1 + len(group["neg"])
    return torch.stack(losses).mean()


@pytest.fixture(scope="module")
def models(tiny_bert_path, tmp_path_factory):
    """(the encoder, the same after some steps on the examples)."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_path)
    trained = AutoModel.from_pretrained(tiny_bert_path)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        plain_loss(trained, tokenizer, GROUPS, 0.1).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tiny_bert_path, folder


def test_the_loss_is_that_of_loops_over_pairs(models):
    """Own negatives, those of other queries, and positives that must not be negatives: one pair more or less is seen."""
    for folder in models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            wanted = plain_loss(AutoModel.from_pretrained(folder).eval(), tokenizer, GROUPS, 0.05)
        found = example_losses.loss_of(Embedder.load(folder, use_cpu=True), GROUPS, 0.05)
        assert found == pytest.approx(float(wanted), rel=1e-4)  # fp32 sums in another order, over a temperature of 0.05


def test_a_model_trained_on_the_examples_gets_more_weight(models):
    """The more so the lower the temperature."""
    before, after = (example_losses.loss_of(Embedder.load(folder, use_cpu=True), GROUPS, 0.1) for folder in models)
    assert after < before
    shares = [example_losses.weights_of([before, after], temperature)[1] for temperature in (5.0, 0.5, 0.05)]
    assert 0.5 < shares[0] < shares[1] < shares[2]


def test_weights_are_the_softmax_of_minus_the_loss():
    """Worked out by hand: losses ln 1 and ln 3 at temperature 1 weigh 3 to 1; at temperature 1/2, 9 to 1."""
    losses = [0.0, math.log(3)]
    assert example_losses.weights_of(losses, 1.0) == pytest.approx([3 / 4, 1 / 4])
    assert example_losses.weights_of(losses, 0.5) == pytest.approx([9 / 10, 1 / 10])
    assert example_losses.weights_of([2.0, 2.0, 2.0], 5.0) == pytest.approx([1 / 3] * 3)
    assert sum(example_losses.weights_of([900.0, 1.0, 2.0], 0.01)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"query": "a", "pos": ["b"]}', '{"query": "a"}'], ':2: "pos" is missing'),
        (['{"query": "a", "pos": ["b"]}', "", "{"], ":3: "),
        ([""], "holds no line"),
        (['{"query": "a", "pos": ["b"]}'], "one query without negatives has nothing to be compared with"),
    ],
)
def test_examples_that_cannot_serve(tmp_path, lines, said):
    """File and line of the first bad line, and files that would give a loss of 0 or none."""
    path = tmp_path / "groups.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        example_losses.read_groups(path)
    assert said in str(error.value) and str(path) in str(error.value)


def test_groups_are_read_as_they_are(tmp_path):
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(group) + "\n" for group in GROUPS))
    assert example_losses.read_groups(path) == GROUPS
    with pytest.raises(ValueError, match="no such file"):
        example_losses.read_groups(tmp_path / "other.jsonl")
