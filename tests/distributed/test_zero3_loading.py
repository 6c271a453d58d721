"""Loading under ZeRO 3: no rank holds the whole model, and the run is the one of a model loaded whole."""

from __future__ import annotations

import json

import helpers
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ModernBertConfig, ModernBertModel

VALUES_SCRIPT = """
import sys
import deepspeed, torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from bge_ds.distributed import collectives
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.modeling.encoder import load_backbone

engines.start(use_cpu=True)
for folder in sys.argv[1:]:
    for kind in (AutoModel, AutoModelForMaskedLM) if "bert" in folder else (AutoModel,):
        whole = load_backbone(kind, folder)
        for bf16 in (False, True):
            with engines.sharded_loading("zero3", bf16=bf16):
                shared = load_backbone(kind, folder)
            assert engines.count_elements(shared) == engines.count_elements(whole)
            names = dict(whole.named_parameters())
            assert list(names) == [name for name, _ in shared.named_parameters()]
            for name, parameter in shared.named_parameters():
                assert parameter.numel() == 0 and parameter.ds_tensor.numel() <= parameter.ds_numel // 2 + 1, name
                with deepspeed.zero.GatheredParameters([parameter]):
                    assert parameter.dtype == (torch.bfloat16 if bf16 else torch.float32)
                    assert "pooler" in name or torch.equal(parameter, names[name].to(parameter.dtype)), name
            for (name, buffer), other in zip(whole.named_buffers(), shared.buffers(), strict=True):
                assert buffer.dtype == other.dtype and torch.equal(buffer, other), name
    with engines.sharded_loading("zero2"):
        assert all(p.numel() for p in load_backbone(AutoModel, folder).parameters())
    # Outside of the block, transformers loads as it always did: the check of the saved model runs on rank 0 alone.
    if collectives.rank() == 0:
        assert all(p.numel() for p in load_backbone(AutoModel, folder).parameters())
        print("ok", end=" ")

config = AutoConfig.from_pretrained(folder)
config.intermediate_size += 2
try:
    with engines.sharded_loading("zero3"):
        load_backbone(AutoModel, folder, config=config)
except (RuntimeError, ValueError) as error:
    assert "size mismatch" in str(error)
    print("refused", end=" ")
"""


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
    out = helpers.run_ranks(VALUES_SCRIPT, 2, *folders, tmp_path / "llama", tmp_path / "modern")
    assert out.count("ok") == 4
    assert out.count("refused") == 2  # on both ranks, though one alone reads the weights


TRAIN_SCRIPT = """
import contextlib, json, sys
from bge_ds import finetune, pretrain
from bge_ds.config.arguments import FinetuneArguments, PretrainArguments
from bge_ds.deepspeed_engine import engine as engines

for flags in json.loads(sys.argv[1]):
    sharded = flags.pop("sharded")
    own = engines.sharded_loading
    if not sharded:
        engines.sharded_loading = lambda *args, **kwargs: contextlib.nullcontext()
    built = engines.build

    def build(model, *args, **kwargs):
        added = ("lora_", "decoder.")
        assert all(hasattr(p, "ds_id") == sharded for n, p in model.named_parameters() if not any(a in n for a in added))
        return built(model, *args, **kwargs)

    engines.build = build
    command, kind = (finetune, FinetuneArguments) if "train_group_size" in flags else (pretrain, PretrainArguments)
    command.train(kind.build(**flags, use_cpu=True))
    engines.sharded_loading, engines.build = own, built
"""


def test_training_is_that_of_whole_loading(tmp_path):
    """Fine-tuning (all weights, or adapters) and pre-training: losses, gradient norms and saved weights, to the last bit."""
    helpers.make_model("bert", tmp_path / "model", dropout=0.1)
    helpers.make_tokenizer("wordpiece", tmp_path / "model")
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
        "pretrain": {"train_data": str(tmp_path / "texts.jsonl"), "max_seq_length": 40, "bf16": True},
    }
    runs = [
        {**common, **more, "sharded": sharded, "output_dir": str(tmp_path / f"{case}_{sharded}")}
        for case, more in cases.items()
        for sharded in (False, True)
    ]
    helpers.run_ranks(TRAIN_SCRIPT, 2, json.dumps(runs))
    for case in cases:
        whole, sharded = (tmp_path / f"{case}_{s}" for s in (False, True))
        logs = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, sharded)]
        picked = [[(r["step"], r["loss"], r["grad_norm"]) for r in log] for log in logs]
        assert len(picked[0]) == 3 and picked[0] == picked[1], case
        file = "encoder_model/model.safetensors" if case == "pretrain" else "model.safetensors"
        a, b = load_file(whole / file), load_file(sharded / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a if "pooler" not in k), case  # the file has none: it starts random


MEMORY_SCRIPT = """
import contextlib, re, sys, threading, time
import torch
from bge_ds.distributed import collectives
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.modeling.encoder import Encoder

def own_bytes():
    # Anonymous memory: pages of the weights' file, which the system may take back at any time, do not count.
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def peak_of(folder, context):
    before, highest, done = own_bytes(), [0], threading.Event()

    def watch():
        while not done.is_set():
            highest[0] = max(highest[0], own_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    with context:
        model = Encoder.load(folder)
    model.requires_grad_(False)
    model.backbone.embeddings.LayerNorm.requires_grad_(True)  # hardly any optimizer state: what is left is the weights
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    groups = engines.parameter_groups(model, 0.0)
    engine = engines.build(model, config, groups, adam={"lr": 1e-3}, optim="adamw_torch", schedule=None)
    done.set()
    thread.join()
    full = 4 * engines.count_elements(model)
    return (highest[0] - before) / full

engines.start(use_cpu=True)
peak_of(sys.argv[1], engines.sharded_loading("zero3"))  # what is imported and allocated once does not count either
for kind, context in (("sharded", engines.sharded_loading("zero3")), ("whole", contextlib.nullcontext())):
    print(kind, f"{peak_of(sys.argv[2], context):.3f}", flush=True)
"""


def test_no_rank_holds_a_full_copy(tmp_path, monkeypatch):
    """From loading to the built engine, a rank's memory stays near its half of the weights; loaded whole, it does not."""
    # What is freed goes back to the system at once: the C library's stock of free memory would be counted as held.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    torch.manual_seed(0)
    shape = dict(hidden_size=512, num_attention_heads=8, intermediate_size=2048, vocab_size=500)
    BertModel(BertConfig(**shape, num_hidden_layers=1)).save_pretrained(tmp_path / "small")
    BertModel(BertConfig(**shape, num_hidden_layers=16)).save_pretrained(tmp_path / "large")  # 195 MiB
    lines = helpers.run_ranks(MEMORY_SCRIPT, 2, tmp_path / "small", tmp_path / "large", fresh=True).splitlines()
    shares = {kind: [float(x.split()[1]) for x in lines if x.startswith(kind)] for kind in ("sharded", "whole")}
    print(shares)
    assert all(len(ranks) == 2 for ranks in shares.values())
    assert max(shares["sharded"]) < 0.65
    assert max(shares["whole"]) > 1.2
