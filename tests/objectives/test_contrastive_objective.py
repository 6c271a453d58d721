"""What a fine-tuning run takes of its data: sets with and without a teacher's scores, and FlagEmbedding's marks and types."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import numpy as np
import pytest

from bge_ds.config.arguments import FinetuneArguments
from bge_ds.objectives import group_data
from bge_ds.objectives.contrastive import ContrastiveObjective

SCORES = {"pos_scores": [0.9], "neg_scores": [0.2, 0.1]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return helpers.make_training_folder(tmp_path_factory.mktemp("base"))


def objective_of(base: Path, folder: Path, files: dict[str, list[dict]], **flags) -> ContrastiveObjective:
    """files: name -> what each of its groups has beside its texts."""
    for name, groups in files.items():
        texts = [
            {"query": f"the {name} {i}", "pos": [f"fox {i}"], "neg": [f"dog {i}", f"lazy {i}"]} for i in range(len(groups))
        ]
        (folder / name).parent.mkdir(exist_ok=True)
        lines = [json.dumps(text | group) + "\n" for text, group in zip(texts, groups, strict=True)]
        (folder / name).write_text("".join(lines))
    return ContrastiveObjective(
        FinetuneArguments.build(
            model_name_or_path=str(base / "model"), train_data=[str(folder / name) for name in files], output_dir="unused",
            cache_path=str(folder / "cache"), train_group_size=4, **flags,
        )
    )  # fmt: skip


def batch_of(objective: ContrastiveObjective, rows: list[int]):
    make, options = objective.collate(1)
    return make(objective.data, np.zeros(len(rows), int), np.array(rows), **options)


def test_sets_without_scores_have_no_teacher_in_their_rows(tmp_path, base):
    """A batch of both has one teacher's row each, zeros for the others; of scored groups alone it has no mark to look at.

    A negative list that is empty needs no scores."""
    files = {"a.jsonl": [SCORES] * 2, "b.jsonl": [{}, {}], "c.jsonl": [{"neg": [], "pos_scores": [1.0]}]}
    objective = objective_of(base, tmp_path, files, knowledge_distillation=True)
    objective.check()
    assert objective.data.scored() == [(2, None), (0, 2), (1, None)]
    batch = batch_of(objective, [0, 2, 4])
    assert batch.taught_B.tolist() == [True, False, True] and not batch.teacher_BG[1].any()
    assert batch.teacher_BG[0, 0] == pytest.approx(0.9) and batch.teacher_BG[2].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert batch_of(objective, [0, 1]).taught_B is None


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.jsonl": [{}, {}]}, "no group has them; score the data with"),
        ({"a.jsonl": [SCORES], "b.jsonl": [SCORES, {"pos_scores": [1.0]}]}, r"group 1 \(from 0\) of .*b.jsonl has none"),
    ],
)
def test_scores_that_are_missing_by_mistake_are_named(tmp_path, base, files, words):
    """No scores at all, or in a part of a file: neither is what a set without scores is."""
    with pytest.raises(ValueError, match=words):
        objective_of(base, tmp_path, files, knowledge_distillation=True).check()


def test_marked_files_and_folders_take_no_in_batch_negatives(tmp_path, base):
    files = {"a.jsonl": [{}], "b-no_in_batch_neg.jsonl": [{}] * 2, "c-no_in_batch_neg/d.jsonl": [{}], "e/f.jsonl": [{}]}
    objective = objective_of(base, tmp_path, files)
    assert group_data.own_only_spans(objective.data) == ((1, 3), (3, 4))
    assert batch_of(objective, [0, 1, 3, 4]).own_only_B.tolist() == [False, True, True, False]


def test_types_shorten_groups_only_where_a_batch_is_of_one_set(tmp_path, base):
    """Ranks then bring different numbers of passages, which must be exchanged."""
    files = {"a.jsonl": [{"type": "only_1neg"}], "b.jsonl": [{"type": "symmetric_class"}], "c.jsonl": [{}]}
    same = objective_of(base, tmp_path, files, same_dataset_within_batch=True)
    assert (batch_of(same, [0, 1, 2]).own_BG >= 0).sum(1).tolist() == [2, 3, 4] and not same.uniform
    mixed = objective_of(base, tmp_path, files)
    assert (batch_of(mixed, [0, 1, 2]).own_BG >= 0).all() and mixed.uniform
