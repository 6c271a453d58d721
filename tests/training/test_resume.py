"""A run stopped and resumed is the run that never stopped; the saved model is the trained one. At every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from bge_ds.checkpoint import checkpoint

PASSAGES = [" ".join(helpers.SENTENCES[i % 6].split()[: 2 + i]) for i in range(9)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny BERT with dropout (its random numbers must go on too) and both kinds of data."""
    base = tmp_path_factory.mktemp("setting")
    helpers.make_model("bert", base / "model", dropout=0.1)
    helpers.make_tokenizer("wordpiece", base / "model")
    groups = [
        {
            "query": helpers.SENTENCES[i % 6][: 20 + i],
            "pos": [PASSAGES[i], f"a box number {i}"],
            "neg": PASSAGES[:i] + PASSAGES[i + 1 :],
        }
        for i in range(9)
    ]
    (base / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    (base / "texts.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in PASSAGES))
    return base


def flags_of(setting, stage, texts=2, tokens=None, **common) -> dict:
    """tokens: a micro batch of pre-training is so many tokens, in place of so many texts."""
    by_texts = {"per_device_train_batch_size": texts}
    return {
        "common": {
            "model_name_or_path": str(setting / "model"), "deepspeed": f"zero{stage}",
            "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-3,
            "warmup_steps": 2, "weight_decay": 0.1, "dataloader_num_workers": 0, "cache_dir": str(setting / "cache"), **common,
        },
        "finetune": {
            "train_data": str(setting / "groups.jsonl"), "train_group_size": 3, "negatives_cross_device": True,
            "temperature": 0.05, "query_instruction_for_retrieval": "query: ", "sentence_pooling_method": "mean",
            **by_texts,
        },
        "pretrain": {
            "train_data": str(setting / "texts.jsonl"), "max_seq_length": 40, "gradient_accumulation_steps": 2,
            **({"per_device_train_tokens": tokens} if tokens else by_texts),
        },
    }  # fmt: skip


def losses(folder) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: (r["loss"], r["learning_rate"], r["grad_norm"]) for r in records}


@pytest.mark.parametrize(
    "case",
    [
        "0",
        pytest.param("1", marks=pytest.mark.core),
        "2",
        pytest.param("3", marks=pytest.mark.core),
        "2-bf16",
        "1-pieces-tokens",
        "3-pieces-bf16-tokens",
    ],
)
def test_resumed_equals_undisturbed(tmp_path, setting, case):
    """Stopped in the middle of an epoch after step 3 of 6: same losses, rates, norms and final weights, to the last bit."""
    flags = flags_of(setting, case[0], bf16="bf16" in case, tokens=60 if "tokens" in case else None)
    if "pieces" in case:
        flags["finetune"] |= {"sub_batch_size": 3, "learnable_temperature": True, "use_mrl": True, "mrl_dims": [8, 32]}
    helpers.run_ranks("resume", 2, tmp_path, json.dumps(flags))
    for name, weights in (("finetune", "model.safetensors"), ("pretrain", "encoder_model/model.safetensors")):
        whole, resumed = tmp_path / f"{name}_whole", tmp_path / f"{name}_resumed"
        expected, found = losses(whole), losses(resumed)
        assert sorted(expected) == [1, 2, 3, 4, 5, 6]
        assert found == {step: expected[step] for step in (4, 5, 6)}
        files = [weights] + ["decoder.safetensors"] * (name == "pretrain")
        for file in files:
            a, b = load_file(whole / file), load_file(resumed / file)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a), file
        card = Path(weights).with_name("README.md")  # it has no time, path or rank
        assert (whole / card).read_bytes() == (resumed / card).read_bytes()
        before = load_file(whole / "checkpoint-3" / ("" if name == "finetune" else "encoder_model") / "model.safetensors")
        after = load_file(whole / weights)
        assert all(not torch.equal(after[k], before[k]) for k in after if "query.weight" in k)  # it did go on learning
        assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.old"))
    middle = tmp_path / "pretrain_whole" / "checkpoint-3"
    agreement = json.loads((middle / "state.json").read_text())["agreement"]
    point = checkpoint.select(str(middle), tmp_path)
    checkpoint.check_agreement(point, agreement)
    with pytest.raises(ValueError, match="per_device_train_tokens"):
        checkpoint.check_agreement(point, agreement | {"per_device_train_tokens": 61})
    check_saved_model(tmp_path, tolerance=1e-2 if "bf16" in case else 1e-5)


def test_a_line_of_the_log_spans_the_stop(tmp_path, setting):
    """Logged every 4 steps, stopped after step 3: the line of step 4 is about all four, as that of the undisturbed run."""
    flags = flags_of(setting, 1, logging_steps=4)
    helpers.run_ranks("resume", 2, tmp_path, json.dumps(flags))
    for name in ("finetune", "pretrain"):
        whole, resumed = (
            [json.loads(line) for line in (tmp_path / f"{name}_{how}" / "metrics.jsonl").read_text().splitlines()]
            for how in ("whole", "resumed")
        )
        assert [record["step"] for record in whole] == [record["step"] for record in resumed] == [4, 6]
        for key in ("loss", "padding_saved", "grad_norm"):
            assert [record[key] for record in whole] == [record[key] for record in resumed], (name, key)


def check_saved_model(folder, tolerance: float) -> None:
    """sentence-transformers gives the live model's vectors, with its pooling, normalisation and prompts."""
    model = SentenceTransformer(str(folder / "finetune_whole"), device="cpu")
    assert model.prompts["query"] == "query: "
    live = np.load(folder / "live.npy")
    vectors = model.encode(order_of_passages(), normalize_embeddings=False)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    difference = np.abs(vectors - live).max()
    print(f"largest difference {difference:.1e}")
    assert difference < tolerance
    assert np.abs(vectors[0] - vectors[1]).max() > 10 * tolerance


def order_of_passages() -> list[str]:
    """The first six passages as the shards hold them: in the order of their first appearance."""
    seen: dict[str, None] = {}
    for i in range(9):
        for text in [PASSAGES[i], f"a box number {i}", *PASSAGES[:i], *PASSAGES[i + 1 :]]:
            seen.setdefault(text)
    return list(seen)[:6]


def test_one_rank_and_two_ranks_train_alike(tmp_path, setting):
    """1 rank with batch 4 and 2 ranks with batch 2: the same texts in the same steps, so the same losses (no dropout).

    With a budget of tokens, which fixes the micro batches, accumulation makes up for the rank that is missing.
    """
    helpers.make_model("bert", tmp_path / "model")
    helpers.make_tokenizer("wordpiece", tmp_path / "model")
    for ranks in (1, 2):
        flags = flags_of(setting, 1, texts=4 // ranks, model_name_or_path=str(tmp_path / "model"))
        (tmp_path / str(ranks)).mkdir()
        helpers.run_ranks("resume", ranks, tmp_path / str(ranks), json.dumps({**flags, "only_whole": True}))
        flags = flags_of(setting, 1, tokens=60, model_name_or_path=str(tmp_path / "model"))
        flags["pretrain"]["gradient_accumulation_steps"] = 4 // ranks
        (tmp_path / f"tokens{ranks}").mkdir()
        only = {name: flags[name] for name in ("common", "pretrain")} | {"only_whole": True}
        helpers.run_ranks("resume", ranks, tmp_path / f"tokens{ranks}", json.dumps(only))
    for kind, name in (("", "finetune"), ("", "pretrain"), ("tokens", "pretrain")):
        one, two = (losses(tmp_path / f"{kind}{ranks}" / f"{name}_whole") for ranks in (1, 2))
        assert one.keys() == two.keys()
        for step in one:
            assert np.allclose(one[step], two[step], rtol=1e-4), (kind, name, step)


def test_the_seed_decides_the_run(tmp_path, setting):
    """The same seed gives the same run to the last bit, dropout and loader workers included; another seed another."""
    runs = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        flags = flags_of(setting, 1, seed=seed, dataloader_num_workers=2, max_steps=3)
        helpers.run_ranks("resume", 1, tmp_path / name, json.dumps({**flags, "only_whole": True}))
        runs[name] = [losses(tmp_path / name / f"{command}_whole") for command in ("finetune", "pretrain")]
    assert runs["first"] == runs["again"]
    assert all(a[1][0] != b[1][0] for a, b in zip(runs["first"], runs["other"], strict=True))
