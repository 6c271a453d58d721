"""Loading under ZeRO 3: no rank holds the whole model, and the run is the one of a model loaded whole."""

from __future__ import annotations

import json

import helpers
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
)


def test_values_are_those_of_whole_loading(tmp_path):
    """Encoders and decoders, from files with and without a head: every weight's and buffer's value and type."""
    shape = dict(
        vocab_size=90, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=50, pad_token_id=0,
        max_position_embeddings=64, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(1)
    special = dict(cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    for model in (LlamaModel(LlamaConfig(**shape)), ModernBertModel(ModernBertConfig(**shape, **special))):
        model.save_pretrained(tmp_path / model.config.model_type.replace("modernbert", "modern"))
    folders = [helpers.make_model(family, tmp_path / f"{family}_bert") for family in ("bert", "roberta")]
    out = helpers.run_ranks("sharded_loading", 2, *folders, tmp_path / "llama", tmp_path / "modern")
    assert out.count("ok") == 4
    assert out.count("refused") == 2  # on both ranks, though one alone reads the weights


def test_training_is_that_of_whole_loading(tmp_path):
    """Fine-tuning (all weights, or adapters) and pre-training: losses, gradient norms and saved weights, to the last bit."""
    helpers.make_model("bert", tmp_path / "model", dropout=0.1)
    helpers.make_tokenizer("wordpiece", tmp_path / "model")
    tokens = len(AutoTokenizer.from_pretrained(helpers.make_tokenizer("bytes", tmp_path / "tight")))
    helpers.make_model("bert", tmp_path / "tight", dropout=0.1, vocab_size=tokens)  # no row to spare for a new token
    texts = [" ".join(helpers.SENTENCES[i % 6].split()[: 2 + i]) for i in range(8)]
    groups = [{"query": t[:15], "pos": [t], "neg": texts[:i] + texts[i + 1 :]} for i, t in enumerate(texts)]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    common = {
        "model_name_or_path": str(tmp_path / "model"), "deepspeed": "zero3", "cache_dir": str(tmp_path / "cache"),
        "per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3,
        "dataloader_num_workers": 0, "save_strategy": "no", "weight_decay": 0.1,
    }  # fmt: skip
    groups = {"train_data": str(tmp_path / "groups.jsonl"), "train_group_size": 3, "temperature": 0.05}
    cases = {
        "fp32": groups,
        "bf16": {**groups, "bf16": True},
        "lora": {**groups, "use_lora": True, "lora_rank": 4, "bf16": True},
        "tokens": {
            **groups,
            "model_name_or_path": str(tmp_path / "tight"),
            "additional_special_tokens": ["<a>", "<b>"],
            "query_instruction_for_retrieval": "<a>",
        },
        "pretrain": {"train_data": str(tmp_path / "texts.jsonl"), "max_seq_length": 40, "bf16": True},
    }
    runs = [
        ("pretrain" if case == "pretrain" else "finetune",
         {**common, **more, "sharded": sharded, "output_dir": str(tmp_path / f"{case}_{sharded}")})
        for case, more in cases.items()
        for sharded in (False, True)
    ]  # fmt: skip
    helpers.run_ranks("sharded_training", 2, json.dumps(runs))
    for case in cases:
        whole, sharded = (tmp_path / f"{case}_{s}" for s in (False, True))
        logs = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, sharded)]
        picked = [[(r["step"], r["loss"], r["grad_norm"]) for r in log] for log in logs]
        assert len(picked[0]) == 3 and picked[0] == picked[1], case
        file = "encoder_model/model.safetensors" if case == "pretrain" else "model.safetensors"
        a, b = load_file(whole / file), load_file(sharded / file)
        assert a.keys() == b.keys()
        if case == "tokens":
            rows, tokenizer = a["embeddings.word_embeddings.weight"], AutoTokenizer.from_pretrained(sharded)
            assert len(rows) == AutoConfig.from_pretrained(sharded).vocab_size == len(tokenizer)
            assert tokenizer.tokenize("<a>the")[0] == "<a>" and not torch.equal(rows[-1], rows[-2])
        assert all(torch.equal(a[k], b[k]) for k in a if "pooler" not in k), case  # the file has none: it starts random


def test_no_rank_holds_a_full_copy(tmp_path, monkeypatch):
    """From loading to the built engine, a rank's memory stays near its half of the weights; loaded whole, it does not."""
    # What is freed goes back to the system at once: the C library's stock of free memory would be counted as held.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    torch.manual_seed(0)
    shape = dict(hidden_size=512, num_attention_heads=8, intermediate_size=2048, vocab_size=500)
    BertModel(BertConfig(**shape, num_hidden_layers=1)).save_pretrained(tmp_path / "small")
    BertModel(BertConfig(**shape, num_hidden_layers=16)).save_pretrained(tmp_path / "large")  # 195 MiB
    lines = helpers.run_ranks("sharded_memory", 2, tmp_path / "small", tmp_path / "large", fresh=True).splitlines()
    shares = {kind: [float(x.split()[1]) for x in lines if x.startswith(kind)] for kind in ("sharded", "whole")}
    print(shares)
    assert all(len(ranks) == 2 for ranks in shares.values())
    assert max(shares["sharded"]) < 0.65
    assert max(shares["whole"]) > 1.2
