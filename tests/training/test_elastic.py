"""A run goes on with another number of ranks and another ZeRO stage as if nothing had changed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import helpers
import numpy as np
import pytest

from bge_ds.checkpoint import checkpoint
from bge_ds.config.arguments import FinetuneArguments, PretrainArguments
from bge_ds.distributed import collectives
from bge_ds.training import resume

PASSAGES = [" ".join(helpers.SENTENCES[i % 6].split()[: 2 + i]) for i in range(9)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny BERT without dropout (its masks depend on the ranks) and both kinds of data."""
    base = tmp_path_factory.mktemp("setting")
    helpers.make_model("bert", base / "model")
    helpers.make_tokenizer("wordpiece", base / "model")
    groups = [
        {"query": helpers.SENTENCES[i % 6][: 20 + i], "pos": [PASSAGES[i]], "neg": PASSAGES[:i] + PASSAGES[i + 1 :]}
        for i in range(9)
    ]
    (base / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    (base / "texts.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in PASSAGES))
    return base


def flags_of(setting, command, output, stage, resume=None, **more) -> list:
    flags = {
        "model_name_or_path": str(setting / "model"), "cache_dir": str(setting / "cache"), "output_dir": str(output),
        "deepspeed": f"zero{stage}", "max_steps": 8, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1,
        "learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1, "dataloader_num_workers": 0,
        "resume_from_checkpoint": None if resume is None else str(resume),
    }  # fmt: skip
    if command == "finetune":
        flags |= {"train_data": str(setting / "groups.jsonl"), "train_group_size": 3, "negatives_cross_device": True,
                  "temperature": 0.05, "per_device_train_batch_size": 6}  # fmt: skip
    else:
        flags |= {"train_data": str(setting / "texts.jsonl"), "max_seq_length": 40}
        if command == "tokens":
            flags |= {"per_device_train_tokens": 60, "gradient_accumulation_steps": 6}
        else:
            flags |= {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    # What is None is not given at all.
    given = {name: value for name, value in (flags | more).items() if value is not None}
    return ["finetune" if command == "finetune" else "pretrain", given]


def losses(folder) -> dict[int, tuple]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: (r["loss"], r["learning_rate"], r["grad_norm"]) for r in records}


def alike(found: tuple, expected: tuple) -> bool:
    """To 1e-4; ZeRO 0 measures no norm."""
    both = [(a, b) for a, b in zip(found, expected, strict=True) if None not in (a, b)]
    return len(both) >= 2 and np.allclose(*zip(*both, strict=True), rtol=1e-4, atol=0)


COMMANDS = ["finetune", "pretrain", "tokens"]


def test_ranks_and_stages_change_on_the_way(tmp_path, setting):
    """1 -> 2 -> 3 -> 1 ranks with ZeRO 1 -> 3 -> 2 -> 0 on the way, the same command each time: losses, rates and norms are
    those of the run that never stopped, to 1e-4."""
    legs = [("a", 1, 1), ("b", 2, 3), ("c", 3, 2), ("d", 1, 0)]
    previous = None
    for k, (leg, ranks, stage) in enumerate(legs):
        runs = [
            flags_of(
                setting, command, tmp_path / leg / command, stage,
                resume=previous and tmp_path / previous / command / f"checkpoint-{2 * k}",
            )
            for command in COMMANDS
        ]  # fmt: skip
        out = helpers.run_ranks("train", ranks, json.dumps(runs), "print")
        assert "refused" not in out
        if leg == "c":
            assert "resumed on 3 ranks (2 before): --per_device_train_batch_size 6 -> 2 keeps the global batch of 6" in out
            assert "--gradient_accumulation_steps 6 -> 2 keeps the micro batches a step of 6" in out
            assert out.count("a rank x 3 ranks") == 3
        previous = leg
    for command in COMMANDS:
        expected = losses(tmp_path / "a" / command)
        assert sorted(expected) == list(range(1, 9))
        for k, (leg, _, _) in list(enumerate(legs))[1:]:
            found = losses(tmp_path / leg / command)
            assert sorted(found) == list(range(2 * k + 1, 9))
            assert all(alike(found[step], expected[step]) for step in found), (command, leg)
        assert abs(expected[8][0] - expected[3][0]) > 1e-2  # it did learn
    for card, row in (
        ("finetune/README.md", "| queries a step | 6 |"),
        ("pretrain/encoder_model/README.md", "| texts a step | 12 |"),
        ("tokens/encoder_model/README.md", "| tokens a step, at most | 360 |"),
    ):
        cards = {(tmp_path / leg / card).read_text() for leg, *_ in legs}
        assert len(cards) == 1 and row in cards.pop()


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_any_stage_goes_on_as_any_other(tmp_path, setting, written):
    """Both commands, on two ranks: what one stage saved, the three others take up."""
    more = {"max_steps": 4}
    commands = ["finetune", "pretrain"]
    runs = [flags_of(setting, command, tmp_path / command, written, **more) for command in commands]
    for stage in {0, 1, 2, 3} - {written}:
        runs += [
            flags_of(setting, command, tmp_path / f"{command}{stage}", stage, tmp_path / command / "checkpoint-2",
                     **more, save_strategy="no", save_steps=None)
            for command in commands
        ]  # fmt: skip
    assert "refused" not in helpers.run_ranks("train", 2, json.dumps(runs), "print")
    for command in commands:
        expected = losses(tmp_path / command)
        for stage in {0, 1, 2, 3} - {written}:
            found = losses(tmp_path / f"{command}{stage}")
            assert sorted(found) == [3, 4]
            assert all(alike(found[step], expected[step]) for step in found), (command, stage)


def fit(monkeypatch, ranks, kind=FinetuneArguments, before=2, asked=6, total=12, **flags):
    """The batch after `fit_batch`, for a checkpoint of `before` ranks, and the notes."""
    monkeypatch.setattr(collectives, "world_size", lambda: ranks)
    tokens = flags.get("per_device_train_tokens")
    flag, product = ("gradient_accumulation_steps", "micro_batches_a_step") if tokens else (
        "per_device_train_batch_size", "global_micro_batch")  # fmt: skip
    flags.setdefault("negatives_cross_device", True) if kind is FinetuneArguments else None
    args = kind.build(output_dir="o", train_data="d", model_name_or_path="m", **flags)
    state = SimpleNamespace(ranks=before, agreement={product: total}, asked={flag: asked})
    point = checkpoint.ResumePoint(SimpleNamespace(__str__=lambda self: "c"), state, [])
    args = resume.fit_batch(args, point)
    return getattr(args, flag), point, resume.asked_batch(args, point)


def test_the_same_command_is_understood_on_any_number_of_ranks(monkeypatch):
    """A rank's batch follows the ranks, again and again: the checkpoint remembers what the command said. A command that gives
    the right batch itself is taken at its word."""
    for ranks in (1, 3, 4, 12):
        size, point, asked = fit(monkeypatch, ranks, per_device_train_batch_size=6)
        assert size == 12 // ranks and asked == {"per_device_train_batch_size": 6}
        assert f"--per_device_train_batch_size 6 -> {size} keeps the global batch of 12" in point.notes[0]
    # Written by 3 ranks that were started with the command of 2.
    assert fit(monkeypatch, 3, before=3, per_device_train_batch_size=6)[0] == 4
    size, point, asked = fit(monkeypatch, 3, per_device_train_batch_size=4)
    assert size == 4 and not point.notes and asked == {"per_device_train_batch_size": 4}
    assert fit(monkeypatch, 3, PretrainArguments, per_device_train_tokens=99, gradient_accumulation_steps=6,
               max_seq_length=9)[0] == 4  # fmt: skip


def test_what_cannot_go_on_exactly_is_refused(monkeypatch):
    """Ranks that cannot share the batch, another batch, and a loss that depends on the ranks: each with the remedy."""
    with pytest.raises(ValueError, match="5 ranks cannot share its global batch of 12 evenly; take 1, 2, 3, 4, 6, 12 ranks"):
        fit(monkeypatch, 5, per_device_train_batch_size=6)
    with pytest.raises(ValueError, match=r"8 on 3 ranks makes a global batch of 24, .* written with 12 \(6 on 2 ranks\)"):
        fit(monkeypatch, 3, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match="cannot resume exactly on 3: without --negatives_cross_device"):
        fit(monkeypatch, 3, per_device_train_batch_size=6, negatives_cross_device=False)
    fit(monkeypatch, 3, per_device_train_batch_size=6, negatives_cross_device=False, use_inbatch_neg=False)
    own = {"average_tokens_across_devices": False}
    with pytest.raises(ValueError, match="a mean over each rank's own tokens"):
        fit(monkeypatch, 3, PretrainArguments, per_device_train_batch_size=6, **own)
    # Bins of tokens are the same for any number of ranks, and so is the mean over them.
    fit(monkeypatch, 3, PretrainArguments, per_device_train_tokens=99, gradient_accumulation_steps=6, max_seq_length=9, **own)
    fit(monkeypatch, 2, per_device_train_batch_size=6, negatives_cross_device=False)  # the same number: nothing changes
