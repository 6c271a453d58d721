"""The card of what a run made: what it was trained on, by which settings, and what was measured of just this model."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
from huggingface_hub import ModelCard

from bge_ds.config.arguments import FinetuneArguments, PretrainArguments
from bge_ds.data.shards import shard_reader
from bge_ds.objectives import card
from bge_ds.objectives.shards import open_shards


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    base = helpers.make_training_folder(tmp_path_factory.mktemp("base"))
    (base / "other.jsonl").write_text("".join((base / "groups.jsonl").read_text().splitlines(keepends=True)[:4]))
    data = base / "set"
    data.mkdir()
    for name, ids in (("corpus", ("p1", "p2")), ("queries", ("q1", "q2"))):
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"_id": i, "text": f"text {i}"}) + "\n" for i in ids))
    (data / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t1\nq2\tp2\t1\n")
    return base


def pretraining_flags(setting: Path, output: Path, **more) -> dict:
    names = ("model_name_or_path", "cache_dir", "max_steps", "dataloader_num_workers", "learning_rate")
    given = {name: value for name, value in flags_of(setting, output).items() if name in names}
    return helpers.command_flags(setting)["pretrain"] | given | {"output_dir": str(output)} | more


def flags_of(setting: Path, output: Path, **more) -> dict:
    given = {
        "output_dir": str(output), "model_name_or_path": str(setting / "model"), "cache_dir": str(setting / "cache"),
        "max_steps": 4, "dataloader_num_workers": 0, "learning_rate": 1e-3, "per_device_train_batch_size": 2,
        "sentence_pooling_method": "mean", "query_instruction_for_retrieval": "find: ",
    }  # fmt: skip
    return helpers.command_flags(setting)["finetune"] | given | more


def test_a_run_writes_its_card(tmp_path, setting):
    """In the output and in each checkpoint, with the measures of the very model that lies beside it; where a checkpoint was
    not evaluated, with none. The best model keeps its own."""
    measured = {"eval_data": [str(setting / "set")], "save_steps": 1, "eval_steps": 2, "license": "mit"}
    best = {**measured, "eval_steps": 1, "load_best_model_at_end": True}
    runs = [
        ["finetune", flags_of(setting, tmp_path / "out", **measured)],
        ["finetune", flags_of(setting, tmp_path / "best", **best)],
    ]
    helpers.run_ranks("train", 1, json.dumps(runs))
    out = ModelCard.load(tmp_path / "out/README.md")
    assert out.data.license == "mit" and out.data.base_model is None  # a folder, whose path is not published
    text = out.text
    assert str(setting) not in text and str(tmp_path) not in text
    for row in ("| groups.jsonl | 9 |", "| queries a step | 2 |", "| passages of a query | 3 |", "| temperature | 0.05 |",
                "| length | 4 steps |", "| learning rate | 0.001, linear |", "| query | `'find: '` |"):  # fmt: skip
        assert row in text, row

    def row_of(folder: str) -> list[str]:
        content = (tmp_path / folder / "README.md").read_text()
        return [line for line in content.splitlines() if line.startswith("| set |")]

    logged = {}
    for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "eval_seconds" in values:
            shown = " | ".join(f"{values[f'eval_set_{m}']:.4f}" for m in ("nDCG@10", "MRR@10", "Recall@100"))
            logged[values["step"]] = [f"| set | {shown} |"]
    assert sorted(logged) == [2, 4]
    assert [row_of(f"out/checkpoint-{step}") for step in (1, 2, 3)] == [[], logged[2], []]
    assert row_of("out") == logged[4]
    chosen = json.loads((tmp_path / "best/best.json").read_text())["step"]
    assert (tmp_path / "best/README.md").read_bytes() == (tmp_path / f"best/checkpoint-{chosen}/README.md").read_bytes()


def card_of(setting: Path, tmp_path: Path, **flags) -> str:
    args = FinetuneArguments.build(**flags_of(setting, tmp_path / "none", **flags))
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(setting / "model")
    data = open_shards(
        "finetune", args, tokenizer, query_max_len=16, passage_max_len=40, query_instruction=None, passage_instruction=None
    )
    assert isinstance(data, shard_reader.FinetuneShards)
    return card.of_finetuning(args, data, AutoConfig.from_pretrained(setting / "model"), {}, {})


def test_settings_are_told_as_they_are(setting, tmp_path):
    """Each part of the objective that shapes the model is a line of the table."""
    no_instruction = {"query_instruction_for_retrieval": None}
    text = card_of(setting, tmp_path, **no_instruction, bidirectional=True, use_mrl=True, mrl_dims=[8, 32], bf16=True,
                   learnable_temperature=True, warmup_steps=0.1, weight_decay=0.01)  # fmt: skip
    for words in ("InfoNCE, both directions, at 8, 32 features (Matryoshka)", "0.05, learned from there", "bf16",
                  "warm-up 0.1 of all steps", "| weight decay | 0.01 |", "all passages of all ranks"):  # fmt: skip
        assert words in text, words
    text = card_of(setting, tmp_path, **no_instruction, use_inbatch_neg=False, negatives_cross_device=False, use_lora=True,
                   hub_model_id="us/model", push_to_hub=True, max_steps=-1, num_train_epochs=1.5, warmup_steps=7)  # fmt: skip
    for words in ("of the own group only", "rank 64, alpha 16, merged", "1.5 epochs", "warm-up 7 steps", "# us/model",
                  'SentenceTransformer("us/model")'):  # fmt: skip
        assert words in text, words


def test_sets_are_listed_with_their_shares(setting, tmp_path, monkeypatch):
    """Weighted sets show what they were given; of very many, the first are named and the others counted."""
    files = [str(setting / "groups.jsonl"), str(setting / "other.jsonl")]
    none = {"query_instruction_for_retrieval": None}
    assert "| groups.jsonl | 9 |\n| other.jsonl | 4 |" in card_of(setting, tmp_path, train_data=files, **none)
    weighted = card_of(
        setting, tmp_path, train_data=[f"{file}={weight}" for file, weight in zip(files, (3, 1), strict=True)], **none
    )
    assert "| groups.jsonl | 9 | 75.0% |\n| other.jsonl | 4 | 25.0% |" in weighted
    monkeypatch.setattr(card, "_SHOWN", 1)
    assert "| groups.jsonl | 9 |\n| 1 more | 4 |" in card_of(setting, tmp_path, train_data=files, **none)


def test_a_pretraining_run_writes_its_card(tmp_path, setting):
    """With the encoder and in each checkpoint, with the measures of just that one; the hub learns that it is an encoder that
    transformers loads, and the licence."""
    more = {"license": "mit", "eval_data": [str(setting / "set")], "save_strategy": "steps", "save_steps": 1, "eval_steps": 2}
    flags = pretraining_flags(setting, tmp_path / "out", per_device_train_batch_size=2, **more)
    helpers.run_ranks("train", 1, json.dumps([["pretrain", flags]]))
    found = ModelCard.load(tmp_path / "out/encoder_model/README.md")
    about = found.data.to_dict()
    assert (about["license"], about["library_name"], about.get("base_model")) == ("mit", "transformers", None)
    assert str(setting) not in found.text and str(tmp_path) not in found.text
    for row in ("# model, pre-trained", "| texts.jsonl | 9 |", "| objective | RetroMAE (arXiv:2205.12035) |",
                "| masked | 30% of the words |", "| hidden from the decoder | 50% of the words |", "| texts a step | 2 |",
                "| tokens | texts to 40 |", "| length | 4 steps |", "| learning rate | 0.001, linear |", "| seed | 42 |",
                "bge_ds.finetune --model_name_or_path path/to/this/folder"):  # fmt: skip
        assert row in found.text, row
    cards = [(tmp_path / f"out/checkpoint-{step}/encoder_model/README.md").read_text() for step in (1, 2)]
    assert "| set |" in found.text and ["| set |" in text for text in cards] == [False, True]


def test_objectives_of_pretraining_are_told_as_they_are(setting, tmp_path):
    """What another objective, a budget of tokens or a start from scratch changes is said, and nothing that has no effect."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(setting / "model"), AutoConfig.from_pretrained(setting / "model")

    def card_of_pretraining(**flags) -> str:
        args = PretrainArguments.build(**pretraining_flags(setting, tmp_path / "none", **flags))
        data = open_shards("pretrain", args, tokenizer, max_seq_length=40, word_segmenter="none")
        assert isinstance(data, shard_reader.PretrainShards)
        return card.of_pretraining(args, data, config, {})

    scratch = {"model_name_or_path": "", "config_name": str(setting / "model"), "tokenizer_name": str(setting / "model")}
    text = card_of_pretraining(objective="dupmae", bow_loss_weight=0.2, per_device_train_tokens=512, **scratch)
    for words in ("DupMAE (arXiv:2211.08769)", "| weight of the bag-of-words loss | 0.2 |", "| tokens a step, at most | 512 |",
                  "| base model | model, from scratch |"):  # fmt: skip
        assert words in text, words
    assert "texts a step" not in text and "Exact search" not in text
    text = card_of_pretraining(objective="mlm", hub_model_id="us/encoder", push_to_hub=True)
    assert "masked language modelling" in text and "decoder" not in text
    assert 'AutoModel.from_pretrained("us/encoder")' in text and text.count("bag-of-words") == 0
