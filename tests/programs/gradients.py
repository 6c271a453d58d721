"""Ranks that write the gradients of one step through the package's own path, for each case.

Arguments: model, shards of groups, of groups of which some have no negatives, of texts; folder to write into, ZeRO stage, JSON
of {case: flags}.
"""

import json

import deepspeed
import numpy as np
import torch
from transformers import AutoModelForMaskedLM

from bge_ds.config.arguments import FinetuneArguments, PretrainArguments
from bge_ds.data import collate
from bge_ds.data.shards import shard_reader
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.losses.contrastive import Temperature
from bge_ds.modeling.encoder import Encoder, load_backbone
from bge_ds.modeling.retromae import RetroMAE, RetroMAESettings
from bge_ds.objectives import contrastive, retromae
from bge_ds.training import data_order, setup
from bge_ds.training.step_plan import StepPlan


def build_pretrain(args, model_path: str):
    model = RetroMAE(load_backbone(AutoModelForMaskedLM, model_path), RetroMAESettings(4, objective=args.objective))
    generator = torch.Generator().manual_seed(3)
    for p in model.decoder.parameters() if model.decoder else ():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator) + (p.dim() == 1))
    return model


def build_finetune(args, model_path: str):
    model = Encoder.load(model_path, "mean")
    contrastive.freeze_and_checkpoint(model.backbone, args)
    if args.learnable_temperature:
        model.temperature = Temperature(0.2)
    return model


def backward_pretrain(engine, args, parts: list, accumulation: int) -> None:
    ((_, counts),) = collectives.exchange_ahead([parts], retromae.count_targets, engine.device)
    targets = retromae.divisors(parts, counts)
    for micro, batch in enumerate(parts):
        loss = retromae.weighted(engine(batch), args.bow_loss_weight, targets[micro])
        engine.backward(loss, scale_wrt_gas=False)
        if micro < accumulation - 1:
            engine.step()


def backward_finetune(engine, args, parts: list, accumulation: int, whole: bool) -> None:
    """whole: every group has its negatives."""
    for micro, batch in enumerate(parts):
        ((_, sizes),) = collectives.exchange_ahead(
            [[batch]], lambda micros: contrastive.sizes_of(micros, args, whole), engine.device
        )
        shares = [collate.Share(*numbers) for numbers in sizes if numbers]
        contrastive.backward(engine, batch, args, contrastive.objective_of(args), lambda piece: None, shares or None)
        if micro < accumulation - 1:
            engine.step()


def gradients(engine) -> dict[str, np.ndarray]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            full = deepspeed.utils.safe_get_full_grad(parameter)
            found[name] = (parameter.grad if full is None else full).float().numpy().copy()
    return found


def gradients_of(case: str, flags: dict, stage: str, model_path: str, data_path: str) -> dict[str, np.ndarray]:
    rank, world = collectives.rank(), collectives.world_size()
    accumulation = flags.pop("gradient_accumulation_steps", 1)
    common = dict(
        output_dir="unused", train_data=data_path, deepspeed="zero" + stage, max_grad_norm=0.0, max_steps=2, use_cpu=True,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    if "per_device_train_tokens" not in flags:
        common["per_device_train_batch_size"] = 12 // world // accumulation
    if "pretrain" in case:
        args = PretrainArguments.build(**common, max_seq_length=40, **flags)
        model = build_pretrain(args, model_path)
        collate_rows, options = collate.collate_texts, dict(max_seq_length=40, encoder_share=0.3)
    else:
        args = FinetuneArguments.build(
            **common, model_name_or_path=model_path, train_group_size=3, temperature=0.2, sentence_pooling_method="mean",
            **flags,
        )  # fmt: skip
        model = build_finetune(args, model_path)
        collate_rows, options = collate.collate_groups, dict(
            group_size=3, query_max_len=16, passage_max_len=40, distill=args.knowledge_distillation,
            max_texts=args.sub_batch_size, max_tokens=args.sub_batch_tokens,
            own_only_spans=((0, 5),) if case == "own_only_set" else (),
        )  # fmt: skip
    data = shard_reader.open_folder(data_path)
    order = data_order.make_order(args, data)
    engine = setup.build_engine(args, model, StepPlan.make(args, order))[0]
    rows = order.micro_batches(0, accumulation, rank, world)
    parts = [collate_rows(data, *some, seed=order.seed, **options) for some in rows]
    if "pretrain" in case:
        backward_pretrain(engine, args, parts, accumulation)
    else:
        backward_finetune(engine, args, parts, accumulation, not case.startswith("bare"))
    return gradients(engine)


def main(model: str, whole: str, bare: str, texts: str, out: str, stage: str, cases: str) -> None:
    engines.start(use_cpu=True)
    for case, flags in json.loads(cases).items():
        data = texts if "pretrain" in case else bare if case.startswith("bare") else whole
        found = gradients_of(case, flags, stage, model, data)
        if collectives.rank() == 0:
            np.savez(f"{out}/{case}.npz", **found)
