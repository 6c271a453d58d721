"""Contrastive fine-tuning: `deepspeed --num_gpus N -m bge_ds.finetune ...` (`--help` lists the flags)."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig

from bge_ds import preprocess, run
from bge_ds.arguments import FinetuneArguments, parse
from bge_ds.data import batches, records, shards
from bge_ds.distributed import checkpoint, collectives
from bge_ds.distributed import engine as engines
from bge_ds.metrics import Meter
from bge_ds.modeling import contrastive, export
from bge_ds.modeling.encoder import Encoder, check_lengths, say_how

_AGREE = ("train_group_size", "query_max_len", "passage_max_len", "negatives_cross_device", "use_inbatch_neg",
          "temperature", "normalize_embeddings", "sentence_pooling_method", "mask_false_negatives")  # fmt: skip


def train(args: FinetuneArguments) -> None:
    started = time.perf_counter()
    resume = run.set_up(args)
    tokenizer = records.load_tokenizer(args.tokenizer_name or args.model_name_or_path, args.cache_dir)
    data = open_data(args, tokenizer)
    model_config = AutoConfig.from_pretrained(args.config_name or args.model_name_or_path, cache_dir=args.cache_dir)
    check_lengths(model_config, query_max_len=args.query_max_len, passage_max_len=args.passage_max_len)

    device = engines.start(use_cpu=args.use_cpu, backend=args.ddp_backend, timeout_s=args.ddp_timeout)
    torch.manual_seed(args.seed)
    model = Encoder.load(
        args.model_name_or_path, args.sentence_pooling_method, args.normalize_embeddings,
        config=model_config, cache_dir=args.cache_dir,
    )  # fmt: skip
    freeze_and_checkpoint(model.backbone, args)
    order = run.make_order(args, data.manifest, args.max_example_num_per_dataset)
    plan = run.StepPlan.make(args, order)
    uniform = not has_bare_groups(data)
    check_comparable(args, data, order, uniform)
    engine, config = run.build_engine(args, model, plan)
    agreement = run.agreement(args, data, config, plan, _AGREE)
    first_step, tokens_seen = run.resume(args, resume, engine, agreement)
    log = run.open_log(args, engine, first_step, plan)
    ranks = collectives.world_size() if args.negatives_cross_device else 1
    passages = args.per_device_train_batch_size * args.train_group_size * ranks
    negatives = (passages if args.use_inbatch_neg else args.train_group_size) - 1
    facts = [
        ("model", f"{args.model_name_or_path}, runs {say_how(model_config)}"),
        ("data", f"{len(data)} groups, {data.num_passages} passages"),
        ("lengths", f"queries to {args.query_max_len}, passages to {args.passage_max_len} tokens"),
        ("negatives", f"{'' if uniform else 'up to '}{negatives} a query" + (" from all ranks" if ranks > 1 else "")),
    ]  # fmt: skip
    log.say(f"fine-tuning\n{run.summary(args, plan, order, engine, config, facts)}")
    if args.gradient_accumulation_steps > 1 and args.use_inbatch_neg:
        log.say("warning: accumulation adds no negatives; a larger batch on each rank does")
    if resume:
        log.say(f"resumed from {resume} at step {first_step}")
    batches_of_steps = run.load_steps(
        args, data, order, batches.collate_groups, device, first_step, plan.total,
        seed=order.seed, group_size=args.train_group_size,
        query_max_len=args.query_max_len, passage_max_len=args.passage_max_len,
    )  # fmt: skip
    save = partial(write_model, engine, tokenizer, args, data)

    meter = Meter(device, args.logging_nan_inf_filter)
    engine.train()
    for step, micro_batches in enumerate(batches_of_steps, start=first_step + 1):
        learning_rate = engine.get_lr()[0]
        loss_sum, negatives_sum, hidden_sum = 0.0, 0, 0
        for micro, batch in enumerate(micro_batches):
            batch = batch.to(device)
            run.seed_step(args.seed, step, micro)
            vectors = engine(batch.texts)
            loss, compared, hidden = contrastive_loss(vectors, batch, args, uniform)
            engine.backward(loss)
            engine.step()
            loss_sum, hidden_sum = loss_sum + loss.detach(), hidden_sum + hidden
            negatives_sum = negatives_sum + batch.queries * (compared - 1) - hidden
        meter.add(
            loss=loss_sum / len(micro_batches),
            negatives=negatives_sum,
            hidden=hidden_sum,
            tokens=sum(b.texts.tokens for b in micro_batches),
            padded_tokens=sum(b.texts.padded_tokens for b in micro_batches),
        )
        tokens_seen += sum(b.texts.tokens for b in micro_batches)
        log.advance()
        run.empty_cache(args, step, device)
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
                "false_negatives_hidden": sums["hidden"] / queries,
                **run.rates(args, engine, device, sums, tokens_seen),
            })  # fmt: skip
            engine.train()
        if plan.saves(step):
            folder = checkpoint.save(
                engine,
                Path(args.output_dir),
                step,
                tokens_seen,
                agreement,
                save,
                keep=args.save_total_limit,
                only_model=args.save_only_model,
            )
            log.say(f"step {step}: saved {folder}")
            engine.train()

    difference = finish(save, Path(args.output_dir))
    log.close()
    log.say(
        f"done in {time.perf_counter() - started:.0f} s: the model is in {args.output_dir}\n"
        f"  loaded back with transformers, its vectors differ from the trained model's by at most {difference:.1e}"
    )


def open_data(args: FinetuneArguments, tokenizer) -> shards.FinetuneShards:
    """The shards, made from JSON lines where they must be; lengths and instructions not given are the shards'."""
    say = print if run.is_first_on_host() else run.silent
    folder = preprocess.prepare(
        "finetune", args.train_data, tokenizer,
        query_max_len=args.query_max_len, passage_max_len=args.passage_max_len,
        query_instruction=args.query_instruction_for_retrieval, passage_instruction=args.passage_instruction_for_retrieval,
        explicit=args.explicit, cache_dir=args.cache_dir, on_error=args.on_error, say=say,
    )  # fmt: skip
    data = shards.open_folder(folder)
    for name in ("query_max_len", "passage_max_len", "query_instruction_for_retrieval", "passage_instruction_for_retrieval"):
        if name not in args.explicit:
            setattr(args, name, data.manifest[name])
    return data


def has_bare_groups(data: shards.FinetuneShards) -> bool:
    """Whether some group has no negatives of its own: ranks may then bring different numbers of passages."""
    return data.manifest["counts"]["groups_without_negatives"] > 0


def check_comparable(args: FinetuneArguments, data: shards.FinetuneShards, order, uniform: bool) -> None:
    """Refuse runs in which a query would have nothing to be compared against (its loss would be 0)."""
    bare = data.manifest["counts"]["groups_without_negatives"]
    if not uniform and not args.use_inbatch_neg:
        raise ValueError(
            f"{args.train_data}: {bare} groups have no negatives, so with --use_inbatch_neg False there is nothing to compare "
            "their queries against; add negatives, drop those groups, or use in-batch negatives"
        )
    others = args.per_device_train_batch_size * (collectives.world_size() if args.negatives_cross_device else 1)
    if args.use_inbatch_neg and others == 1 and (args.train_group_size == 1 or not uniform):
        raise ValueError(
            f"{args.train_data}: one query a batch and groups without negatives leave nothing to compare against; "
            "raise --per_device_train_batch_size, or use several ranks with --negatives_cross_device"
        )


def freeze_and_checkpoint(backbone: torch.nn.Module, args: FinetuneArguments) -> None:
    if args.fix_position_embedding:
        for name, parameter in backbone.named_parameters():
            if "position_embeddings" in name:
                parameter.requires_grad_(False)
    if args.gradient_checkpointing:
        options = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def contrastive_loss(vectors, batch: batches.ContrastiveBatch, args: FinetuneArguments, uniform: bool):
    """(mean loss over this rank's queries, passages each is compared with, how many of those were hidden in all)."""
    q_BD, p_PD = vectors[: batch.queries], vectors[batch.queries :]
    target_B, hashes_P = batch.target_B, batch.hashes_P
    if args.negatives_cross_device and collectives.world_size() > 1:
        counts = None if uniform else collectives.gather_counts(len(p_PD), p_PD.device)
        before = collectives.rank() * len(p_PD) if counts is None else sum(counts[: collectives.rank()])
        p_PD, hashes_P = collectives.all_gather_rows(p_PD, counts), collectives.all_gather_rows(hashes_P, counts)
        target_B = target_B + before
    hidden_BP = None
    if args.mask_false_negatives:
        hidden_BP = contrastive.false_negatives(hashes_P, batch.known_K, batch.known_query_K, target_B)
    if args.use_inbatch_neg:
        loss = contrastive.info_nce(q_BD, p_PD, target_B, args.temperature, hidden_BP)
    else:
        if hidden_BP is not None:
            own_BG = torch.arange(len(p_PD), device=p_PD.device).unflatten(0, (len(q_BD), -1))
            hidden_BP = hidden_BP.gather(1, own_BG)
        loss = contrastive.info_nce_own_group(q_BD, p_PD, args.temperature, hidden_BP)
    compared = len(p_PD) if args.use_inbatch_neg else len(p_PD) // len(q_BD)
    return loss, compared, 0 if hidden_BP is None else hidden_BP.sum()


def write_model(engine, tokenizer, args: FinetuneArguments, data: shards.FinetuneShards, folder: Path) -> float:
    """Write the model into an existing empty folder, load it back and compare vectors; on every rank.

    Returns the largest difference found (the same on every rank).
    """
    weights = engines.full_parameters(engine)
    suffix = len(data.manifest["tokenizer"]["suffix_ids"])
    ids = [batches.cut(data.group(0).query, args.query_max_len, suffix)]
    ids += [batches.cut(data.passage(row), args.passage_max_len, suffix) for row in range(min(8, data.num_passages))]
    encoder: Encoder = engine.module
    live_ND = encoder.encode_ids(ids)

    def write() -> float:
        own = {name.removeprefix("backbone."): weight for name, weight in weights.items()}
        prompts = {
            "query": args.query_instruction_for_retrieval or "",
            "passage": args.passage_instruction_for_retrieval or "",
        }
        pooling, normalize = args.sentence_pooling_method, args.normalize_embeddings
        export.save_model(encoder.backbone, own, tokenizer, folder)
        export.write_sentence_transformers(folder, encoder.backbone.config, pooling, normalize, prompts)
        return export.check_saved(folder, ids, live_ND, pooling, normalize, engines.precision(engine))

    return run.on_first_rank(write)


def finish(save, output: Path) -> float:
    """The final model into the output folder itself: written aside, checked, then moved, what makes it loadable last."""
    aside = output / ("model" + checkpoint.PARTIAL)
    run.fresh_folder(aside)
    difference = save(aside)
    if collectives.rank() == 0:
        checkpoint.merge_folder(aside, output, last=export.ENTRY_FILES)
    collectives.barrier()
    return difference


def main(argv: list[str] | None = None) -> int:
    return run.command(train, parse(FinetuneArguments, argv))


if __name__ == "__main__":
    sys.exit(main())
