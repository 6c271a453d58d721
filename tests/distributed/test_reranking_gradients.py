"""A reranker's gradient, packed, in pieces and on ranks, is that of one process with transformers' padded cross-encoder.

The reference makes its pairs from the texts with the tokenizer, and writes each loss out group by group.
"""

from __future__ import annotations

import json

import helpers
import numpy as np
import pytest
import score_runs
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

GROUPS, GROUP_SIZE = 6, 3
QUERY, PASSAGE = 12, 40
CASES = {
    "cross_entropy": {},
    "smoothed": {"label_smoothing": 0.1, "sub_batch_size": 1},
    "pieces_of_3": {"loss": "binary_cross_entropy", "sub_batch_size": 3, "gradient_checkpointing": True},
    "pieces_by_tokens": {"knowledge_distillation": True, "sub_batch_tokens": 60},
    "margin_mse": {"knowledge_distillation": True, "kd_loss_type": "margin_mse", "loss": "none", "sub_batch_size": 16},
    "ranknet": {"knowledge_distillation": True, "kd_loss_type": "ranknet", "loss": "none"},
    "accumulated": {"gradient_accumulation_steps": 3, "max_len": 30},
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(a tiny cross-encoder with token types, its groups, the file that holds them); long texts are cut."""
    base = tmp_path_factory.mktemp("reranker")
    model = score_runs.make_teacher(base / "model")
    rng, words = np.random.default_rng(0), " ".join(helpers.SENTENCES).split()

    def text(most):
        return " ".join(rng.choice(words, int(rng.integers(1, most))))

    groups = [{"query": text(5), "pos": [text(20)], "neg": [text(20), text(3)]} for _ in range(GROUPS)]
    for group in groups:
        group |= {f"{side}_scores": rng.normal(size=len(group[side])).round(3).tolist() for side in ("pos", "neg")}
    groups[2] |= {"pos_scores": [0.5], "neg_scores": [0.5, 0.5]}  # a teacher that orders nothing
    return model, groups, score_runs.write_groups(base / "groups.jsonl", groups)


def pair(tokenizer, query: str, passage: str, most: int) -> tuple[np.ndarray, int]:
    """A pair as FlagEmbedding cuts it, and where its second text begins."""
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (query, passage))
    longest = QUERY + PASSAGE // 4
    first = first[: longest if most == QUERY + PASSAGE else min(longest, most * 3 // 4)]
    second = second[: PASSAGE + QUERY // 2][: most - 3 - len(first)]
    ids = [tokenizer.cls_token_id, *first, tokenizer.sep_token_id, *second, tokenizer.sep_token_id]
    return np.array(ids), len(first) + 2


def loss_of(scores, teacher, flags: dict):
    """Of one group, term by term."""
    total, smooth = 0.0, flags.get("label_smoothing", 0.0)
    kind, kd = flags.get("loss", "cross_entropy"), flags.get("kd_loss_type", "kl_div")
    if kind == "cross_entropy":
        logs = scores - scores.exp().sum().log()
        total = -(1 - smooth) * logs[0] - smooth * logs.mean()
    if kind == "binary_cross_entropy":
        total = (-scores[0].sigmoid().log() - sum((1 - s.sigmoid()).log() for s in scores[1:])) / len(scores)
    if not flags.get("knowledge_distillation"):
        return total
    if kd == "kl_div":
        weights = teacher.exp() / teacher.exp().sum()
        return total - (weights * (scores - scores.exp().sum().log())).sum()
    if kd == "margin_mse":
        return total + sum((scores[0] - scores[g] - teacher[0] + teacher[g]) ** 2 for g in (1, 2)) / 2
    pairs = [(i, j) for i in range(3) for j in range(3) if teacher[i] > teacher[j]]
    return total + sum((1 + (scores[j] - scores[i]).exp()).log() for i, j in pairs) / max(1, len(pairs))


def reference(model_path, groups, flags: dict) -> dict[str, np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, dtype=torch.float64)
    made = [
        pair(tokenizer, group["query"], passage, flags.get("max_len", QUERY + PASSAGE))
        for group in groups
        for passage in group["pos"] + group["neg"]
    ]
    assert max(len(ids) for ids, _ in made) == flags.get("max_len", QUERY + PASSAGE)  # cutting is tested too
    rows = [{"input_ids": ids, "token_type_ids": (np.arange(len(ids)) >= at).astype(int)} for ids, at in made]
    scores_BG = model(**tokenizer.pad(rows, return_tensors="pt")).logits.view(-1, GROUP_SIZE)
    teacher_BG = torch.tensor([group["pos_scores"] + group["neg_scores"] for group in groups], dtype=torch.float64)
    losses = [loss_of(*of, flags) for of in zip(scores_BG, teacher_BG, strict=True)]
    (sum(losses) / len(losses)).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("stage", "ranks"), [(0, 1), (0, 2), pytest.param(1, 2, marks=pytest.mark.core), (2, 2), (3, 2), (3, 3)]
)
def test_ranks_and_pieces_give_the_padded_model_s_gradient(tmp_path, setting, stage, ranks):
    """Every loss, every parameter: the relative difference is below 1e-5."""
    model, groups, lines = setting
    cases = CASES if ranks < 3 else {name: CASES[name] for name in ("smoothed", "pieces_by_tokens")}
    common = {"train_group_size": GROUP_SIZE, "query_max_len": QUERY, "passage_max_len": PASSAGE}
    given = {name: {**common, **flags} for name, flags in cases.items()}
    helpers.run_ranks("reranking_gradients", ranks, model, lines, tmp_path, stage, json.dumps(given), timeout=900)
    for case, flags in cases.items():
        expected, found = reference(model, groups, flags), np.load(tmp_path / f"{case}.npz")
        assert {name.removeprefix("model.") for name in found.files} == set(expected), case
        largest = max(np.abs(gradient).max() for gradient in expected.values())
        assert largest > 1e-3, case
        for name, gradient in expected.items():
            # What shifts all keys, all states of the last layer or all scores alike changes no or hardly any difference of
            # scores: the rounding of such a sum is that of its terms, as large as other gradients.
            cancels = name.endswith("bias") and any(of in name for of in ("key", "layer.1.output", "pooler", "classifier"))
            scale = largest if cancels else np.abs(gradient).max()
            difference = np.abs(found[f"model.{name}"].reshape(gradient.shape) - gradient).max() / scale
            assert difference < 1e-5, f"{case}: {name} differs by {difference:.1e}"
