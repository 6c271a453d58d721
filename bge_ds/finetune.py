"""Contrastive fine-tuning: `deepspeed --num_gpus N -m bge_ds.finetune ...` (`--help` lists the flags)."""

from __future__ import annotations

import math
import shutil
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from bge_ds import preprocess
from bge_ds.checkpoint import checkpoint, filesystem
from bge_ds.config.arguments import FinetuneArguments, parse
from bge_ds.data import collate
from bge_ds.data.collate import Share
from bge_ds.data.preprocess import validate
from bge_ds.data.shards import shard_reader
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.distributed.communication_profile import Pace
from bge_ds.evaluation import during_training
from bge_ds.health import failure_detector
from bge_ds.kernels import packed
from bge_ds.losses import contrastive, grad_cache
from bge_ds.modeling import export, lora
from bge_ds.modeling.encoder import Encoder, check_lengths, check_vocabulary, describe_execution, load_config
from bge_ds.modeling.flops import backbone_flops
from bge_ds.training import data_order, resume, setup
from bge_ds.training.metrics import Meter
from bge_ds.training.nonfinite import SkippedSteps

_AGREE = ("train_group_size", "query_max_len", "passage_max_len", "negatives_cross_device", "use_inbatch_neg",
          "temperature", "normalize_embeddings", "sentence_pooling_method", "mask_false_negatives", "sub_batch_size",
          "sub_batch_tokens", "bidirectional", "false_negative_margin", "false_negative_margin_type", "learnable_temperature",
          "knowledge_distillation", "kd_loss_type", "mrl_dims", "bidirectional_attention", "use_lora", "lora_rank",
          "lora_alpha", "lora_dropout", "target_modules", "same_dataset_within_batch",
          "max_example_num_per_dataset")  # fmt: skip


def train(args: FinetuneArguments) -> None:
    started = time.perf_counter()
    setup.set_up(args)
    tokenizer = validate.load_tokenizer(args.tokenizer_name or args.model_name_or_path, args.cache_dir)
    data = open_data(args, tokenizer)
    eval_sets = during_training.open_sets(args)
    model_config = load_config(args.config_name or args.model_name_or_path, cache_dir=args.cache_dir)
    check_vocabulary(model_config, tokenizer)
    check_lengths(model_config, query_max_len=args.query_max_len, passage_max_len=args.passage_max_len)

    device = engines.start(use_cpu=args.use_cpu, backend=args.ddp_backend, timeout_s=args.ddp_timeout)
    setup.check_compilation(args, model_config, device)
    taken = resume.take_up(args)
    torch.manual_seed(args.seed)
    with engines.sharded_loading(args.deepspeed, bf16=args.bf16, fp16=args.fp16):
        model = Encoder.load(
            args.model_name_or_path, args.sentence_pooling_method, args.normalize_embeddings,
            config=model_config, cache_dir=args.cache_dir, bidirectional=args.bidirectional_attention,
        )  # fmt: skip
    if args.use_lora:
        add_adapters(model.backbone, args)
    if args.learnable_temperature:
        model.temperature = contrastive.Temperature(args.temperature)
    freeze_and_checkpoint(model.backbone, args)
    setup.compile_layers(args, model.backbone)
    order = data_order.make_order(args, data)
    plan = setup.StepPlan.make(args, order)
    uniform = not has_bare_groups(data)
    check_comparable(args, data, order, uniform)
    if args.knowledge_distillation:
        check_teacher(args, data, uniform)
    width = model_config.hidden_size
    if args.mrl_dims and args.mrl_dims[-1] > width:
        raise ValueError(f"--mrl_dims {args.mrl_dims[-1]} is more than the {width} features of the model's vectors")
    engine, config = setup.build_engine(args, model, plan)
    agreement = resume.agreement(args, data, plan, _AGREE) | {checkpoint.FROZEN: engines.mark_of_frozen(engine)}
    first_step, tokens_seen = resume.resume(args, taken, engine, agreement)
    log = setup.open_log(args, engine, first_step, plan)
    ranks = collectives.world_size() if args.negatives_cross_device else 1
    passages = args.per_device_train_batch_size * args.train_group_size * ranks
    negatives = (passages if args.use_inbatch_neg else args.train_group_size) - 1
    facts = [
        ("model", f"{args.model_name_or_path}, runs {describe_execution(model_config, device, engines.precision(engine))}"),
        ("data", f"{len(data)} groups, {data.num_passages} passages"),
        ("sets", data_order.table(args, data, order, plan.total)),
        ("lengths", f"queries to {args.query_max_len}, passages to {args.passage_max_len} tokens"),
        ("negatives", f"{'' if uniform else 'up to '}{negatives} a query" + (" from all ranks" if ranks > 1 else "")),
    ]  # fmt: skip
    log.say(f"fine-tuning\n{setup.summary(args, plan, order, engine, config, facts)}")
    if len(prompts := prompts_of(args, data)) > 2:
        log.say(f"warning: sets have different instructions, saved as prompts {', '.join(prompts)}; evaluations use none")
    if args.gradient_accumulation_steps > 1 and args.use_inbatch_neg:
        log.say("warning: accumulation adds no negatives; a larger batch on each rank does")
    if taken:
        log.say("\n".join([*taken.notes, f"resumed from {taken.path} at step {first_step}"]))
    batches_of_steps = setup.load_steps(
        args, data, order, collate.collate_groups, device, first_step, plan.total,
        seed=order.seed, group_size=args.train_group_size,
        query_max_len=args.query_max_len, passage_max_len=args.passage_max_len,
        own_only_spans=own_only_spans(data), distill=args.knowledge_distillation,
        max_texts=args.sub_batch_size, max_tokens=args.sub_batch_tokens,
    )  # fmt: skip
    save = partial(write_model, engine, tokenizer, args, data)
    evaluations = during_training.prepare(
        args, eval_sets, tokenizer, engine.module, device, plan, log, taken and taken.path,
        query_max_len=args.query_max_len, passage_max_len=args.passage_max_len,
        query_prompt=args.query_instruction_for_retrieval or "", passage_prompt=args.passage_instruction_for_retrieval or "",
    )  # fmt: skip

    objective = objective_of(args)
    meter = Meter(device, args.logging_nan_inf_filter)
    nonfinite = SkippedSteps(args.max_nonfinite_steps, Path(args.output_dir), engine, tokenizer, log.say)
    resume.restore_meter(meter, nonfinite, taken)
    saver = resume.Saver(args, engine, agreement, resume.asked_batch(args, taken), save, log, meter, nonfinite, started)
    pace = Pace(device, log.say)
    engine.train()
    pace.begin()
    told = collectives.exchange_ahead(batches_of_steps, lambda micros: sizes_of(micros, args, uniform), device)
    for step, (micro_batches, sizes_R) in enumerate(told, start=first_step + 1):
        pace.loaded()
        learning_rate = engine.get_lr()[0]
        parts = []
        for micro, batch in enumerate(micro_batches):
            batch = batch.to(device)
            shares = [Share(*sizes[micro * len(Share._fields) :][: len(Share._fields)]) for sizes in sizes_R if sizes]
            seed = partial(setup.seed_step, args.seed, step, micro)
            parts.append(backward(engine, batch, args, objective, seed, shares or None))
            applied = engines.take_step(engine)
        loss = sum(part.loss for part in parts) / len(parts)
        meter.add(
            loss=loss if applied else math.nan,
            negatives=sum(part.negatives for part in parts),
            hidden_by_content=sum(part.by_content for part in parts),
            hidden_by_margin=sum(part.by_margin for part in parts),
            scale=parts[0].scale,
            tokens=sum(b.texts.tokens for b in micro_batches),
            padded_tokens=sum(b.texts.padded_tokens for b in micro_batches),
            flops=sum(backbone_flops(model.backbone, b.texts.runs) for b in micro_batches),
        )
        tokens_seen += sum(b.texts.tokens for b in micro_batches)
        pace.end(sum(b.texts.tokens for b in micro_batches))
        nonfinite.saw(step, applied, loss, micro_batches)
        log.advance()
        setup.empty_cache(args, step, device)
        if plan.logs(step):
            sums = meter.read()
            queries = sums["steps"] * order.global_batch
            log.write({
                "step": step,
                "epoch": plan.epoch(step),
                "loss": sums["loss"] / sums["steps"] / collectives.world_size(),
                "learning_rate": learning_rate,
                "grad_norm": engines.gradient_norm(engine),
                "negatives": sums["negatives"] / queries,
                "false_negatives_hidden": sums["hidden_by_content"] / queries,
                "margin_negatives_hidden": sums["hidden_by_margin"] / queries,
                "temperature": sums["steps"] * collectives.world_size() / sums["scale"],
                **setup.rates(args, engine, device, sums, tokens_seen, nonfinite, pace),
                **saver.record(),
            })  # fmt: skip
            engine.train()
        to_save = evaluations.at(step, meter)
        stops = failure_detector.last_step(step) == step < plan.total
        if plan.saves(step) or to_save or (stops and not args.save_only_model):
            saver.save(step, tokens_seen, evaluations.judge(step))
            engine.train()
        if stops:
            setup.stop(args, step)
        pace.begin()

    difference = finish(evaluations.result(save), Path(args.output_dir))
    log.close()
    log.say(
        f"done in {time.perf_counter() - started:.0f} s: the model is in {args.output_dir}\n"
        f"  {evaluations.say_result(difference)}\n  {saver.say_total()}"
    )


def open_data(args: FinetuneArguments, tokenizer) -> shard_reader.FinetuneShards:
    """The shards, made from JSON lines where they must be; lengths and instructions not given are the shards'."""
    say = print if setup.is_first_on_host() else setup.silent
    paths, weights = data_order.split_weights(args.train_data)
    folders = preprocess.prepare_all(
        "finetune", paths, tokenizer, bool(weights or args.mixing_temperature),
        query_max_len=args.query_max_len, passage_max_len=args.passage_max_len,
        query_instruction=args.query_instruction_for_retrieval, passage_instruction=args.passage_instruction_for_retrieval,
        explicit=args.explicit, cache_dir=args.cache_dir, on_error=args.on_error, verify_data=args.verify_data, say=say,
    )  # fmt: skip
    data = shard_reader.open_folders(folders)
    for name in ("query_max_len", "passage_max_len", "query_instruction_for_retrieval", "passage_instruction_for_retrieval"):
        if name not in args.explicit:
            setattr(args, name, data.manifest[name])
    return data


def prompts_of(args: FinetuneArguments, data: shard_reader.FinetuneShards) -> dict[str, str]:
    """The instructions of training under the names that they are saved by.

    Where the folders of shards have different ones, each is saved as `query_SET` or `passage_SET`, SET being the name of its
    first input file, and `query` or `passage` is empty.
    """
    prompts = {}
    for kind in ("query", "passage"):
        name = f"{kind}_instruction_for_retrieval"
        prompts[kind] = getattr(args, name) or ""
        if data.manifest[name] is None:
            manifests = [reader.manifest for reader in data.readers]
            sets = [Path(manifest["sources"][0]["path"]).name.split(".")[0] for manifest in manifests]
            names = [of if sets.count(of) == 1 else f"{of}_{k}" for k, of in enumerate(sets, start=1)]
            prompts |= {f"{kind}_{of}": manifest[name] for of, manifest in zip(names, manifests, strict=True)}
    return prompts


def has_bare_groups(data: shard_reader.FinetuneShards) -> bool:
    """Whether some group has no negatives of its own: ranks may then bring different numbers of passages."""
    return data.manifest["counts"]["groups_without_negatives"] > 0


def check_comparable(args: FinetuneArguments, data: shard_reader.FinetuneShards, order, uniform: bool) -> None:
    """Refuse runs in which a query would have nothing to be compared against (its loss would be 0)."""
    bare = data.manifest["counts"]["groups_without_negatives"]
    if not uniform and not args.use_inbatch_neg:
        raise ValueError(
            f"{' '.join(args.train_data)}: {bare} groups have no negatives, so with --use_inbatch_neg False there is nothing "
            "to compare their queries against; add negatives, drop those groups, or use in-batch negatives"
        )
    others = args.per_device_train_batch_size * (collectives.world_size() if args.negatives_cross_device else 1)
    if args.use_inbatch_neg and others == 1 and (args.train_group_size == 1 or not uniform):
        raise ValueError(
            f"{' '.join(args.train_data)}: one query a batch and groups without negatives leave nothing to compare against; "
            "raise --per_device_train_batch_size, or use several ranks with --negatives_cross_device"
        )


def own_only_spans(data: shard_reader.FinetuneShards) -> tuple[tuple[int, int], ...]:
    """Rows of the input files whose name, without its endings, ends in no_in_batch_neg (the existing trainer's mark)."""
    marked = [s for s in data.manifest["sources"] if Path(s["path"]).name.split(".")[0].endswith("no_in_batch_neg")]
    return tuple((first, last) for first, last in (source["rows"] for source in marked))


def check_teacher(args: FinetuneArguments, data: shard_reader.FinetuneShards, uniform: bool) -> None:
    """Refuse distillation from groups that lack a score or have nothing to distil from."""
    what = f"{' '.join(args.train_data)}: --knowledge_distillation needs negatives, pos_scores and neg_scores in every group"
    if (row := data.first_without_scores()) is not None:
        raise ValueError(f"{what}, and group {row} (from 0) has no scores; score the data with a teacher, or leave it out")
    if not uniform:
        raise ValueError(f"{what}, and {data.manifest['counts']['groups_without_negatives']} have no negatives; leave them out")


def add_adapters(backbone: torch.nn.Module, args: FinetuneArguments) -> None:
    lora.add_adapters(
        backbone,
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        target_modules=args.target_modules,
        name_or_path=args.model_name_or_path,
    )


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


def contrastive_loss(
    vectors_ND: torch.Tensor,
    scale: torch.Tensor | float,
    batch: collate.ContrastiveBatch,
    objective: contrastive.ContrastiveSettings,
    cross_device: bool,
    shares: list[Share] | None = None,
) -> contrastive.LossParts:
    """The loss of this rank's queries, gathering first what other ranks bring.

    vectors_ND: queries, then passages, in the batch's order. shares: of every rank, where other ranks' passages count.
    """
    q_BD, p_PD = vectors_ND[: batch.queries], vectors_ND[batch.queries :]
    hashes_P, own_BG, device = batch.hashes_P, batch.own_BG, p_PD.device
    q_CD, mine_B, known_CK = q_BD, torch.arange(len(q_BD), device=device), batch.known_BK
    if cross_device and collectives.world_size() > 1:
        rank = collectives.rank()
        counts = [share.passages for share in shares]
        before = sum(counts[:rank])
        p_PD, hashes_P = collectives.all_gather_rows(p_PD, counts), collectives.all_gather_rows(hashes_P, counts)
        own_BG = torch.where(own_BG < 0, own_BG, own_BG + before)
        if objective.bidirectional:
            missing = max(share.known for share in shares) - known_CK.shape[1]
            known_CK = torch.cat([known_CK, known_CK[:, -1:].expand(-1, missing)], 1)
            mine_B = mine_B + rank * len(q_BD)
            q_CD, known_CK = collectives.all_gather_rows(q_BD), collectives.all_gather_rows(known_CK)
    found = contrastive.Candidates(
        p_PD=p_PD, hashes_P=hashes_P, own_BG=own_BG, known_BK=batch.known_BK, own_only_B=batch.own_only_B,
        teacher_BG=batch.teacher_BG, q_CD=q_CD, mine_B=mine_B, all_known_CK=known_CK,
    )  # fmt: skip
    return contrastive.loss(q_BD, scale, found, objective)


def write_model(engine, tokenizer, args: FinetuneArguments, data: shard_reader.FinetuneShards, folder: Path) -> float:
    """Write the model into an existing empty folder, load it back and compare vectors; on every rank.

    Returns the largest difference found (the same on every rank).
    """
    weights = engines.full_parameters(engine, lambda name: name.startswith("backbone."))
    suffix = len(data.manifest["tokenizer"]["suffix_ids"])
    ids = data.queries(np.arange(1)).cut(args.query_max_len, suffix).split()
    ids += data.passages(np.arange(min(8, data.num_passages))).cut(args.passage_max_len, suffix).split()
    encoder: Encoder = engine.module
    live_ND = encoder.encode_ids(ids)

    def write() -> float:
        own = {name.removeprefix("backbone."): weight for name, weight in weights.items()}
        pooling, normalize = args.sentence_pooling_method, args.normalize_embeddings
        if args.use_lora:
            lora.save_adapter(encoder.backbone, own, folder / lora.FOLDER)
            own = lora.merge(encoder.backbone, own)
        export.save_model(encoder.backbone, own, tokenizer, folder)
        export.write_sentence_transformers(folder, encoder.backbone.config, pooling, normalize, prompts_of(args, data))
        return export.check_saved(folder, ids, live_ND, pooling, normalize, engines.precision(engine))

    return collectives.on_first_rank(write)


def finish(save, output: Path) -> float:
    """The final model into the output folder itself: written aside, checked, then moved, what makes it loadable last."""

    def place(aside: Path) -> None:
        shutil.rmtree(output / lora.FOLDER, ignore_errors=True)  # an older run's would not fit this run's model
        filesystem.merge_folder(aside, output, last=export.ENTRY_FILES)

    return checkpoint.write_aside(output, save, place)


def main(argv: list[str] | None = None) -> int:
    return setup.command(train, parse(FinetuneArguments, argv))


if __name__ == "__main__":
    sys.exit(main())
