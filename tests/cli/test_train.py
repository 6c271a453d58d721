"""The training commands as people type them: each way of launching, and what lies in the output folder afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from bge_ds import preprocess
from bge_ds.training.metrics import slow_precision

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    base = tmp_path_factory.mktemp("commands")
    helpers.make_model("bert", base / "model")
    helpers.make_tokenizer("wordpiece", base / "model")
    words = " ".join(helpers.SENTENCES).split()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 3 + i % 20)) for i in range(40)]
    groups = [{"query": texts[i][:15], "pos": [texts[i]], "neg": [texts[(i + 7) % 40], texts[(i + 9) % 40]]} for i in range(20)]
    (base / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    (base / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return base


def launch(program: list[str], *flags: object) -> str:
    found = shutil.which(program[0], path=str(BIN))
    if found is None:
        pytest.skip(f"{program[0]} is not installed beside this Python")
    command = [found, *program[1:], *map(str, flags)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=helpers.REPO,
        env=helpers.environment(MASTER_PORT=str(helpers.free_port())),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


def run(command: str, ranks: int, *flags: object) -> str:
    """What the command says on so many ranks, which begin with their imports done."""
    return helpers.run_ranks("command", ranks, command, *flags, timeout=280)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def finetune_flags(setting, out, **more) -> list[object]:
    flags = {
        "output_dir": setting / out, "model_name_or_path": setting / "model", "train_data": setting / "groups.jsonl",
        "cache_dir": setting / "cache", "learning_rate": "1e-3", "per_device_train_batch_size": 4, "logging_steps": 1,
        "train_group_size": 3, "normlized": True, "temperature": 0.05, "query_max_len": 16, "passage_max_len": 40,
        "max_steps": 4, **more,
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", value)] + ["--negatives_cross_device", "--use_cpu"]


def test_finetune_by_deepspeed_and_by_torchrun(setting):
    """`deepspeed -m` and `torchrun -m` give the same run; recomputed activations change nothing; the monitors wrote."""
    port = ["--master_port", str(helpers.free_port())]
    out = launch(
        ["deepspeed", "--num_gpus", "2", *port, "-m", "bge_ds.finetune"],
        *finetune_flags(setting, "by_deepspeed", deepspeed="zero2"), "--gradient_checkpointing",
        "--report_to", "tensorboard", "csv", "--save_only_model", "--save_steps", "2",
    )  # fmt: skip
    assert "negatives         23 a query from all ranks" in out and "vectors differ from the trained model's by at most" in out
    port = ["--master_port", str(helpers.free_port())]
    launch(["torchrun", "--nproc_per_node", "2", *port, "-m", "bge_ds.finetune"], *finetune_flags(setting, "by_torchrun"))
    ours, theirs = metrics(setting / "by_deepspeed"), metrics(setting / "by_torchrun")
    assert [r["step"] for r in ours] == [1, 2, 3, 4]
    assert np.allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-4)
    assert ours[0]["negatives"] <= 23 and ours[0]["tokens_per_second"] > 0
    folder = setting / "by_deepspeed"
    assert list((folder / "runs").rglob("events.out.tfevents*")) and list((folder / "runs").rglob("*.csv"))
    assert AutoModel.from_pretrained(folder / "checkpoint-2").config.hidden_size == 32
    assert not (folder / "checkpoint-2" / "resume").exists()


def test_pretrain_from_scratch_then_finetune(setting):
    """One process from a JSON file of arguments; the encoder loads as masked LM and base model, and fine-tunes on."""
    out = setting / "pretrained"
    arguments = {
        "output_dir": str(out), "model_name_or_path": "", "config_name": str(setting / "model"),
        "tokenizer_name": str(setting / "model"), "train_data": str(setting / "texts.jsonl"), "use_cpu": True,
        "cache_dir": str(setting / "cache"), "max_seq_length": 40, "num_train_epochs": 2,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "logging_steps": 1, "save_total_limit": 1,
        "dataloader_num_workers": 2,
    }  # fmt: skip
    (setting / "arguments.json").write_text(json.dumps(arguments))
    launch(["python", "-m", "bge_ds.pretrain"], setting / "arguments.json")
    records = metrics(out)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]  # 40 texts twice, 16 a step
    assert all(abs(r["loss"] - r["encoder_loss"] - r["decoder_loss"]) < 1e-6 for r in records)
    assert records[-1]["loss"] < records[0]["loss"]
    assert 1e-3 < max(r["learning_rate"] for r in records) <= 2e-3  # the recipe for 32 random features, not 5e-5
    assert [p.name for p in sorted(out.glob("checkpoint-*"))] == ["checkpoint-5"]
    assert {"encoder_model", "decoder.safetensors", "decoder.json", "metrics.jsonl"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "encoder_model/pretraining.json").read_text()) == {"objective": "retromae"}
    tokenizer = AutoTokenizer.from_pretrained(out / "encoder_model")
    model, info = AutoModelForMaskedLM.from_pretrained(out / "encoder_model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model(**tokenizer("the quick brown fox", return_tensors="pt")).logits.isfinite().all()
    port = ["--master_port", str(helpers.free_port())]
    flags = finetune_flags(setting, "from_pretrained", model_name_or_path=out / "encoder_model", max_steps=1)
    launch(["deepspeed", "--num_gpus", "2", *port, "--module", "bge_ds.finetune"], *flags)
    before, after = model.base_model, AutoModel.from_pretrained(setting / "from_pretrained")
    moved = [(a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters(), strict=False)]
    assert 0 < max(moved) < 0.01  # one Adam step of 1e-3 from where pre-training ended, not from elsewhere


def test_pretrain_by_tokens(setting):
    """Two ranks, batches cut by tokens in loader workers: the summary says so, an epoch's steps follow from the bins."""
    out = setting / "by_tokens"
    said = run(
        "pretrain", 2, "--output_dir", out,
        "--model_name_or_path", setting / "model", "--train_data", setting / "texts.jsonl", "--cache_dir", setting / "cache",
        "--max_seq_length", 40, "--per_device_train_tokens", 150, "--num_train_epochs", 2, "--logging_steps", 1, "--use_cpu",
        "--dataloader_num_workers", 2, "--include_num_input_tokens_seen",
    )  # fmt: skip
    assert "150 tokens a rank x 2 ranks x 1 accumulation" in said and "texts a step on average" in said
    records = metrics(out)
    tokens = np.diff([0] + [r["num_input_tokens_seen"] for r in records])
    assert tokens.max() <= 300 and np.mean(tokens) > 220  # no bin of these texts leaves a whole text's length free
    assert 2 <= records[-1]["epoch"] < 2 + 1 / 4 and len(list(out.glob("checkpoint-*"))) == 2


def test_a_mixture_of_sets_resumed(setting):
    """Two ranks, two sets by weight, batches of one set and of similar length, loader workers: the table says what is taken,
    a resumed run ends in the same weights as an undisturbed one, and another mixture is refused."""
    lines = (setting / "groups.jsonl").read_text().splitlines(keepends=True)
    (setting / "few_no_in_batch_neg.jsonl").write_text("".join(lines[:6]))
    common = {"save_steps": 3, "dataloader_num_workers": 2, "per_device_train_batch_size": 2, "max_steps": 6,
              "train_sampling_strategy": "group_by_length", "max_example_num_per_dataset": 15}  # fmt: skip
    weights = [f"{setting / 'groups.jsonl'}=3", f"{setting / 'few_no_in_batch_neg.jsonl'}=1"]

    def start(out, *more) -> str:
        flags = finetune_flags(setting, out, **common)
        at = flags.index("--train_data")
        flags[at + 1 : at + 2] = weights
        return run("finetune", 2, *flags, "--same_dataset_within_batch", *more)

    said = start("mixed")
    assert "5 above max_example_num_per_dataset" in said and "0.7500" in said and "few_no_in_batch_neg.jsonl" in said
    shutil.copytree(setting / "mixed" / "checkpoint-3", setting / "mixed_on" / "checkpoint-3")
    assert "at step 3" in start("mixed_on", "--resume_from_checkpoint", setting / "mixed_on" / "checkpoint-3")
    ours, theirs = (AutoModel.from_pretrained(setting / name).state_dict() for name in ("mixed", "mixed_on"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    weights[0] = f"{setting / 'groups.jsonl'}=4"
    with pytest.raises(AssertionError, match=r"train_weights: \[3.0, 1.0\] there, \[4.0, 1.0\] now"):
        start("mixed_on", "--resume_from_checkpoint", setting / "mixed_on" / "checkpoint-3")


def test_sets_with_instructions_of_their_own(setting):
    """Folders of shards made with different query instructions train together; each is saved as a prompt named by its set."""
    folders = []
    for name in ("first", "second"):
        shutil.copy(setting / "groups.jsonl", setting / f"{name}.jsonl")
        folders.append(setting / f"{name}_shards")
        words = ["finetune", "--input", setting / f"{name}.jsonl", "--output", folders[-1], "--tokenizer", setting / "model",
                 "--query_instruction_for_retrieval", f"the {name}: ", "--query_max_len", 16, "--passage_max_len", 40,
                 "--num_proc", 1]  # fmt: skip
        assert preprocess.main([str(word) for word in words]) == 0
    flags = finetune_flags(setting, "instructed", max_steps=1, train_data=folders[0])
    flags.insert(flags.index("--train_data") + 2, folders[1])
    said = run("finetune", 1, *flags, "--mixing_temperature", 2)
    assert "warning: sets have different instructions" in said
    prompts = json.loads((setting / "instructed" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {"query": "", "query_first": "the first: ", "query_second": "the second: ", "passage": "", "document": ""}


def test_a_run_without_negatives_of_its_own(setting):
    """Groups without `neg`: ranks bring different numbers of passages, in-batch negatives serve, nothing hangs."""
    lines = (setting / "groups.jsonl").read_text().splitlines()
    bare = [json.loads(line) for line in lines]
    for i, group in enumerate(bare):
        if i % 3:
            group["neg"] = []
    (setting / "bare.jsonl").write_text("".join(json.dumps(g) + "\n" for g in bare))
    run("finetune", 2, *finetune_flags(setting, "bare", train_data=setting / "bare.jsonl"))
    assert all(np.isfinite(r["loss"]) and r["loss"] > 0.1 for r in metrics(setting / "bare"))


def test_every_objective_at_once(setting):
    """Two ranks at ZeRO-3, in pieces, every part of the objective, two sets of which one takes no in-batch negatives."""
    lines = [json.loads(line) for line in (setting / "groups.jsonl").read_text().splitlines()]
    for i, group in enumerate(lines):
        group |= {"pos_scores": [5.0 + i / 10], "neg_scores": [1.0, -i / 10]}
    folder = setting / "sets"
    folder.mkdir()
    for name, part in (("all.jsonl", lines[:12]), ("classes_no_in_batch_neg.jsonl", lines[12:])):
        (folder / name).write_text("".join(json.dumps(group) + "\n" for group in part))
    flags = finetune_flags(setting, "everything", train_data=folder, deepspeed="zero3", sub_batch_tokens=60, max_steps=5)
    run(
        "finetune", 2, *flags, "--bidirectional", "--use_mrl",
        "--mrl_dims", 8, 32, "--knowledge_distillation", "--false_negative_margin", 0.1, "--learnable_temperature",
    )  # fmt: skip
    records = metrics(setting / "everything")
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in records)
    assert records[-1]["temperature"] != records[0]["temperature"]
    # 23 other passages in all: queries of the marked set see the two of their own group.
    assert all(2 <= r["negatives"] < 23 for r in records)
    assert AutoModel.from_pretrained(setting / "everything").config.hidden_size == 32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--knowledge_distillation"], "needs pos_scores and neg_scores, and no group has them"),
        (["--use_mrl", "--mrl_dims", "8", "64"], "--mrl_dims 64 is more than the 32 features"),
        (["--bidirectional_attention"], "bidirectional is for decoders"),
    ],
)
def test_what_the_data_or_model_cannot_do_is_refused(setting, flags, message):
    """Known only once data and model are there: still before anything is trained or written."""
    with pytest.raises(AssertionError, match=message):
        run("finetune", 1, *finetune_flags(setting, "refused"), *flags)
    assert not (setting / "refused").exists()


def test_a_conflict_of_config_and_flags_ends_all_ranks(setting, tmp_path):
    """The error stands there once, names both sides, and the launcher returns with an error and no output folder."""
    (tmp_path / "mine.json").write_text('{"gradient_clipping": 0.3, "zero_optimization": {"stage": 2}}')
    with pytest.raises(AssertionError, match=r"gradient_clipping to 0.3 and --max_grad_norm makes it 1.0") as failure:
        run("finetune", 2, *finetune_flags(setting, "conflict", deepspeed=tmp_path / "mine.json"))
    assert str(failure.value).count("error: ") >= 1
    assert not (setting / "conflict").exists()


def test_half_precision_trains(setting):
    """bf16 on the CPU: the loss falls, the saved weights are the fp32 master copies, not their roundings, and where the CPU
    emulates it the summary says so."""
    flags = finetune_flags(setting, "bf16", num_train_epochs=8, max_steps=30)
    output = run("finetune", 1, *flags, "--bf16")
    slow = slow_precision(torch.device("cpu"), torch.bfloat16) is not None
    assert ("this CPU emulates bfloat16, leave --bf16 out" in output) == slow
    records = metrics(setting / "bf16")
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    weight = AutoModel.from_pretrained(setting / "bf16").encoder.layer[0].attention.self.query.weight
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("kind", ["finetune", "pretrain"])
def test_shards_longer_than_the_model(setting, kind):
    """Shards cut at 400 tokens train a model of 130 positions at a shorter length, the check of the saved model included."""
    long = " ".join(helpers.SENTENCES[i % 6] for i in range(12))
    lines = [
        {"query": f"{i} {long}", "pos": [f"{i} {long}"], "neg": [long, f"{long} {i}"], "text": f"{i} {long}"} for i in range(8)
    ]
    if kind == "finetune":
        lines = [{k: v for k, v in line.items() if k != "text"} for line in lines]
    data, out = setting / f"long_{kind}.jsonl", setting / f"long_{kind}"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lengths = ["--query_max_len", 400, "--passage_max_len", 400] if kind == "finetune" else ["--max_seq_length", 400]
    shards = setting / f"long_{kind}_shards"
    words = [kind, "--input", data, "--output", shards, *lengths, "--tokenizer", setting / "model", "--num_proc", 1]
    assert preprocess.main([str(word) for word in words]) == 0
    flags = ["--output_dir", out, "--model_name_or_path", setting / "model", "--train_data", shards, "--max_steps", 1]
    short = ["--query_max_len", 20, "--passage_max_len", 30] if kind == "finetune" else ["--max_seq_length", 30]
    run(kind, 1, *flags, *short, "--use_cpu", "--save_strategy", "no")
    assert (out / ("config.json" if kind == "finetune" else "encoder_model/config.json")).is_file()
