"""The gradient of N ranks is that of one process with the whole batch, at every ZeRO stage.

The ranks run the package's own path (engine, padding-free forward, gather, loss); the reference is one process with the
stock padded model and the loss written out query by query.
"""

from __future__ import annotations

import json

import helpers
import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM

from bge_ds import preprocess
from bge_ds.data import batches, records, shards
from bge_ds.data.order import Order
from bge_ds.modeling.encoder import Encoder, load_backbone, pool, run_backbone
from bge_ds.modeling.retromae import RetroMAE, RetroMAESettings

GROUPS, GROUP_SIZE, TEMPERATURE = 8, 3, 0.2
CASES = {
    "cross_device": {"negatives_cross_device": True},
    "own_rank": {"negatives_cross_device": False},
    "own_group": {"use_inbatch_neg": False},
    "unmasked": {"negatives_cross_device": True, "mask_false_negatives": False},
}

RANK_SCRIPT = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForMaskedLM
from bge_ds import finetune, pretrain, run
from bge_ds.arguments import FinetuneArguments, PretrainArguments
from bge_ds.data import batches, shards
from bge_ds.data.order import Order, rank_slice
from bge_ds.distributed import collectives, engine as engines
from bge_ds.modeling.encoder import Encoder, load_backbone
from bge_ds.modeling.retromae import RetroMAE, RetroMAESettings
import deepspeed

model_path, data_path, texts_path, out_path, stage, cases = sys.argv[1:7]
cases = json.loads(cases)
engines.start(use_cpu=True)
rank, world = collectives.rank(), collectives.world_size()

def gradients(engine):
    out = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            full = deepspeed.utils.safe_get_full_grad(parameter)
            out[name] = (parameter.grad if full is None else full).float().numpy().copy()
    return out

def engine_of(args, model, order):
    return run.build_engine(args, model, run.StepPlan.make(args, order))[0]

for case, flags in cases.items():
    accumulation = flags.pop("gradient_accumulation_steps", 1)
    common = dict(output_dir="unused", deepspeed="zero" + stage, max_grad_norm=0.0, max_steps=2, use_cpu=True,
                  per_device_train_batch_size=8 // world // accumulation, gradient_accumulation_steps=accumulation)
    if "pretrain" in case:
        args = PretrainArguments.build(**common, train_data=texts_path, **flags)
        model = RetroMAE(load_backbone(AutoModelForMaskedLM, model_path), RetroMAESettings(mask_id=4))
        generator = torch.Generator().manual_seed(3)
        for p in model.decoder.parameters():
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator) + (p.dim() == 1))
        data, collate, options = shards.open_folder(texts_path), batches.collate_texts, dict(max_seq_length=40)
    else:
        args = FinetuneArguments.build(**common, train_data=data_path, model_name_or_path=model_path, train_group_size=3,
                                       temperature=0.2, sentence_pooling_method="mean", **flags)
        model = Encoder.load(model_path, "mean")
        data, collate, options = shards.open_folder(data_path), batches.collate_groups, dict(
            group_size=3, query_max_len=16, passage_max_len=40)
    order = run.make_order(args, data.manifest)
    engine = engine_of(args, model, order)
    epochs, rows = order.step_rows(0)
    parts = [collate(data, epochs[p], rows[p], seed=order.seed, **options) for p in rank_slice(8, accumulation, rank, world)]
    targets = pretrain.count_targets(model, parts, True) if "pretrain" in case else None
    for micro, batch in enumerate(parts):
        if "pretrain" in case:
            engine.backward((engine(batch)[:2] / targets[micro]).sum(), scale_wrt_gas=False)
        else:
            engine.backward(finetune.contrastive_loss(engine(batch.texts), batch, args, True)[0])
        if micro < accumulation - 1:
            engine.step()
    found = gradients(engine)
    if rank == 0:
        np.savez(f"{out_path}/{case}.npz", **found)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_bert_path):
    """Folders of shards: 8 groups, among them two that share a passage (a false negative), and 8 texts of all lengths."""
    base = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = " ".join(helpers.SENTENCES).split()

    def text(n):
        return " ".join(rng.choice(words, n))

    groups = [{"query": text(4), "pos": [text(int(rng.integers(3, 25)))], "neg": [text(9), text(2)]} for _ in range(GROUPS)]
    groups[3]["neg"][0] = groups[6]["pos"][0]
    groups[5]["pos"] = groups[6]["pos"] + [text(7)]
    (base / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    (base / "texts.jsonl").write_text("".join(json.dumps({"text": text(n)}) + "\n" for n in (1, 3, 9, 30, 12, 9, 2, 20)))
    tokenizer = records.load_tokenizer(str(tiny_bert_path))
    quiet = {"cache_dir": str(base / "cache"), "say": lambda _: None}
    finetune = preprocess.prepare(
        "finetune", str(base / "groups.jsonl"), tokenizer, query_max_len=16, passage_max_len=40, **quiet
    )
    pretrain = preprocess.prepare("pretrain", str(base / "texts.jsonl"), tokenizer, max_seq_length=40, **quiet)
    return finetune, pretrain


def contrastive_reference(model_path, folder, case: str, flags: dict, ranks: int) -> dict[str, np.ndarray]:
    """Gradients of the mean over all queries, each against what the case lets it see, with the stock padded model."""
    model = Encoder.load(str(model_path), "mean", attention="sdpa")
    model.backbone.double()
    opened = shards.open_folder(folder)
    order = Order(42, tuple(tuple(s["rows"]) for s in opened.manifest["sources"]), GROUPS)
    epochs, rows = order.step_rows(0)
    batch = batches.collate_groups(opened, epochs, rows, seed=42, group_size=GROUP_SIZE, query_max_len=16, passage_max_len=40)
    vectors = torch.nn.functional.normalize(pool(run_backbone(model.backbone, batch.texts), batch.texts, "mean"), dim=-1)
    vectors = vectors[batch.texts.place_N]
    queries, passages = vectors[:GROUPS], vectors[GROUPS:]
    losses, hidden = [], 0
    for b in range(GROUPS):
        share = GROUPS // ranks
        first = b // share * share if case == "own_rank" else b if case == "own_group" else 0
        last = first + share if case == "own_rank" else b + 1 if case == "own_group" else GROUPS
        positives = set(batch.known_K[batch.known_query_K == b].tolist())
        columns = [
            p for p in range(first * GROUP_SIZE, last * GROUP_SIZE)
            if p == b * GROUP_SIZE or flags.get("mask_false_negatives") is False or int(batch.hashes_P[p]) not in positives
        ]  # fmt: skip
        hidden += (last - first) * GROUP_SIZE - len(columns)
        scores = passages[columns] @ queries[b] / TEMPERATURE
        losses.append(torch.logsumexp(scores, 0) - scores[columns.index(b * GROUP_SIZE)])
    # The case must hold a false negative, or hiding them would be tested by nothing.
    assert hidden > 0 if case == "cross_device" else hidden == 0 if case == "unmasked" else True
    torch.stack(losses).mean().backward()
    return {k: p.grad.numpy() for k, p in model.named_parameters() if p.requires_grad}


def pretrain_reference(model_path, folder) -> dict[str, np.ndarray]:
    """Gradients of both means over all tokens, one process, padded encoder."""
    model = RetroMAE(load_backbone(AutoModelForMaskedLM, str(model_path), attention="sdpa"), RetroMAESettings(mask_id=4))
    generator = torch.Generator().manual_seed(3)
    for p in model.decoder.parameters():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator) + (p.dim() == 1))
    opened = shards.open_folder(folder)
    epochs, rows = Order(42, tuple(tuple(s["rows"]) for s in opened.manifest["sources"]), 8).step_rows(0)
    batch = batches.collate_texts(opened, epochs, rows, seed=42, max_seq_length=40)
    sums = model(batch)
    masked = model.masked(batch).sum()
    predicted = batch.texts.tokens - 2 * 8
    assert masked > 5
    (sums[0] / masked + sums[1] / predicted).backward()
    return {k: p.grad.numpy() for k, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_give_one_process_gradients(tmp_path, tiny_bert_path, data, stage):
    """Every parameter's gradient differs by less than 1e-5, relative, from that of an fp64 or single fp32 process."""
    cases = {**CASES, "pretrain": {}, "pretrain_accumulated": {"gradient_accumulation_steps": 2}}
    helpers.run_ranks(RANK_SCRIPT, 2, tiny_bert_path, *data, tmp_path, stage, json.dumps(cases))
    worst = 0.0
    for case, flags in cases.items():
        if "pretrain" in case:
            expected = pretrain_reference(tiny_bert_path, data[1])
        else:
            expected = contrastive_reference(tiny_bert_path, data[0], case, flags, ranks=2)
        found = np.load(tmp_path / f"{case}.npz")
        assert set(found.files) == set(expected), case
        largest = max(np.abs(g).max() for g in expected.values())
        assert largest > 1e-3, case
        for name, gradient in expected.items():
            # Two kinds of gradients are sums that cancel: what shifts all keys changes no softmax, and what shifts all
            # vectors alike changes hardly any score. Their rounding is that of their terms, as large as other gradients.
            cancels = name.endswith("key.bias") or name.endswith("layer.1.output.LayerNorm.bias")
            scale = largest if cancels else np.abs(gradient).max()
            difference = np.abs(found[name] - gradient).max() / scale
            assert difference < 1e-5, f"{case}: {name} differs by {difference:.1e}"
            worst = max(worst, difference)
    print(f"largest relative difference at stage {stage}: {worst:.1e}")
