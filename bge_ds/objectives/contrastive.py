"""Contrastive fine-tuning: queries against their own and all other passages of a batch.

The loss gathers the passages of all ranks; GradCache takes a batch in pieces where asked.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bge_ds.checkpoint import filesystem
from bge_ds.config.arguments import FinetuneArguments
from bge_ds.config.run_config import fill_from_shards
from bge_ds.data import collate
from bge_ds.data.beir import RetrievalSet
from bge_ds.data.collate import Share
from bge_ds.data.preprocess import validate
from bge_ds.data.shards import shard_reader
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.evaluation.evaluators import SearchEvaluator
from bge_ds.kernels import packed
from bge_ds.losses import contrastive, grad_cache
from bge_ds.losses.gather import contrastive_loss
from bge_ds.modeling import export, lora, model_card
from bge_ds.modeling.encoder import Encoder, check_lengths, check_vocabulary, load_config
from bge_ds.modeling.flops import backbone_flops
from bge_ds.modeling.vocabulary import embed_new_tokens
from bge_ds.objectives import card, diagnosis, group_data
from bge_ds.objectives.shards import open_shards
from bge_ds.training.objective import Objective, Scores, Values


class ContrastiveObjective(Objective):
    title = "fine-tuning"
    resume_names = (
        "train_group_size", "query_max_len", "passage_max_len", "negatives_cross_device", "use_inbatch_neg",
        "temperature", "normalize_embeddings", "sentence_pooling_method", "mask_false_negatives", "sub_batch_size",
        "sub_batch_tokens", "bidirectional", "false_negative_margin", "false_negative_margin_type", "learnable_temperature",
        "knowledge_distillation", "kd_loss_type", "mrl_dims", "bidirectional_attention", "use_lora", "lora_rank",
        "lora_alpha", "lora_dropout", "target_modules", "same_dataset_within_batch",
        "max_example_num_per_dataset", "small_threshold", "drop_threshold",
    )  # fmt: skip

    def __init__(self, args: FinetuneArguments):
        self.tokenizer = validate.load_tokenizer(args.tokenizer_name or args.model_name_or_path, args.cache_dir)
        self.model_config = load_config(args.config_name or args.model_name_or_path, cache_dir=args.cache_dir)
        check_vocabulary(self.model_config, self.tokenizer)
        validate.add_special_tokens(self.tokenizer, args.additional_special_tokens)
        self.data: shard_reader.FinetuneShards = open_shards(
            "finetune", args, self.tokenizer, query_max_len=args.query_max_len, passage_max_len=args.passage_max_len,
            query_instruction=args.query_instruction_for_retrieval,
            passage_instruction=args.passage_instruction_for_retrieval,
            query_instruction_format=args.query_instruction_format, passages_by_type=args.heeds_types,
            cache_dir=args.cache_path,
        )  # fmt: skip
        self.args: FinetuneArguments = fill_from_shards(args, self.data.manifest, _FROM_SHARDS)
        self.by_type = args.heeds_types and bool(self.data.distinct("type").intersection(collate.SHORT_TYPES))
        # Every group has all its passages.
        self.uniform = self.data.manifest.counts["groups_without_negatives"] == 0 and not self.by_type
        self.settings = objective_of(args)
        check_lengths(self.model_config, query_max_len=self.args.query_max_len, passage_max_len=self.args.passage_max_len)

    def build_model(self, device: torch.device) -> nn.Module:
        args = self.args
        with engines.sharded_loading(args.deepspeed, bf16=args.bf16, fp16=args.fp16):
            model = Encoder.load(
                args.model_name_or_path, args.sentence_pooling_method, args.normalize_embeddings,
                config=self.model_config, cache_dir=args.cache_dir, bidirectional=args.bidirectional_attention,
            )  # fmt: skip
            if args.additional_special_tokens:
                embed_new_tokens(model.backbone, len(self.tokenizer), args.seed)
        if args.use_lora:
            lora.add_adapters(
                model.backbone, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout,
                target_modules=args.target_modules, name_or_path=args.model_name_or_path,
            )  # fmt: skip
        if args.learnable_temperature:
            model.temperature = contrastive.Temperature(args.temperature)
        freeze_and_checkpoint(model.backbone, args)
        return model

    def backbone(self, model: nn.Module) -> nn.Module:
        return model.backbone

    def check(self) -> None:
        args = self.args
        group_data.check_comparable(args, self.data)
        if args.knowledge_distillation:
            group_data.check_teacher(args, self.data)
        width = self.model_config.hidden_size
        if args.mrl_dims and args.mrl_dims[-1] > width:
            raise ValueError(f"--mrl_dims {args.mrl_dims[-1]} is more than the {width} features of the model's vectors")

    def facts(self, runs: str) -> list[tuple[str, str]]:
        args = self.args
        from_all = " from all ranks" if args.negatives_cross_device and collectives.world_size() > 1 else ""
        return [
            ("model", f"{args.model_name_or_path}, runs {runs}"),
            ("data", f"{len(self.data)} groups, {self.data.num_passages} passages"),
            ("lengths", f"queries to {args.query_max_len}, passages to {args.passage_max_len} tokens"),
            ("negatives", f"{'' if self.uniform else 'up to '}{self.negatives()} a query{from_all}"),
        ]

    def negatives(self) -> int:
        """How many passages a query is compared with beside its positive, at most."""
        ranks = collectives.world_size() if self.args.negatives_cross_device else 1
        passages = self.args.per_device_train_batch_size * self.args.train_group_size * ranks
        return (passages if self.args.use_inbatch_neg else self.args.train_group_size) - 1

    def warnings(self, eval_sets: Mapping[str, RetrievalSet], epochs: float) -> list[str]:
        found = diagnosis.of_finetuning(self.args, self.data, self.tokenizer, self.negatives(), eval_sets)
        found += self.args.without_effect()
        if len(prompts := group_data.prompts_of(self.args, self.data)) > 2:
            found.append(f"sets have different instructions, saved as prompts {', '.join(prompts)}; evaluations use none")
        if self.args.gradient_accumulation_steps > 1 and self.args.use_inbatch_neg:
            found.append("accumulation adds no negatives; a larger batch on each rank does")
        return found

    def collate(self, seed: int) -> tuple[Callable, dict]:
        args = self.args
        return collate.collate_groups, dict(
            seed=seed, group_size=args.train_group_size, query_max_len=args.query_max_len,
            passage_max_len=args.passage_max_len, own_only_spans=group_data.own_only_spans(self.data), by_type=self.by_type,
            distill=args.knowledge_distillation, max_texts=args.sub_batch_size, max_tokens=args.sub_batch_tokens,
        )  # fmt: skip

    def counts_to_exchange(self, micro_batches: list) -> list[int]:
        return sizes_of(micro_batches, self.args, self.uniform)

    def shares(self, micro_batches: list, counts_R: list[list[int]]) -> list[list[Share] | None]:
        """Of every micro batch, the shares of all ranks; None where they are all this rank's own."""
        width = len(Share._fields)
        return [
            [Share(*counts[k * width : (k + 1) * width]) for counts in counts_R if counts] or None
            for k in range(len(micro_batches))
        ]

    def backward(self, engine, batch, share: list[Share] | None, seed: Callable[[int], None]) -> Values:
        parts = backward(engine, batch, self.args, self.settings, seed, share)
        return {
            "loss": parts.loss, "negatives": parts.negatives, "hidden_by_content": parts.by_content,
            "hidden_by_margin": parts.by_margin, "scale": parts.scale, "queries": batch.queries,
            "cosine": parts.cosine,
        }  # fmt: skip

    def flops(self, model: nn.Module, batch) -> float:
        return backbone_flops(model.backbone, batch.texts.runs)

    def record(self, sums: dict[str, float], model: nn.Module, batch) -> dict[str, float]:
        return {
            "loss": sums["loss"] / sums["micro_batches"],
            "negatives": sums["negatives"] / sums["queries"],
            "false_negatives_hidden": sums["hidden_by_content"] / sums["queries"],
            "margin_negatives_hidden": sums["hidden_by_margin"] / sums["queries"],
            "temperature": sums["micro_batches"] / sums["scale"],
            "passage_cosine": sums["cosine"] / sums["micro_batches"],
        }

    def chance(self, record: dict[str, float]) -> float | None:
        """The loss of guessing: the logarithm of the passages that a query is compared with, in plain contrastive training."""
        return None if self.args.knowledge_distillation or self.args.bidirectional else math.log1p(record["negatives"])

    def evaluator(self, sets: dict[str, RetrievalSet], device: torch.device) -> SearchEvaluator:
        args = self.args
        return SearchEvaluator(
            sets, self.tokenizer, device, query_max_len=args.query_max_len, passage_max_len=args.passage_max_len,
            query_prompt=args.query_instruction_for_retrieval or "",
            passage_prompt=args.passage_instruction_for_retrieval or "", batch_size=args.per_device_eval_batch_size,
        )  # fmt: skip

    def save(self, engine, folder: Path, scores: Scores) -> float:
        args, encoder = self.args, engine.module
        weights = engines.full_parameters(engine, lambda name: name.startswith("backbone."))
        suffix = len(self.data.manifest.tokenizer.suffix_ids)
        ids = self.data.queries(np.arange(1)).cut(args.query_max_len, suffix).split()
        ids += self.data.passages(np.arange(min(8, self.data.num_passages))).cut(args.passage_max_len, suffix).split()
        live_ND = encoder.encode_ids(ids)

        def write() -> float:
            own = {name.removeprefix("backbone."): weight for name, weight in weights.items()}
            pooling, normalize = args.sentence_pooling_method, args.normalize_embeddings
            if args.use_lora:
                lora.save_adapter(encoder.backbone, own, folder / lora.FOLDER)
                own = lora.merge(encoder.backbone, own)
            export.save_model(encoder.backbone, own, self.tokenizer, folder)
            prompts = group_data.prompts_of(args, self.data)
            export.write_sentence_transformers(folder, encoder.backbone.config, pooling, normalize, prompts)
            text = card.of_finetuning(args, self.data, encoder.backbone.config, prompts, scores)
            (folder / model_card.FILE).write_text(text, encoding="utf-8")
            return export.check_saved(folder, ids, live_ND, pooling, normalize, engines.precision(engine))

        return collectives.on_first_rank(write)

    def place(self, written: Path, output: Path) -> None:
        """What makes the folder loadable is moved last."""
        shutil.rmtree(output / lora.FOLDER, ignore_errors=True)  # an older run's would not fit this run's model
        filesystem.merge_folder(written, output, last=export.ENTRY_FILES)


_FROM_SHARDS = ("query_max_len", "passage_max_len", "query_instruction_for_retrieval", "passage_instruction_for_retrieval")


def freeze_and_checkpoint(backbone: torch.nn.Module, args: FinetuneArguments) -> None:
    if args.fix_position_embedding:
        for name, parameter in backbone.named_parameters():
            if "position_embeddings" in name:
                parameter.requires_grad_(False)
    if args.gradient_checkpointing:
        options = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def sizes_of(micro_batches: list[collate.ContrastiveBatch], args: FinetuneArguments, uniform: bool) -> list[int]:
    """The numbers of this rank's shares, which the others must know; none where they follow from the arguments."""
    in_pieces = args.sub_batch_size or args.sub_batch_tokens
    if uniform and not in_pieces and not args.bidirectional:
        return []
    return [number for batch in micro_batches for number in batch.share]


def backward(
    engine, batch: collate.ContrastiveBatch, args: FinetuneArguments, objective: contrastive.ContrastiveSettings, seed,
    shares: list[Share] | None = None,
) -> contrastive.LossParts:  # fmt: skip
    """One batch's forward and backward passes, in pieces where asked; `seed(k)` seeds the dropout of piece k.

    shares: of every rank; None where their numbers are all this rank's own (`sizes_of`).
    """
    texts, shares = batch.texts, shares or [batch.share] * collectives.world_size()
    # Every rank makes as many passes as the one that needs most: under ZeRO-3 each forward is a collective.
    bounds = batch.cut_into(max(share.pieces for share in shares))
    pieces = packed.split(texts, bounds)
    fixed_scale = torch.full((), 1 / args.temperature, device=texts.ids_T.device)
    parts: list[contrastive.LossParts] = []

    def embed(k: int):
        seed(k)
        scale = engine.module.temperature() if args.learnable_temperature else fixed_scale
        return engine(pieces[k]), scale

    def loss(vectors_ND, scale):
        vectors_ND = vectors_ND[texts.place_N]
        parts.append(contrastive_loss(vectors_ND, scale, batch, objective, args.negatives_cross_device, shares))
        return engines.all_or_nothing(parts[0].loss)

    sizes = [last - first for first, last in pairwise(bounds)]
    with engines.one_reduction(engine, len(pieces)) as run_backward:
        grad_cache.backward(embed, sizes, loss, run_backward)
    return parts[0].detached()


def objective_of(args: FinetuneArguments) -> contrastive.ContrastiveSettings:
    return contrastive.ContrastiveSettings(
        in_batch=args.use_inbatch_neg,
        bidirectional=args.bidirectional,
        mask_false_negatives=args.mask_false_negatives,
        margin=args.false_negative_margin,
        relative=args.false_negative_margin_type == "relative",
        distillation=args.kd_loss_type if args.knowledge_distillation else None,
        dims=tuple(args.mrl_dims),
        normalize=args.normalize_embeddings,
        narrow=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
    )
