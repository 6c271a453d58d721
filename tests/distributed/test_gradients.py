"""The gradient of N ranks, whole or in pieces, is that of one process with the whole batch, at every ZeRO stage.

The ranks run the package's own path (engine, padding-free forward, pieces, gather, loss); the reference is one process with the
stock padded model and the loss written out query by query.
"""

from __future__ import annotations

import json

import helpers
import numpy as np
import pytest
import torch
from contrastive_reference import reference_loss
from transformers import AutoModelForMaskedLM

from bge_ds.config.arguments import FinetuneArguments
from bge_ds.data import collate
from bge_ds.data.preprocess import prepare, validate
from bge_ds.data.sampling.sampler import EpochSampler
from bge_ds.data.sampling.token_batching import TokenBatchSampler
from bge_ds.data.shards import shard_reader
from bge_ds.modeling.encoder import Encoder, load_backbone, pool, run_backbone
from bge_ds.modeling.retromae import RetroMAE, RetroMAESettings
from bge_ds.objectives import contrastive

GROUPS, GROUP_SIZE, TEMPERATURE = 12, 3, 0.2
BINS = 6  # of a step, where micro batches are cut by tokens
CROSS = {"negatives_cross_device": True}
CASES = {
    "cross_device": CROSS,
    "own_rank": {"negatives_cross_device": False},
    "own_group": {"use_inbatch_neg": False},
    "unmasked": {**CROSS, "mask_false_negatives": False},
    "pieces_of_1": {**CROSS, "sub_batch_size": 1},
    "pieces_of_3": {**CROSS, "sub_batch_size": 3, "gradient_checkpointing": True},
    "pieces_of_16": {**CROSS, "sub_batch_size": 16},
    # Lengths differ, so the ranks would cut unequal numbers of pieces.
    "pieces_by_tokens": {**CROSS, "sub_batch_tokens": 40},
    "accumulated": {"use_inbatch_neg": False, "gradient_accumulation_steps": 2},
    "bidirectional": {**CROSS, "bidirectional": True, "sub_batch_size": 5},
    "margin": {**CROSS, "false_negative_margin": -0.02, "sub_batch_size": 5},
    "kl_div": {**CROSS, "knowledge_distillation": True, "sub_batch_size": 5},
    "m3": {**CROSS, "knowledge_distillation": True, "kd_loss_type": "m3_kd_loss", "sub_batch_size": 5},
    "margin_mse": {**CROSS, "knowledge_distillation": True, "kd_loss_type": "margin_mse"},
    "mrl": {**CROSS, "use_mrl": True, "mrl_dims": [8, 32], "sub_batch_size": 5},
    "learnable": {**CROSS, "learnable_temperature": True, "sub_batch_size": 5},
    "own_only_set": {**CROSS, "bidirectional": True, "sub_batch_size": 5},
    # Some groups have no negatives: the ranks bring different numbers of passages, and one runs out of texts to cut.
    "bare_groups": {**CROSS, "bidirectional": True, "sub_batch_size": 1},
    # The same groups, and some without a teacher's scores: a rank's share of distilled ones differs from another's.
    "bare_kl_div": {**CROSS, "knowledge_distillation": True, "sub_batch_size": 5},
    "bare_m3": {**CROSS, "knowledge_distillation": True, "kd_loss_type": "m3_kd_loss", "sub_batch_tokens": 40},
    "bare_margin_mse": {**CROSS, "knowledge_distillation": True, "kd_loss_type": "margin_mse"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_bert_path):
    """Folders of shards: 12 groups, among them two that share a passage (a false negative), and 12 texts of all lengths."""
    base = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = " ".join(helpers.SENTENCES).split()

    def text(n):
        return " ".join(rng.choice(words, n))

    groups = [{"query": text(4), "pos": [text(int(rng.integers(3, 25)))], "neg": [text(9), text(2)]} for _ in range(GROUPS)]
    groups[3]["neg"][0] = groups[6]["pos"][0]
    groups[5]["pos"] = groups[6]["pos"] + [text(7)]
    for group in groups:
        group |= {f"{side}_scores": rng.normal(size=len(group[side])).round(3).tolist() for side in ("pos", "neg")}
    bare = [g | ({"neg": [], "neg_scores": []} if i % 5 in (1, 2) else {}) for i, g in enumerate(groups)]
    bare = [g | ({"pos_scores": None, "neg_scores": None} if i % 4 in (1, 3) else {}) for i, g in enumerate(bare)]
    for name, lines in (("groups", groups), ("bare", bare)):
        (base / f"{name}.jsonl").write_text("".join(json.dumps(g) + "\n" for g in lines))
    (base / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text(n)}) + "\n" for n in (1, 3, 9, 30, 12, 9, 2, 20, 5, 8, 1, 17))
    )
    tokenizer = validate.load_tokenizer(str(tiny_bert_path))
    quiet = {"cache_dir": str(base / "cache"), "say": lambda _: None}
    groups = [
        prepare.prepare("finetune", str(base / f"{name}.jsonl"), tokenizer, query_max_len=16, passage_max_len=40, **quiet)
        for name in ("groups", "bare")
    ]
    pretrain = prepare.prepare("pretrain", str(base / "texts.jsonl"), tokenizer, max_seq_length=40, **quiet)
    return *groups, pretrain


def contrastive_reference(model_path, folder, case: str, flags: dict, ranks: int) -> dict[str, np.ndarray]:
    """Gradients of the mean over all queries, each against what the case lets it see, with the stock padded model in fp64."""
    flags = {k: v for k, v in flags.items() if k != "gradient_accumulation_steps"}
    args = FinetuneArguments.build(output_dir="unused", train_data="unused", model_name_or_path="unused", **flags)
    model = Encoder.load(str(model_path), "mean", attention="sdpa")
    model.backbone.double()
    opened = shard_reader.open_folder(folder)
    order = EpochSampler(42, tuple(s.rows for s in opened.manifest.sources), GROUPS)
    epochs, rows = order.step_rows(0)
    batch = collate.collate_groups(
        opened,
        epochs,
        rows,
        seed=42,
        group_size=GROUP_SIZE,
        query_max_len=16,
        passage_max_len=40,
        distill=args.knowledge_distillation,
    )
    vectors = torch.nn.functional.normalize(pool(run_backbone(model.backbone, batch.texts), batch.texts, "mean"), dim=-1)
    vectors = vectors[batch.texts.place_N]
    log_scale = torch.tensor([-np.log(TEMPERATURE)], dtype=torch.float64, requires_grad=True)
    own = [[c for c in row if c >= 0] for row in batch.own_BG.tolist()]
    known = [set(row) for row in batch.known_BK.tolist()]
    share = GROUPS // ranks
    sees, own_only, teacher = None, (), None
    if args.knowledge_distillation:
        without = set() if batch.taught_B is None else set((~batch.taught_B).nonzero()[:, 0].tolist())
        assert bool(without) == case.startswith("bare")
        teacher = [None if b in without else row for b, row in enumerate(batch.teacher_BG)]
    if case == "own_rank":
        sees = [set(range(b // share * share * GROUP_SIZE, (b // share + 1) * share * GROUP_SIZE)) for b in range(GROUPS)]
    if case == "own_only_set":
        own_only = {b for b in range(GROUPS) if rows[b] < 5}
    loss, _, by_content, by_margin = reference_loss(
        vectors[:GROUPS], vectors[GROUPS:], own, batch.hashes_P.tolist(), known, log_scale.exp()[0],
        contrastive.objective_of(args), teacher=teacher, sees=sees, own_only=own_only,
    )  # fmt: skip
    # The case must hold a false negative, or hiding them would be tested by nothing.
    assert by_content > 0 if case == "cross_device" else by_content == 0 if case == "unmasked" else True
    assert by_margin > 0 if case == "margin" else by_margin == 0
    loss.backward()
    gradients = {k: p.grad.numpy() for k, p in model.named_parameters() if p.requires_grad}
    return gradients | ({"temperature.log_scale": log_scale.grad.numpy()} if args.learnable_temperature else {})


def pretrain_reference(model_path, folder, tokens=None, objective="retromae", bow_loss_weight=0.0) -> dict[str, np.ndarray]:
    """Gradients of the means over all tokens and texts, one process, padded encoder; all texts, or BINS bins of `tokens`."""
    backbone = load_backbone(AutoModelForMaskedLM, str(model_path), attention="sdpa")
    model = RetroMAE(backbone, RetroMAESettings(4, objective=objective))
    generator = torch.Generator().manual_seed(3)
    for p in model.decoder.parameters() if model.decoder else ():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator) + (p.dim() == 1))
    opened = shard_reader.open_folder(folder)
    order = EpochSampler(42, tuple(s.rows for s in opened.manifest.sources), 12)
    epochs, rows = order.step_rows(0)
    if tokens:
        bins = TokenBatchSampler(order, opened.lengths, 40, tokens, BINS).micro_batches(0, BINS, 0, 1)
        assert len({len(rows) for _, rows in bins}) > 1  # micro batches of equal counts would hide a mean of means
        epochs, rows = (np.concatenate(parts) for parts in zip(*bins, strict=True))
    batch = collate.collate_texts(opened, epochs, rows, seed=42, max_seq_length=40, encoder_share=0.3)
    sums = model(batch)
    masked = len(batch.masked_M)
    predicted = batch.texts.tokens - 2 * len(rows)
    assert masked > 5
    (sums[0] / masked + sums[1] / predicted + bow_loss_weight * sums[2] / len(rows)).backward()
    return {k: p.grad.numpy() for k, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("stage", "ranks"), [*(pytest.param(stage, 2, marks=pytest.mark.core) for stage in range(4)), (1, 1), (2, 3), (3, 3)]
)
def test_ranks_and_pieces_give_one_process_gradients(tmp_path, tiny_bert_path, data, stage, ranks):
    """Every parameter's gradient differs by less than 1e-5, relative, from that of an fp64 or single fp32 process."""
    cases = {**CASES, "pretrain": {}, "pretrain_accumulated": {"gradient_accumulation_steps": 2}}
    cases["pretrain_dupmae"] = {"objective": "dupmae", "bow_loss_weight": 0.5, "gradient_accumulation_steps": 2}
    cases["pretrain_mlm"] = {"objective": "mlm"}
    cases["pretrain_tokens"] = {"per_device_train_tokens": 60, "gradient_accumulation_steps": BINS // ranks}
    helpers.run_ranks("gradients", ranks, tiny_bert_path, *data, tmp_path, stage, json.dumps(cases))
    worst = 0.0
    for case, flags in cases.items():
        if "pretrain" in case:
            options = {k: flags[k] for k in ("objective", "bow_loss_weight") if k in flags}
            expected = pretrain_reference(tiny_bert_path, data[2], flags.get("per_device_train_tokens"), **options)
        else:
            expected = contrastive_reference(tiny_bert_path, data[case.startswith("bare")], case, flags, ranks)
        found = np.load(tmp_path / f"{case}.npz")
        assert set(found.files) == set(expected), case
        largest = max(np.abs(g).max() for g in expected.values())
        assert largest > 1e-3, case
        for name, gradient in expected.items():
            # Two kinds of gradients are sums that cancel: what shifts all keys changes no softmax, and what shifts all
            # vectors alike changes hardly any score. Their rounding is that of their terms, as large as other gradients.
            cancels = name.endswith("key.bias") or name.endswith("layer.1.output.LayerNorm.bias")
            scale = largest if cancels else np.abs(gradient).max()
            difference = np.abs(found[name].reshape(gradient.shape) - gradient).max() / scale
            assert difference < 1e-5, f"{case}: {name} differs by {difference:.1e}"
            worst = max(worst, difference)
    print(f"largest relative difference at stage {stage}, {ranks} ranks: {worst:.1e}")
