"""The model card of what a run made: training data by name and count, settings, measures, how to use it."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from bge_ds.config.arguments import FinetuneArguments, GroupArguments, PretrainArguments, RerankArguments, TrainArguments
from bge_ds.data.preprocess.table_files import HUB
from bge_ds.data.shards.shard_reader import FinetuneShards, PretrainShards
from bge_ds.distributed import collectives
from bge_ds.modeling import model_card
from bge_ds.modeling.encoder import longest_text
from bge_ds.training.data_order import sets_of

_SHOWN = 30  # sets in the table
_GROUPS = "groups", "Groups of a query, its positives and its negatives."
_OBJECTIVES = {
    "retromae": "RetroMAE (arXiv:2205.12035)",
    "dupmae": "DupMAE (arXiv:2211.08769)",
    "mlm": "masked language modelling",
}


def of_finetuning(
    args: FinetuneArguments, data: FinetuneShards, config: PretrainedConfig, prompts: dict[str, str],
    scores: dict[str, dict[str, float]],
) -> str:  # fmt: skip
    """The card's text. prompts: by the names that they are saved by. scores: measures of this very model by set, or none.

    It says only what a run that resumes from a checkpoint, on any number of ranks, says as well.
    """
    base = model_card.shown_name(args.model_name_or_path)
    pooling, normalize = args.sentence_pooling_method, args.normalize_embeddings
    length = longest_text(config)
    intro = model_card.describe(config.hidden_size, length, pooling, normalize)
    return model_card.page(
        model_card.front_matter([args.model_name_or_path], args.license, "finetune"),
        args.hub_model_id or f"{base}, fine-tuned",
        f"A text embedding model for search: {base}, fine-tuned on queries with relevant passages. {intro}",
        [
            ("Use", model_card.usage(args.hub_model_id or model_card.PLACE, pooling, normalize, prompts, length)),
            ("Measures", model_card.scores(scores)),
            ("Training data", _sets(args, data, *_GROUPS)),
            ("Training", model_card.table(("setting", "value"), _of_groups(args, base, _of_contrast(args)))),
        ],
    )  # fmt: skip


def of_pretraining(
    args: PretrainArguments, data: PretrainShards, config: PretrainedConfig, scores: dict[str, dict[str, float]]
) -> str:
    """The card's text, as of `of_finetuning`, of an encoder that has still to be fine-tuned."""
    start = args.model_name_or_path or args.config_name or ""
    base = model_card.shown_name(start) + ", from scratch" * (not args.model_name_or_path)
    place = args.hub_model_id or model_card.PLACE
    intro = model_card.describe(config.hidden_size, longest_text(config), None, False)
    command = f"python -m bge_ds.finetune --model_name_or_path {place} --train_data groups.jsonl --output_dir out"
    use = f"{model_card.usage(place, None, False, {}, 0)}\n\nFine-tuning it:\n\n```bash\n{command}\n```"
    return model_card.page(
        model_card.front_matter([args.model_name_or_path], args.license, "finetune", kind="encoder"),
        args.hub_model_id or f"{base}, pre-trained",
        f"An encoder to be fine-tuned for search: {base}, pre-trained on plain texts by {_OBJECTIVES[args.objective]}. {intro}",
        [
            ("Use", use),
            ("Measures", model_card.scores(scores, "Exact search with its normalised [CLS] vectors, before fine-tuning.")),
            ("Training data", _sets(args, data, "texts", "Plain texts.")),
            ("Training", model_card.table(("setting", "value"), _pretraining(args, base))),
        ],
    )


def of_reranking(
    args: RerankArguments, data: FinetuneShards, decoder: bool, prefixes: dict[str, str], scores: dict[str, dict[str, float]]
) -> str:
    """The card's text, as of `of_finetuning`. prefixes: what stands before each query and passage."""
    base, cuts = model_card.shown_name(args.model_name_or_path), args.cuts
    lists = ", ".join(Path(file).name for file in args.eval_search_results) or "BM25"
    score = "the logit of the token Yes" if decoder else "a logit"
    loss = [] if args.loss == "none" else [args.loss.replace("_", " ")]
    loss += [f"{args.kd_loss_type}, distilled from a teacher's scores"] if args.knowledge_distillation else []
    rows = [
        ("loss", " and ".join(loss)),
        ("label smoothing", f"{args.label_smoothing:g}" if args.label_smoothing else ""),
        ("tokens", f"pairs to {cuts['max_len']}, queries in them to {cuts['query_max_len']}"),
        *((f"before a {of}", f"`{prefix!r}`") for of, prefix in prefixes.items() if prefix),
    ]
    return model_card.page(
        model_card.front_matter([args.model_name_or_path], args.license, "finetune", kind="reranker"),
        args.hub_model_id or f"{base}, a reranker",
        f"A reranker for search: {base}, trained to score a query and a passage together. The score is {score}; higher is more "
        f"relevant. Made with bge_ds {model_card.__version__}.",
        [
            ("Use", model_card.reranker_usage(args.hub_model_id or model_card.PLACE, decoder, prefixes)),
            ("Measures", model_card.scores(scores, f"The first {args.eval_rerank_depth} passages of {lists}, reranked.")),
            ("Training data", _sets(args, data, *_GROUPS)),
            ("Training", model_card.table(("setting", "value"), _of_groups(args, base, rows))),
        ],
    )  # fmt: skip


def _sets(args: TrainArguments, data: FinetuneShards | PretrainShards, rows_are: str, words: str) -> str:
    sets = sets_of(args, data)
    names = [of.name if of.name.startswith(HUB) else Path(of.name).name for of in sets]
    head, rows = ["data", rows_are], [[name, f"{of.kept:,}"] for name, of in zip(names, sets, strict=True)]
    if shares := sum(of.share or 0 for of in sets):
        head.append("share")
        rows = [[*row, f"{(of.share or 0) / shares:.1%}"] for row, of in zip(rows, sets, strict=True)]
    if len(sets) > _SHOWN:
        rest = sum(of.kept for of in sets[_SHOWN:])
        rows = [*rows[:_SHOWN], [f"{len(sets) - _SHOWN} more", f"{rest:,}", *[""] * (len(head) - 2)]]
    return f"{words}\n\n{model_card.table(head, rows)}"


def _of_groups(args: GroupArguments, base: str, own: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """own: rows of the objective; those without a value are left out."""
    rows = [
        ("base model", base),
        *own,
        ("queries a step", _a_step(args, args.per_device_train_batch_size)),
        ("passages of a query", str(args.train_group_size)),
        ("LoRA", f"rank {args.lora_rank}, alpha {args.lora_alpha:g}, merged" if args.use_lora else ""),
        *_shared(args),
    ]
    return [row for row in rows if row[1]]


def _pretraining(args: PretrainArguments, base: str) -> list[tuple[str, str]]:
    decoder, budget = args.objective != "mlm", args.per_device_train_tokens
    rows = [
        ("base model", base),
        ("objective", _OBJECTIVES[args.objective]),
        ("masked", f"{args.encoder_mlm_probability:.0%} of the words"),
        ("hidden from the decoder", f"{args.decoder_mlm_probability:.0%} of the words" if decoder else ""),
        ("weight of the bag-of-words loss", f"{args.bow_loss_weight:g}" if args.objective == "dupmae" else ""),
        ("tokens a step, at most", _a_step(args, budget) if budget else ""),
        ("texts a step", _a_step(args, args.per_device_train_batch_size) if not budget else ""),
        ("tokens", f"texts to {args.max_seq_length}"),
        ("words of Chinese", args.word_segmenter if args.word_segmenter != "none" else ""),
        *_shared(args),
    ]
    return [row for row in rows if row[1]]


def _a_step(args: TrainArguments, of_a_rank: int) -> str:
    return f"{of_a_rank * args.gradient_accumulation_steps * collectives.world_size()}"


def _shared(args: TrainArguments) -> list[tuple[str, str]]:
    """Rows of every objective."""
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    warmup = f", warm-up {args.warmup_steps:g}{' of all steps' if 0 < args.warmup_steps < 1 else ' steps'}"
    return [
        ("length", length),
        ("learning rate", f"{args.learning_rate:g}, {args.lr_scheduler_type}{warmup * bool(args.warmup_steps)}"),
        ("weight decay", f"{args.weight_decay:g}" if args.weight_decay else ""),
        ("precision", "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"),
        ("seed", str(args.seed)),
    ]


def _of_contrast(args: FinetuneArguments) -> list[tuple[str, str]]:
    return [
        ("loss", _loss(args)),
        ("temperature", f"{args.temperature:g}" + ", learned from there" * args.learnable_temperature),
        ("negatives", _negatives(args)),
        ("tokens", f"queries to {args.query_max_len}, passages to {args.passage_max_len}"),
    ]


def _loss(args: FinetuneArguments) -> str:
    words = "InfoNCE" + ", both directions" * args.bidirectional
    if args.knowledge_distillation:
        words = args.kd_loss_type if args.kd_loss_type == "m3_kd_loss" else f"{words} and {args.kd_loss_type}"
        words += ", distilled from a teacher's scores"
    return words + (f", at {', '.join(map(str, args.mrl_dims))} features (Matryoshka)" if args.use_mrl else "")


def _negatives(args: FinetuneArguments) -> str:
    if not args.use_inbatch_neg:
        return "of the own group only"
    return "of the own group, and all passages of " + ("all ranks" if args.negatives_cross_device else "the rank")
