"""Training a cross-encoder: the pairs of a query and the passages of its group, scored against each other.

Pairs are put together from the ids of the shards that fine-tuning reads. A group is whole on a rank, so nothing is gathered;
GradCache, whose vectors are scores here, takes a batch in pieces where asked.
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
from bge_ds.config.arguments import RerankArguments
from bge_ds.config.run_config import fill_from_shards
from bge_ds.data import collate, diagnosis, pairs
from bge_ds.data.beir import RetrievalSet
from bge_ds.data.pairs import PairLayout
from bge_ds.data.preprocess import validate
from bge_ds.data.shards import shard_reader
from bge_ds.data.shards.manifest_file import MANIFEST
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.evaluation import evaluators
from bge_ds.evaluation.evaluators import RerankingEvaluator
from bge_ds.kernels.packed import split_further
from bge_ds.losses import grad_cache, reranking
from bge_ds.modeling import cross_encoder, export, lora, model_card
from bge_ds.modeling.cross_encoder import CrossEncoder, Kind
from bge_ds.modeling.encoder import check_lengths, check_vocabulary, load_config
from bge_ds.modeling.flops import backbone_flops
from bge_ds.objectives import card
from bge_ds.objectives.shards import open_shards
from bge_ds.training.data_order import split_weights
from bge_ds.training.objective import Objective, Scores, Values

_CHECKED = 4  # groups whose scores are compared with those of the saved model
# A line's `prompt` is FlagEmbedding's question to a decoder, not the prefix of the query that fine-tuning takes it for; its
# `query_prompt` is that prefix. Shards made from lines hold the former as `type`, which no training reads.
_COLUMNS = (("prompt", "query_prompt"), ("type", "prompt"))


class RerankingObjective(Objective):
    title = "reranker training"
    gives = "scores"
    resume_names = (
        "train_group_size", "query_max_len", "passage_max_len", "max_len", "loss", "label_smoothing",
        "knowledge_distillation", "kd_loss_type", "query_instruction_for_rerank", "passage_instruction_for_rerank",
        "query_instruction_format", "passage_instruction_format", "prompt", "sep_token", "sub_batch_size",
        "sub_batch_tokens", "use_lora", "lora_rank", "lora_alpha", "lora_dropout", "target_modules",
        "same_dataset_within_batch", "max_example_num_per_dataset", "small_threshold", "drop_threshold",
    )  # fmt: skip

    def __init__(self, args: RerankArguments):
        self.tokenizer = validate.load_tokenizer(args.tokenizer_name or args.model_name_or_path, args.cache_dir)
        self.model_config = load_config(args.config_name or args.model_name_or_path, cache_dir=args.cache_dir)
        self.kind, self.new_head = kind_of(args, self.model_config)
        self.yes = cross_encoder.yes_token(self.tokenizer) if self.kind == "decoder" else None
        check_vocabulary(self.model_config, self.tokenizer)
        self.args, self.data, prompt = open_groups(args, self.tokenizer, self.kind)
        self.layout = layout_of(args, self.tokenizer, self.kind, prompt)
        check_room(self.args, self.layout, self.model_config)
        self.settings = reranking.RerankingSettings(
            args.loss, args.kd_loss_type if args.knowledge_distillation else None, args.label_smoothing
        )

    def build_model(self, device: torch.device) -> nn.Module:
        args = self.args
        with engines.sharded_loading(args.deepspeed, bf16=args.bf16, fp16=args.fp16):
            model = CrossEncoder.load(
                args.model_name_or_path, yes=self.yes, new_head=self.new_head, config=self.model_config,
                cache_dir=args.cache_dir,
            )  # fmt: skip
        if args.use_lora:
            lora.add_adapters(
                self.backbone(model), rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout,
                target_modules=args.target_modules, name_or_path=args.model_name_or_path,
            )  # fmt: skip
            model.model.get_output_embeddings().requires_grad_(False)
        if args.gradient_checkpointing:
            options = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
            model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return model

    def backbone(self, model: nn.Module) -> nn.Module:
        return model.model.base_model

    def check(self) -> None:
        check_groups(self.args, self.data)

    def facts(self, runs: str) -> list[tuple[str, str]]:
        args, cuts = self.args, self.args.cuts
        head = "the logit of Yes" if self.kind == "decoder" else f"a {'new ' * self.new_head}head of one label"
        return [
            ("model", f"{args.model_name_or_path}, scores by {head}, runs {runs}"),
            ("data", f"{len(self.data)} groups, {self.data.num_passages} passages"),
            ("lengths", f"pairs to {cuts['max_len']}, queries in them to {cuts['query_max_len']} tokens"),
            ("negatives", f"{args.train_group_size - 1} a query, of its group"),
        ]

    def warnings(self, eval_sets: Mapping[str, RetrievalSet], epochs: float) -> list[str]:
        return diagnosis.of_shards(self.data) + self.args.without_effect()

    def open_evaluation(self) -> dict[str, RetrievalSet]:
        args, sets = self.args, super().open_evaluation()
        flag = "--eval_search_results"
        self.first_stages = evaluators.first_stages(sets, args.eval_search_results, args.eval_rerank_depth, flag)
        return sets

    def evaluator(self, sets: dict[str, RetrievalSet], device: torch.device) -> RerankingEvaluator:
        args, prefixes = self.args, {of: prefix_of(self.args, self.kind, of) for of in _SIDES}
        return RerankingEvaluator(
            sets, self.first_stages, self.tokenizer, device, depth=args.eval_rerank_depth, layout=self.layout, cuts=args.cuts,
            prefixes=prefixes, yes=self.yes, batch_size=args.per_device_eval_batch_size,
        )  # fmt: skip

    def collate(self, seed: int) -> tuple[Callable, dict]:
        args = self.args
        return collate.collate_pairs, dict(
            seed=seed, group_size=args.train_group_size, layout=self.layout, cuts=args.cuts,
            distill=args.knowledge_distillation, max_texts=args.sub_batch_size, max_tokens=args.sub_batch_tokens,
        )  # fmt: skip

    def counts_to_exchange(self, micro_batches: list) -> list[int]:
        in_pieces = self.args.sub_batch_size or self.args.sub_batch_tokens
        return [len(batch.bounds) - 1 for batch in micro_batches] if in_pieces else []

    def shares(self, micro_batches: list, counts_R: list[list[int]]) -> list[int]:
        """Of every micro batch, the pieces of the rank that needs most: under ZeRO-3 each forward is a collective."""
        return [max([1, *(counts[k] for counts in counts_R if counts)]) for k in range(len(micro_batches))]

    def backward(self, engine, batch: collate.PairBatch, share: int, seed: Callable[[int], None]) -> Values:
        bounds = split_further(batch.bounds, share)
        pieces = batch.pairs.split(bounds)
        constant = torch.ones((), device=batch.texts.ids_T.device)  # GradCache's scale, which scores have none of
        found: list[torch.Tensor] = []

        def score(k: int):
            seed(k)
            return engine(pieces[k]), constant

        def loss(scores_N, _):
            scores_BG = scores_N[batch.texts.place_N].view(len(batch.rows_B), -1)
            found.append(scores_BG.detach())
            return engines.all_or_nothing(reranking.loss(scores_BG, self.settings, batch.teacher_BG))

        sizes = [last - first for first, last in pairwise(bounds)]
        with engines.one_reduction(engine, len(pieces)) as run_backward:
            value = grad_cache.backward(score, sizes, loss, run_backward)
        first_B = (found[0][:, :1] > found[0][:, 1:]).all(1)
        return {"loss": value, "first": first_B.sum(), "groups": len(first_B)}

    def flops(self, model: nn.Module, batch) -> float:
        return backbone_flops(self.backbone(model), batch.texts.runs)

    def record(self, sums: dict[str, float], model: nn.Module, batch) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["micro_batches"], "positive_first": sums["first"] / sums["groups"]}

    def chance(self, record: dict[str, float]) -> float | None:
        if self.args.knowledge_distillation or self.args.label_smoothing:
            return None
        share = 1 / self.args.train_group_size
        if self.args.loss == "cross_entropy":
            return -math.log(share)
        return -share * math.log(share) - (1 - share) * math.log1p(-share)  # every pair gets the share of positives

    def save(self, engine, folder: Path, scores: Scores) -> float:
        args, model = self.args, engine.module.model
        weights = engines.full_parameters(engine, lambda name: name.startswith("model."))
        rows = np.arange(min(_CHECKED, len(self.data)))
        make, options = self.collate(0)
        some = make(self.data, np.zeros_like(rows), rows, **options)
        ids, second = some.texts.split_ids(), None if some.pairs.second_N is None else some.pairs.second_N.numpy()
        live_N = engine.module.score_ids(ids, second)

        def write() -> float:
            own = {name.removeprefix("model."): weight for name, weight in weights.items()}
            if args.use_lora:
                lora.save_adapter(model.base_model, own, folder / lora.FOLDER)
                own = lora.merge(model, own)
            export.save_model(model, own, self.tokenizer, folder)
            export.mark_as_cross_encoder(folder)
            prefixes = {of: prefix_of(args, self.kind, of) for of in _SIDES}
            text = card.of_reranking(args, self.data, self.kind == "decoder", prefixes, scores)
            (folder / model_card.FILE).write_text(text, encoding="utf-8")
            return export.check_saved_scores(folder, ids, second, live_N, self.yes, engines.precision(engine))

        return collectives.on_first_rank(write)

    def place(self, written: Path, output: Path) -> None:
        """What makes the folder loadable is moved last."""
        shutil.rmtree(output / lora.FOLDER, ignore_errors=True)  # an older run's would not fit this run's model
        filesystem.merge_folder(written, output, last=export.ENTRY_FILES)


_SIDES, _LENGTHS = ("query", "passage"), ("query_max_len", "passage_max_len")


def kind_of(args: RerankArguments, config) -> tuple[Kind, bool]:
    """(kind, whether it gets a new head) of the model; the config of a new head says one label. Raises ValueError."""
    kind = cross_encoder.kind_of(config)
    new_head = kind is None
    if new_head:
        kind, config.num_labels = "classifier", 1
    cross_encoder.check(config, kind)
    found = "decoder" if kind == "decoder" else "encoder"
    if args.model_type not in (None, found):
        raise ValueError(
            f"--model_type {args.model_type}: by its files {args.model_name_or_path} is of type {found}; leave the flag "
            "out, or give another model"
        )
    if found == "encoder":
        for name in ("prompt", "sep_token", "use_lora"):
            if args.asks(name):
                raise ValueError(f"--{name} is for decoders, and {args.model_name_or_path} is an encoder; leave it out")
    return kind, new_head


def prefix_of(args: RerankArguments, kind: Kind, of: str) -> str:
    """What stands before each query or passage."""
    own = {"query": pairs.QUERY_PREFIX, "passage": pairs.PASSAGE_PREFIX} if kind == "decoder" else {}
    given = args.prefix(of)
    return own.get(of, "") if given is None else given


def open_groups(args: RerankArguments, tokenizer, kind: Kind) -> tuple[RerankArguments, shard_reader.FinetuneShards, str]:
    """(the arguments, lengths taken from shards where none are given; the reader; a decoder's prompt).

    Raises ValueError for shards that cannot serve.
    """
    special = tokenizer.num_special_tokens_to_add()
    lengths = {name: args.cuts[name] + special for name in _LENGTHS}
    prefixes = {of: prefix_of(args, kind, of) for of in _SIDES}
    data = open_shards(
        "finetune", args, tokenizer, explicit=frozenset(), cache_dir=args.cache_path, columns=_COLUMNS, **lengths,
        query_instruction=prefixes["query"], passage_instruction=prefixes["passage"],
    )  # fmt: skip
    given = [Path(path) for path in split_weights(args.train_data)[0] if (Path(path) / MANIFEST).is_file()]
    for folder in given:
        check_shards(args, folder, prefixes)
    made = [folder for folder in data.folders if folder not in given]
    if not made:
        args = fill_from_shards(args, data.manifest, _LENGTHS)
    prompts = shard_reader.open_folders(made).distinct("type") if made and kind == "decoder" else set()
    if args.prompt is None and len(prompts) > 1:
        shown = ", ".join(map(repr, sorted(prompts)[:2]))
        raise ValueError(
            f"{' '.join(args.train_data)}: lines have different prompts, such as {shown}, and a decoder is trained with one: "
            "give lines of one prompt, or --prompt for all"
        )
    return args, data, args.prompt if args.prompt is not None else next(iter(prompts), pairs.PROMPT)


def check_shards(args: RerankArguments, folder: Path, prefixes: dict[str, str]) -> None:
    """Refuse a folder of shards whose texts are shorter than is asked, or begin with something else than pairs do."""
    data = shard_reader.open_folder(folder)
    for of, prefix in prefixes.items():
        held, name = getattr(data.manifest, f"{of}_instruction_for_retrieval") or "", f"{of}_max_len"
        if held != prefix:
            raise ValueError(
                f"{folder}: each {of} begins with {held!r}, and this run's with {prefix!r}: give "
                f"--{of}_instruction_for_rerank {held!r}, or preprocess with --{of}_instruction_for_retrieval {prefix!r}"
            )
        if name in args.explicit and getattr(args, name) > getattr(data.manifest, name):
            raise ValueError(
                f"--{name} {getattr(args, name)} is longer than the {getattr(data.manifest, name)} that {folder} was cut to: "
                "give less, or preprocess again"
            )
    if prompts := sorted(data.distinct("prompt")):
        raise ValueError(
            f"{folder}: queries begin with prompts of their lines, such as {prompts[0]!r}, which serve embedders: preprocess "
            "again from lines without `prompt`, or give the lines themselves"
        )


def layout_of(args: RerankArguments, tokenizer, kind: Kind, prompt: str) -> PairLayout:
    if kind == "classifier":
        return PairLayout.of_tokenizer(tokenizer)
    return PairLayout.of_decoder(tokenizer, prompt, args.sep_token.replace("\\n", "\n"))


def check_room(args: RerankArguments, layout: PairLayout, config) -> None:
    """Refuse pairs that the model has no positions for, or that have no room for a passage."""
    cuts = args.cuts
    asked = " ".join(f"--{name} {getattr(args, name)}" for name in (*_LENGTHS, "max_len") if getattr(args, name) is not None)
    try:
        check_lengths(config, max_len=cuts["max_len"])
        layout.check_room(cuts["query_max_len"], cuts["max_len"])
    except ValueError as error:
        raise ValueError(f"{asked}: {error}") from None


def check_groups(args: RerankArguments, data: shard_reader.FinetuneShards) -> None:
    """Refuse groups without negatives, and distillation from groups without scores."""
    if bare := data.manifest.counts["groups_without_negatives"]:
        raise ValueError(
            f"{' '.join(args.train_data)}: {bare} groups have no negatives, and a positive alone cannot be ranked; add "
            "negatives, or drop those groups"
        )
    lacking = [row for _, row in data.scored() if row is not None] if args.knowledge_distillation else []
    if lacking:
        raise ValueError(
            f"{' '.join(args.train_data)}: --knowledge_distillation needs pos_scores and neg_scores in every group, and group "
            f"{lacking[0]} (from 0) has none; score the data with `python -m bge_ds.score`, or leave it out"
        )
