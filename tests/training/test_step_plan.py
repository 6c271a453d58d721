"""The plan of steps, and what the commands refuse before they start."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bge_ds import finetune, preprocess, pretrain
from bge_ds.config.arguments import FinetuneArguments, PretrainArguments
from bge_ds.data.sampling.sampler import EpochSampler
from bge_ds.data.sampling.token_batching import TokenBatchSampler
from bge_ds.training.step_plan import StepPlan


def plan(rows=100, batch=10, kind=FinetuneArguments, **flags):
    common = {"output_dir": "o", "train_data": "d", "model_name_or_path": "m"}
    args = kind.build(**common, **flags)
    return StepPlan.make(args, EpochSampler(0, ((0, rows),), batch))


def test_epochs_and_shares():
    """Steps from epochs (also in parts), ratios from the total, max_steps above all."""
    assert plan(num_train_epochs=2.5).total == 25
    assert plan(rows=101, num_train_epochs=1).total == 11
    assert plan(rows=101, num_train_epochs=1, dataloader_drop_last=True).total == 10
    assert plan(max_steps=7, num_train_epochs=9).total == 7
    shares = plan(num_train_epochs=2, logging_steps=0.1, save_steps=0.5)
    assert [s for s in range(1, 21) if shares.logs(s)] == list(range(2, 21, 2))
    assert [s for s in range(1, 21) if shares.saves(s)] == [10, 20]


def test_epoch_ends():
    """save_strategy epoch saves at the step in which an epoch's last text was seen, and at the end of the run."""
    by_epoch = plan(rows=95, num_train_epochs=2, save_strategy="epoch", logging_strategy="epoch")
    assert [s for s in range(1, by_epoch.total + 1) if by_epoch.saves(s)] == [10, 19]
    assert [s for s in range(1, by_epoch.total + 1) if by_epoch.logs(s)] == [10, 19]
    both = plan(kind=PretrainArguments, num_train_epochs=2, save_steps=4)
    assert [s for s in range(1, 21) if both.saves(s)] == [4, 8, 10, 12, 16, 20]


def test_the_plan_of_a_token_budget():
    """Epochs end at the step in which their last text is seen, the run's last one with the run; the budget is named."""
    lengths = np.random.default_rng(0).integers(3, 40, 500)
    order = TokenBatchSampler(EpochSampler(0, ((0, 500),), 1), lengths.__getitem__, 40, 100, 4)
    flags = {"output_dir": "o", "train_data": "d", "per_device_train_tokens": 100, "max_seq_length": 40}
    planned = StepPlan.make(PretrainArguments.build(**flags, num_train_epochs=3), order)
    assert planned.total == order.steps(3) and planned.epoch(planned.total) >= 3 > planned.epoch(planned.total - 1)
    saved = [step for step in range(1, planned.total + 1) if planned.saves(step)]
    assert len(saved) == 3 and saved[-1] == planned.total
    assert all(abs(order.epochs(step) - epoch) < 0.1 for epoch, step in enumerate(saved, start=1))
    short = StepPlan.make(PretrainArguments.build(**flags, max_steps=5), order)
    assert short.total == 5 and short.epoch(5) == pytest.approx(order.epochs(5))
    with pytest.raises(ValueError, match=r"500 rows do not fill one step .* lower --per_device_train_tokens"):
        StepPlan.make(
            PretrainArguments.build(**flags, num_train_epochs=1, dataloader_drop_last=True),
            TokenBatchSampler(order.line, order.lengths, 40, 100, 10**4),
        )


def evaluated(planned):
    return [step for step in range(1, planned.total + 1) if planned.evaluates(step)]


def test_which_steps_are_evaluated():
    """By steps, shares or epochs, from the delay on, and always the last step; never without folders."""
    assert evaluated(plan(num_train_epochs=1)) == []
    assert evaluated(plan(num_train_epochs=1, eval_data=["d"], eval_steps=4)) == [4, 8, 10]
    assert evaluated(plan(num_train_epochs=2, eval_data=["d"], eval_steps=0.25, eval_delay=9)) == [10, 15, 20]
    assert evaluated(plan(num_train_epochs=1, eval_data=["d"])) == [10]
    by_epoch = plan(rows=95, num_train_epochs=3, eval_data=["d"], eval_strategy="epoch", eval_delay=1.5)
    assert evaluated(by_epoch) == [19, 29]


def test_checkpoints_and_evaluations_coincide_where_the_best_is_asked_for():
    """A checkpoint that is not evaluated could be the best unnoticed; the last step is saved, since it may be the best."""
    best = {"eval_data": ["d"], "load_best_model_at_end": True, "num_train_epochs": 2}
    saved = plan(**best, save_steps=6, eval_steps=3)
    assert [s for s in range(1, 21) if saved.saves(s)] == [6, 12, 18, 20]
    with pytest.raises(ValueError, match=r"the checkpoint of step 4 would not be evaluated.* multiple of --eval_steps"):
        plan(**best, save_steps=4, eval_steps=3)
    with pytest.raises(ValueError, match="the checkpoint of step 10 would not be evaluated"):
        plan(**best, save_strategy="epoch", eval_steps=3)
    assert plan(**best, save_steps=4, eval_steps=3, eval_delay=17).total == 20  # what is before the delay is no candidate
    by_best = plan(**best, save_strategy="best", eval_steps=3)
    assert not any(by_best.saves(s) for s in range(1, 21))


def test_logging_first_and_last():
    assert [s for s in range(1, 11) if plan(num_train_epochs=1, logging_steps=4, logging_first_step=True).logs(s)] == [
        1,
        4,
        8,
        10,
    ]
    assert not any(plan(logging_strategy="no").logs(s) for s in range(1, 31))


@pytest.fixture
def groups(tmp_path):
    path = tmp_path / "groups.jsonl"
    lines = [{"query": f"question {i}", "pos": [f"answer {i}"], "neg": [f"other {i}", "wrong"]} for i in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def error_of(capsys, command, *flags) -> str:
    """The one line that a user sees."""
    assert command(list(map(str, flags))) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_folder_with_something_in_it_is_refused(capsys, tmp_path, groups, tiny_bert_path):
    """Nothing is overwritten unless asked for, and the message says how to ask."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    line = error_of(
        capsys, finetune.main, "--output_dir", tmp_path / "out", "--train_data", groups, "--model_name_or_path", tiny_bert_path
    )
    assert "is not empty (it holds precious)" in line and "--overwrite_output_dir" in line
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    # Going on from elsewhere is no reason to mix two runs.
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint-3" / "state.json").write_text("{}")
    line = error_of(
        capsys, finetune.main, "--output_dir", tmp_path / "out", "--train_data", groups, "--model_name_or_path", tiny_bert_path,
        "--resume_from_checkpoint", tmp_path / "other" / "checkpoint-3",
    )  # fmt: skip
    assert "is not empty (it holds precious)" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--passage_max_len", "131"], "--passage_max_len 131 is more than the 130 positions"),
        (["--resume_from_checkpoint", "nowhere"], "no resumable checkpoint there"),
        (["--train_data", "missing.jsonl"], "missing.jsonl"),
        (["--model_name_or_path", "no/such-model"], "no/such-model"),
        (["--eval_data", "no/such/folder"], "--eval_data no/such/folder: no such folder"),
    ],
)
def test_mistakes_before_the_start(capsys, tmp_path, groups, tiny_bert_path, flags, message):
    """Each is one line that names the culprit; nothing is written."""
    base = ["--output_dir", tmp_path / "out", "--train_data", groups, "--model_name_or_path", tiny_bert_path]
    assert message in error_of(capsys, finetune.main, *base, "--cache_dir", tmp_path / "cache", *flags)
    assert not (tmp_path / "out").exists()


def test_bad_lines_reach_the_person_with_file_and_line(capsys, tmp_path, groups, tiny_bert_path):
    """The trainer says of raw JSON lines what the preprocessing command says: where, and what is wrong."""
    groups.write_text(groups.read_text() + '{"query": "q", "pos": []}\n')
    flags = ["--output_dir", tmp_path / "out", "--train_data", groups, "--model_name_or_path", tiny_bert_path]
    line = error_of(capsys, finetune.main, *flags, "--cache_dir", tmp_path / "cache")
    assert f"{groups}:9" in line and "pos" in line
    assert not (tmp_path / "out").exists() and not list((tmp_path / "cache").rglob("manifest.json"))


@pytest.mark.parametrize(("command", "length"), [(pretrain, "max_seq_length"), (finetune, "passage_max_len")])
def test_a_tokenizer_of_another_model_is_refused(capsys, tmp_path, tiny_bert_path, command, length):
    """A tokenizer with more tokens than the model embeds would index past the matrix: on a GPU, the end of the process."""
    import helpers

    small = helpers.make_model("bert", tmp_path / "small", vocab_size=50)
    line = {"text": "the quick brown fox", "query": "fox", "pos": ["the quick brown fox"], "neg": ["a dog"]}
    (tmp_path / "texts.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
    line = error_of(
        capsys, command.main, "--output_dir", tmp_path / "out", "--train_data", tmp_path / "texts.jsonl",
        "--model_name_or_path", small, "--tokenizer_name", tiny_bert_path, "--cache_dir", tmp_path / "cache",
        f"--{length}", "40",
    )  # fmt: skip
    assert f"{small} embeds 50" in line


def test_a_budget_that_holds_no_whole_text_is_refused(capsys, tmp_path, tiny_bert_path):
    """The shards' length counts where none is given: the error names both flags, before anything is written."""
    (tmp_path / "texts.jsonl").write_text('{"text": "the quick brown fox"}\n' * 3)
    common = ["--model_name_or_path", tiny_bert_path, "--cache_dir", tmp_path / "cache", "--use_cpu"]
    shards = tmp_path / "shards"
    preprocess.main(
        ["pretrain", "--input", str(tmp_path / "texts.jsonl"), "--output", str(shards), "--tokenizer", str(tiny_bert_path),
         "--max_seq_length", "40"]
    )  # fmt: skip
    line = error_of(
        capsys, pretrain.main, "--output_dir", tmp_path / "out", "--train_data", shards, *common,
        "--per_device_train_tokens", "39",
    )  # fmt: skip
    assert "--per_device_train_tokens 39 does not hold one text of --max_seq_length 40" in line
    assert not (tmp_path / "out").exists()
