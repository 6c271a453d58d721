"""The scripts of `examples/finetune/embedder` of FlagEmbedding 1.4, on data of their form: another module, other paths."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from bge_ds.config.arguments import FinetuneArguments, parse
from bge_ds.objectives.contrastive import ContrastiveObjective

DATA = """
    {base}/retrieval
    {base}/sts/sts.jsonl
    {base}/classification-no_in_batch_neg
    {base}/clustering-no_in_batch_neg
"""
# As the scripts have them, but for paths. --fp16 is put in place of {precision}: a CPU does not train in it.
SHARED = """
    --train_data {data} --cache_path {out}/cache --train_group_size 8 --query_max_len 512 --passage_max_len 512
    --pad_to_multiple_of 8
    --overwrite_output_dir {precision} --num_train_epochs 4 --per_device_train_batch_size 2 --dataloader_drop_last True
    --warmup_ratio 0.1 --gradient_checkpointing --logging_steps 1 --save_steps 1000 --negatives_cross_device --temperature 0.02
    --normalize_embeddings True --output_dir {out}/model --cache_dir {out}
"""
ENCODER = """
    --model_name_or_path {base}/bert --learning_rate 1e-5 --deepspeed {base}/ds_stage0.json --sentence_pooling_method cls
    --query_instruction_for_retrieval 'Represent this sentence for searching relevant passages: '
    --query_instruction_format '{{}}{{}}' --kd_loss_type kl_div
"""
DECODER = r"""
    --model_name_or_path {base}/decoder --use_lora True --lora_rank 32 --lora_alpha 64
    --target_modules q_proj k_proj v_proj o_proj gate_proj down_proj up_proj
    --additional_special_tokens '<instruct>' '<query>' --save_merged_lora_model True
    --learning_rate 1e-4 --deepspeed {base}/ds_stage1.json --sentence_pooling_method last_token
    --query_instruction_for_retrieval 'Given a query, retrieve passages that are relevant to the query.'
    --query_instruction_format '<instruct>{{}}\n<query>{{}}' --kd_loss_type m3_kd_loss
"""
PLAIN = "--knowledge_distillation False"
SAME_DATASET = "--knowledge_distillation True --same_dataset_within_batch True --small_threshold 0 --drop_threshold 0"
# examples/finetune/ds_stage0.json and ds_stage1.json.
_AUTO = ("lr", "betas", "eps", "weight_decay"), ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
_SCALING = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
_COMMON = {
    "scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(_AUTO[1], "auto")},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip
DS_STAGES = {
    "ds_stage0": {
        **_COMMON, "zero_optimization": {"stage": 0}, "fp16": {**_SCALING, "initial_scale_power": 12},
        "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": dict.fromkeys(_AUTO[0], "auto")},
        "steps_per_print": 100,
    },
    "ds_stage1": {
        **_COMMON, "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8},
        "fp16": {**_SCALING, "initial_scale_power": 10}, "bf16": {**_SCALING, "initial_scale_power": 10},
        "optimizer": {"type": "AdamW", "params": {**dict.fromkeys(_AUTO[0], "auto"), "torch_adam": True}},
        "steps_per_print": 1000,
    },
}  # fmt: skip
# file -> (type, prompt, negatives, whether there are scores), as in the example data.
FILES = {
    "retrieval/msmarco": ("normal", "Given a web search query, retrieve relevant passages that answer the query.", 9, True),
    "retrieval/nli": ("only_1neg", "Retrieve semantically similar text.", 1, True),
    "retrieval/nq": ("normal", "Given a question, retrieve Wikipedia passages that answer the question.", 12, True),
    "sts/sts": ("symmetric_sts", "Retrieve semantically similar text.", 10, False),
    "classification-no_in_batch_neg/AmazonClassification": ("symmetric_class", "Classify the given Amazon review.", 4, False),
    "classification-no_in_batch_neg/Banking77Classification": ("symmetric_class", "Find the corresponding intents.", 9, False),
    "clustering-no_in_batch_neg/arXiv_title": ("symmetric_clustering", "Identify the category of papers.", 8, False),
    "clustering-no_in_batch_neg/bioRXiv_title": ("symmetric_clustering", "Identify the main category.", 11, False),
}
LINES = 4  # of each file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Example data, DeepSpeed files, an encoder, and a decoder whose embeddings have no row to spare."""
    base = tmp_path_factory.mktemp("examples")
    words = " ".join(helpers.SENTENCES).split()
    rng = np.random.default_rng(0)
    for name, (kind, prompt, negatives, scored) in FILES.items():
        lines = []
        for _ in range(LINES):
            query, positive, *others = (" ".join(rng.choice(words, rng.integers(3, 12))) for _ in range(2 + negatives))
            line = {"query": query, "pos": [positive], "neg": others, "prompt": prompt, "type": kind}
            scores = {"pos_scores": [98.5], "neg_scores": rng.uniform(60, 98, negatives).round(2).tolist()} if scored else {}
            lines.append(line | scores)
        (base / name).parent.mkdir(exist_ok=True)
        (base / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in DS_STAGES.items():
        (base / f"{name}.json").write_text(json.dumps(content))
    helpers.make_tokenizer("wordpiece", base / "bert")
    helpers.make_model("bert", base / "bert", max_position_embeddings=600)
    helpers.make_tokenizer("bytes", base / "decoder")
    tokens = len(AutoTokenizer.from_pretrained(base / "decoder"))
    helpers.make_model("llama", base / "decoder", max_position_embeddings=600, vocab_size=tokens)
    return base


def words_of(base: Path, out: Path, *parts: str, precision: str = "--fp16") -> list[str]:
    return shlex.split(" ".join((SHARED, *parts)).format(base=base, out=out, data=DATA.format(base=base), precision=precision))


def run(base: Path, out: Path, *parts: str, precision: str = "") -> tuple[str, list[dict]]:
    """What two ranks say, and their log; with --fp16 as in the script, the flags are read all the same."""
    assert parse(FinetuneArguments, words_of(base, out, *parts)).fp16
    said = helpers.run_ranks(
        "command", 2, "finetune", *words_of(base, out, *parts, precision=precision), "--use_cpu", timeout=900
    )
    assert said.count("--pad_to_multiple_of 8 has no effect") == 1 and list((out / "cache").rglob("manifest.json"))
    return said, [json.loads(line) for line in (out / "model/metrics.jsonl").read_text().splitlines()]


def prompts_in(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]


def batch_of(base: Path, out: Path, row: int, *parts: str) -> list[tuple[str, str]]:
    """(role, text) of what the group of a row is trained on."""
    objective = ContrastiveObjective(parse(FinetuneArguments, words_of(base, out, *parts)))
    make, options = objective.collate(1)
    batch = make(objective.data, np.zeros(1, int), np.array([row]), **options)
    return [(role, objective.tokenizer.decode(ids)) for _, role, ids in batch.decodable()]


def test_encoder_only_base(tmp_path, base):
    """Batches of all sets; the model is saved with its prompt and gives sentence-transformers' vectors."""
    said, log = run(base, tmp_path, ENCODER, PLAIN)
    assert len(log) == len(FILES) * LINES * 4 // 4 and "scores" not in said.split("settings that differ")[0]
    assert prompts_in(tmp_path / "model")["query"] == "Represent this sentence for searching relevant passages: "
    model, tokenizer = (auto.from_pretrained(tmp_path / "model") for auto in (AutoModel, AutoTokenizer))
    with torch.no_grad():
        first = model(**tokenizer(["the quick fox"], return_tensors="pt")).last_hidden_state[0, 0]
    found = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(["the quick fox"])[0]
    np.testing.assert_allclose(found, torch.nn.functional.normalize(first, dim=0).numpy(), atol=1e-5)


def test_encoder_only_base_same_dataset(tmp_path, base):
    """Sets without scores train by contrast, those of a symmetric type in half batches; the table says both."""
    said, log = run(base, tmp_path, ENCODER, SAME_DATASET)
    table = {name: line for line in said.splitlines() for name in FILES if f"{name}.jsonl" in line and "%" in line}
    for name, (kind, _, _, scored) in FILES.items():
        assert table[name].endswith(", distilled" if scored else ", no scores: contrast alone")
        assert (", 2 a step" in table[name]) == kind.startswith("symmetric")
    assert len(log) == 3 * LINES * 4 // 4 + 5 * LINES * 4 // 2 and all(np.isfinite(record["loss"]) for record in log)
    # One negative of only_1neg, no in-batch negatives in marked folders; otherwise a step's passages, but one's own positive.
    assert {record["negatives"] for record in log} <= {4 * 8 - 1, 4 * 2 - 1, 2 * 8 - 1, 4, 7}
    assert {4, 7, 7 + 8, 4 * 8 - 1} <= {record["negatives"] for record in log}
    # One rank with the whole batch, in pieces, is the same run.
    words = words_of(base, tmp_path / "one", ENCODER, SAME_DATASET, precision="--use_cpu --sub_batch_size 5")
    words[words.index("--per_device_train_batch_size") + 1] = "4"
    helpers.run_ranks("command", 1, "finetune", *words, timeout=900)
    alone = [json.loads(line)["loss"] for line in (tmp_path / "one/model/metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([record["loss"] for record in log], alone, rtol=1e-4)


def test_decoder_only_base(tmp_path, base):
    """Special tokens and a format with a line break: in the prompt, the tokenizer and the merged model alike."""
    said, log = run(base, tmp_path, DECODER, PLAIN)
    assert len(log) == 32 and said.count("--kd_loss_type m3_kd_loss has no effect") == 1
    folder = tmp_path / "model"
    asked = "Given a query, retrieve passages that are relevant to the query."
    assert prompts_in(folder)["query"] == f"<instruct>{asked}\n<query>"
    tokenizer, weights = AutoTokenizer.from_pretrained(folder), load_file(folder / "model.safetensors")
    assert tokenizer.tokenize("<instruct>a\n<query>b")[0] == "<instruct>" and "<query>" in tokenizer.all_special_tokens
    assert len(weights["embed_tokens.weight"]) == len(tokenizer) == AutoModel.from_pretrained(folder).config.vocab_size
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(base / "decoder")) + 2
    assert (folder / "lora_adapter/adapter_model.safetensors").is_file()
    start = load_file(base / "decoder/model.safetensors")
    assert torch.equal(weights["embed_tokens.weight"][:-2], start["embed_tokens.weight"])
    assert not torch.equal(weights["layers.0.mlp.up_proj.weight"], start["layers.0.mlp.up_proj.weight"])
    vectors = SentenceTransformer(str(folder), device="cpu").encode(["a fox", "a dog"], prompt_name="query")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_decoder_only_base_same_dataset(tmp_path, base):
    """In bf16, whose section of ds_stage1.json has keys that DeepSpeed refuses: said once, and trained without."""
    said, log = run(base, tmp_path, DECODER, SAME_DATASET, precision="--bf16")
    assert said.count('ds_stage1.json: left out of "bf16", whose loss is not scaled: loss_scale, initial_scale_power') == 1
    assert len(log) == 52 and all(np.isfinite(record["loss"]) for record in log)


def test_a_line_s_prompt_and_type_mean_what_they_mean_there(tmp_path, base):
    """The prompt takes the instruction's place in the format, and stands before the passages of symmetric types as well, where
    each batch is of one set; there, a group's size is its type's too."""
    rows = {name: k * LINES for k, name in enumerate(FILES)}
    order = sorted(name for name in FILES if name.startswith("retrieval"))
    order += ["sts/sts", *sorted(n for n in FILES if n.startswith("cla")), *sorted(n for n in FILES if n.startswith("clu"))]
    rows = {name: k * LINES for k, name in enumerate(order)}
    sizes = {"only_1neg": lambda n: 2, "symmetric_class": lambda n: min(n + 1, 8)}
    for name, (kind, prompt, negatives, _) in FILES.items():
        line = json.loads((base / f"{name}.jsonl").read_text().splitlines()[0])
        before = f"<s><instruct>{prompt}\n<query>"
        for same in (PLAIN, SAME_DATASET):
            (_, query), *passages = batch_of(base, tmp_path, rows[name], DECODER, same)
            assert query == f"{before}{line['query']}</s>"
            symmetric = same == SAME_DATASET and kind in ("symmetric_sts", "symmetric_clustering")
            texts = {(before if symmetric else "<s>") + text + "</s>" for text in line["pos"] + line["neg"]}
            assert {text for _, text in passages} <= texts, name
            assert len(passages) == (sizes.get(kind, lambda n: 8)(negatives) if same == SAME_DATASET else 8)
