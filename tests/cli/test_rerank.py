"""Training a reranker: stopped and resumed, what is saved, scripts of FlagEmbedding, mistakes."""

from __future__ import annotations

import json
import shlex

import helpers
import numpy as np
import pytest
import score_runs
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bge_ds.config.arguments import RerankArguments, parse
from bge_ds.data.preprocess import prepare, validate
from bge_ds.objectives.reranking import RerankingObjective

GROUPS = [
    {"query": helpers.SENTENCES[i % 6][: 12 + i], "pos": [f"{helpers.SENTENCES[i % 6]} {i}"],
     "neg": [f"{helpers.SENTENCES[(i + k) % 6]} {'and so on ' * k}" for k in (1, 2, 3)],
     "pos_scores": [4.0 - i / 4], "neg_scores": [1.0, 0.5, -i / 8]}
    for i in range(8)
]  # fmt: skip
# examples/finetune/reranker of FlagEmbedding 1.4: the module's name and the paths are changed, nothing else.
SHARED = shlex.split("""
    --knowledge_distillation True --pad_to_multiple_of 8 --train_group_size 8 --overwrite_output_dir
    --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --dataloader_drop_last True --warmup_ratio 0.1
    --gradient_checkpointing --weight_decay 0.01 --logging_steps 1 --save_steps 1000
""")
ENCODER = shlex.split("--query_max_len 256 --passage_max_len 256 --learning_rate 6e-5 --fp16 --num_train_epochs 4")
DECODER = shlex.split("""
    --use_lora True --lora_rank 32 --lora_alpha 64 --use_flash_attn True --target_modules q_proj k_proj v_proj o_proj
    --save_merged_lora_model True --model_type decoder --query_max_len 512 --passage_max_len 512
    --query_instruction_for_rerank 'A: ' --query_instruction_format '{}{}' --learning_rate 2e-4 --bf16
    --passage_instruction_for_rerank 'B: ' --passage_instruction_format '{}{}' --num_train_epochs 1
""")
# Its DeepSpeed file, but for its optimizer, which DeepSpeed compiles; on a CPU that fails.
DS_STAGE0 = {
    "zero_optimization": {"stage": 0},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 12, "hysteresis": 2,
             "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "scheduler": {"type": "WarmupDecayLR", "params": {name: "auto" for name in (
        "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")}},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 100,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A BERT without a head, a decoder that can say Yes, groups, and their shards as made for an embedder."""
    base = tmp_path_factory.mktemp("reranking")
    helpers.make_model("bert", base / "bert", max_position_embeddings=600)
    helpers.make_tokenizer("wordpiece", base / "bert", types=True)
    score_runs.make_decoder(base / "decoder")
    score_runs.write_groups(base / "groups.jsonl", GROUPS)
    (base / "ds_stage0.json").write_text(json.dumps(DS_STAGE0))
    return base


def shards_of(setting, name="groups", **settings):
    tokenizer = validate.load_tokenizer(str(setting / "bert"))
    return prepare.prepare(
        "finetune", str(setting / f"{name}.jsonl"), tokenizer, cache_dir=str(setting / "cache"), say=lambda _: None,
        query_max_len=32, passage_max_len=80, **settings,
    )  # fmt: skip


def flags_of(setting, output, stage: int, **more) -> dict:
    return {
        "model_name_or_path": str(setting / "bert"), "train_data": str(shards_of(setting)), "output_dir": str(output),
        "deepspeed": f"zero{stage}", "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
        "train_group_size": 3, "per_device_train_batch_size": 2, "max_len": 60, "sub_batch_tokens": 150,
        "dataloader_num_workers": 1, **more,
    }  # fmt: skip


def losses(folder) -> dict[int, tuple]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: (record["loss"], record["positive_first"]) for record in records}


def test_an_embedder_s_shards_train_a_reranker_that_resumes_and_scores(tmp_path, setting):
    """Two ranks, ZeRO 3, a new head, pieces by tokens: stopped and resumed it ends in the same bits, on one rank within 1e-4;
    transformers and sentence-transformers give the logits."""
    whole, middle = tmp_path / "whole", {"resume_from_checkpoint": str(tmp_path / "whole/checkpoint-2")}
    runs = [["rerank", flags_of(setting, whole, 3)], ["rerank", flags_of(setting, tmp_path / "resumed", 3, **middle)]]
    said = helpers.run_ranks("train", 2, json.dumps(runs), timeout=900)
    assert "scores by a new head of one label" in said and "its scores differ from the trained model's by at most" in said
    helpers.run_ranks("train", 1, json.dumps([["rerank", flags_of(setting, tmp_path / "one", 1, **middle)]]), timeout=900)
    expected = losses(whole)
    assert sorted(expected) == [1, 2, 3, 4]
    assert losses(tmp_path / "resumed") == {step: expected[step] for step in (3, 4)}
    weights, resumed, one = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed", "one"))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    for step, found in losses(tmp_path / "one").items():
        np.testing.assert_allclose(found, expected[step], rtol=1e-4)
    # A softmax does not see what is added to all its scores: such gradients are rounding, which Adam makes a whole step of.
    unseen = ("key.bias", "classifier.bias")
    assert all((weights[name] - one[name]).abs().max() < 1e-4 for name in weights if not name.endswith(unseen))
    start = load_file(setting / "bert" / "model.safetensors")["bert.encoder.layer.0.attention.self.query.weight"]
    assert not torch.equal(weights["bert.encoder.layer.0.attention.self.query.weight"], start)

    pairs = [(group["query"], text) for group in GROUPS[:3] for text in group["pos"] + group["neg"]]
    tokenizer, model = AutoTokenizer.from_pretrained(whole), AutoModelForSequenceClassification.from_pretrained(whole)
    with torch.no_grad():
        logits = model(**tokenizer(*zip(*pairs, strict=True), padding=True, return_tensors="pt")).logits[:, 0].numpy()
    encoder = CrossEncoder(str(whole), device="cpu")
    assert encoder.num_labels == 1
    np.testing.assert_allclose(encoder.predict(pairs), logits, atol=1e-5)
    card = (whole / "README.md").read_text()
    assert "pipeline_tag: text-ranking" in card and "FlagReranker" in card and "| loss | cross entropy |" in card


def test_the_script_of_flagembedding_s_encoder_runs(tmp_path, setting):
    """Its flags and its DeepSpeed file; without --fp16, which this CPU does not train in. What has no effect is said."""
    words = [*SHARED, *ENCODER, "--output_dir", tmp_path / "out", "--train_data", setting / "groups.jsonl", "--cache_dir",
             tmp_path, "--cache_path", tmp_path / "shards", "--model_name_or_path", setting / "bert", "--deepspeed",
             setting / "ds_stage0.json"]  # fmt: skip
    words = [str(word) for word in words]
    args = parse(RerankArguments, words)
    assert args.fp16 and args.cuts == {"query_max_len": 320, "passage_max_len": 384, "max_len": 512}
    words.remove("--fp16")
    said = helpers.run_ranks("command", 1, "rerank", *words, "--use_cpu", timeout=900)
    assert said.count("--pad_to_multiple_of 8 has no effect") == 1 and list((tmp_path / "shards").rglob("manifest.json"))
    assert len(losses(tmp_path / "out")) == 16  # 8 groups, 2 a step, 4 epochs


def test_the_script_of_flagembedding_s_decoder_runs(tmp_path, setting):
    """Its flags, lines with their prompt: the merged model and the adapter on the base model give the same logit of Yes."""
    peft = pytest.importorskip("peft")
    asked = "Is B an answer to A?"
    score_runs.write_groups(tmp_path / "groups.jsonl", [group | {"prompt": asked, "type": "normal"} for group in GROUPS])
    words = [*SHARED, *DECODER, "--output_dir", tmp_path / "out", "--train_data", tmp_path / "groups.jsonl", "--cache_dir",
             tmp_path, "--cache_path", tmp_path, "--model_name_or_path", setting / "decoder", "--deepspeed",
             setting / "ds_stage0.json"]  # fmt: skip
    words = [str(word) for word in words]
    objective = RerankingObjective(parse(RerankArguments, words))
    make, options = objective.collate(1)
    batch = make(objective.data, np.zeros(1, int), np.array([3]), **options)
    texts = {objective.tokenizer.decode(ids) for _, _, ids in batch.decodable()}
    group = GROUPS[3]
    assert texts == {f"<s>A: {group['query']}\nB: {text}\n{asked}" for text in group["pos"] + group["neg"]}
    words[words.index("--bf16")] = "--use_cpu"
    helpers.run_ranks("command", 1, "rerank", *words, timeout=900)
    base = AutoModelForCausalLM.from_pretrained(setting / "decoder")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([objective.tokenizer("A: a\nB: b\n" + asked, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        before = base(ids).logits
        after = merged(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out/lora_adapter")(ids).logits
    assert (adapted - after).abs().max() < 1e-4 < (after - before).abs().max()
    assert torch.equal(merged.lm_head.weight, AutoModelForCausalLM.from_pretrained(setting / "decoder").lm_head.weight)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval_rerank_depth", "5"], "no effect without --eval_data"),
        (["--eval_data", "x", "--eval_search_results", "a", "b"], "names 2 files for 1 folders"),
        (["--train_group_size", "1"], "nothing to rank it against"),
        (["--loss", "none"], "no loss without --knowledge_distillation"),
        (["--loss", "binary_cross_entropy", "--label_smoothing", "0.1"], "no effect without --loss cross_entropy"),
        (["--kd_loss_type", "ranknet"], "no effect without --knowledge_distillation"),
        (["--label_smoothing", "1"], "below 1"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing"),
        (["--query_instruction_for_rerank", "q", "--query_instruction_format", "{}"], "must hold {} twice"),
        (["--passage_instruction_format", "{} : {}"], "no effect without --passage_instruction_for_rerank"),
        (["--shuffle_ratio", "0.5"], "cannot be shuffled"),
        (["--from_peft", "x"], "merge the adapter"),
        (["--sub_batch_size", "2", "--gradient_accumulation_steps", "2"], "exclude each other"),
    ],
)
def test_settings_that_mean_nothing_are_refused(capsys, flags, words):
    """Each names the flag and the remedy, before anything is loaded."""
    with pytest.raises(SystemExit):
        parse(RerankArguments, ["--output_dir", "o", "--train_data", "d", "--model_name_or_path", "m", *flags])
    assert words in capsys.readouterr().err


def test_data_and_models_that_cannot_serve_are_refused(tmp_path, setting):
    """Shards of an embedder's prompts or of shorter texts, bare groups, missing scores, wrong models: each with its remedy."""
    bare = [GROUPS[0] | {"neg": [], "neg_scores": []}, *GROUPS[1:]]
    instructed = [group | {"prompt": "the prompt: "} for group in GROUPS]
    asked = [group | {"prompt": str(i)} for i, group in enumerate(GROUPS)]
    unscored = [{name: group[name] for name in ("query", "pos", "neg")} for group in GROUPS]
    for name, groups in {"bare": bare, "instructed": instructed, "asked": asked, "unscored": unscored}.items():
        score_runs.write_groups(setting / f"{name}.jsonl", groups)

    def refused(words, model="bert", **flags):
        with pytest.raises(ValueError, match=words):
            flags = {"train_data": str(shards_of(setting)), "output_dir": "o", "model_name_or_path": str(setting / model),
                     "cache_dir": str(setting / "cache"), **flags}  # fmt: skip
            RerankingObjective(RerankArguments.build(**flags)).check()

    with_instruction = shards_of(setting, query_instruction="query: ")
    refused(r"each query begins with 'query: ', and this run's with ''", train_data=str(with_instruction))
    refused("prompts of their lines, such as 'the prompt: '", train_data=str(shards_of(setting, "instructed")))
    refused("--query_max_len 33 is longer than the 32", query_max_len=33)
    refused("1 groups have no negatives", train_data=str(setting / "bare.jsonl"))
    refused("group 0 .* has none", train_data=str(setting / "unscored.jsonl"), knowledge_distillation=True)
    refused("different prompts, such as '0', '1'", "decoder", train_data=str(setting / "asked.jsonl"))
    refused("--model_type decoder", model_type="decoder")
    refused("--prompt is for decoders", prompt="Is it?")
    refused("--use_lora is for decoders", use_lora=True)
    refused("more than the 600 positions", train_data=str(setting / "groups.jsonl"), passage_max_len=700)
    refused("leave no room for a passage", max_len=8)
    made = RerankingObjective(
        RerankArguments.build(
            output_dir="o", train_data=str(with_instruction), model_name_or_path=str(setting / "bert"), max_len=40,
            query_instruction_for_rerank="query:", query_instruction_format="{} {}",
        )
    )  # fmt: skip
    assert (made.args.query_max_len, made.args.passage_max_len, made.args.cuts["max_len"]) == (32, 80, 40)
