"""Pre-training by RetroMAE, DupMAE or MLM: `deepspeed --num_gpus N -m bge_ds.pretrain ...` (`--help` lists the flags)."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForMaskedLM

from bge_ds import preprocess
from bge_ds.checkpoint import checkpoint, filesystem
from bge_ds.config.arguments import PretrainArguments, parse
from bge_ds.data import collate
from bge_ds.data.preprocess import validate
from bge_ds.data.shards import shard_reader
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.distributed.communication_profile import Pace
from bge_ds.evaluation import during_training
from bge_ds.health import failure_detector
from bge_ds.kernels.decoder_attention import decoder_attention_backend
from bge_ds.modeling import export
from bge_ds.modeling.encoder import (
    Encoder,
    build_backbone,
    check_lengths,
    check_vocabulary,
    describe_execution,
    load_backbone,
    load_config,
)
from bge_ds.modeling.retromae import LOSSES, RetroMAE, RetroMAESettings, load_decoder, save_decoder
from bge_ds.modeling.vocabulary import check_can_pretrain
from bge_ds.training import data_order, resume, setup
from bge_ds.training.metrics import Meter
from bge_ds.training.nonfinite import SkippedSteps

_AGREE = ("per_device_train_tokens", "max_seq_length", "encoder_mlm_probability", "decoder_mlm_probability", "decoder_query",
          "objective", "bow_loss_weight", "average_tokens_across_devices")  # fmt: skip

_SUMS = (*(f"{name}_loss" for name in LOSSES), "encoder_correct", "decoder_correct")
_COUNTS = tuple(f"{name}_targets" for name in LOSSES)


def train(args: PretrainArguments) -> None:
    started = time.perf_counter()
    setup.set_up(args)
    tokenizer = validate.load_tokenizer(args.tokenizer_name or args.model_name_or_path, args.cache_dir)
    data = open_data(args, tokenizer)
    eval_sets = during_training.open_sets(args)
    model_config = load_config(args.model_name_or_path or args.config_name, cache_dir=args.cache_dir)
    check_can_pretrain(model_config)
    check_lengths(model_config, max_seq_length=args.max_seq_length)
    check_vocabulary(model_config, tokenizer)
    if tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer of {args.tokenizer_name or args.model_name_or_path} has no mask token")

    device = engines.start(use_cpu=args.use_cpu, backend=args.ddp_backend, timeout_s=args.ddp_timeout)
    setup.check_compilation(args, model_config, device)
    taken = resume.take_up(args)
    decoder_attention_backend(args.kernels, device.type)  # what cannot run here is said before anything is loaded
    torch.manual_seed(args.seed)
    model = make_model(args, model_config, tokenizer, data)
    setup.compile_layers(args, model.model.base_model)
    order = data_order.make_order(args, data)
    plan = setup.StepPlan.make(args, order)
    engine, config = setup.build_engine(args, model, plan)
    agreement = resume.agreement(args, data, plan, _AGREE) | {checkpoint.FROZEN: engines.mark_of_frozen(engine)}
    first_step, tokens_seen = resume.resume(args, taken, engine, agreement)
    log = setup.open_log(args, engine, first_step, plan)
    source = args.model_name_or_path or f"from scratch, {args.config_name}"
    facts = [
        ("model", f"{source}, runs {describe_execution(model_config, device, engines.precision(engine))}"),
        ("objective", say_objective(args, model)),
        ("data", f"{len(data)} texts to {args.max_seq_length} tokens"),
        ("sets", data_order.table(args, data, order, plan.total)),
    ]
    log.say(f"pre-training\n{setup.summary(args, plan, order, engine, config, facts)}")
    if taken:
        log.say("\n".join([*taken.notes, f"resumed from {taken.path} at step {first_step}"]))
    batches_of_steps = setup.load_steps(
        args, data, order, collate.collate_texts, device, first_step, plan.total,
        seed=order.seed, max_seq_length=args.max_seq_length, encoder_share=args.encoder_mlm_probability,
    )  # fmt: skip
    write = partial(write_model, engine, tokenizer, data, args.max_seq_length)
    output = Path(args.output_dir)
    probe = Encoder(engine.module.model.base_model, "cls", normalize=True)
    evaluations = during_training.prepare(
        args, eval_sets, tokenizer, probe, device, plan, log, taken and taken.path,
        query_max_len=args.max_seq_length, passage_max_len=args.max_seq_length,
    )  # fmt: skip

    meter = Meter(device, args.logging_nan_inf_filter)
    nonfinite = SkippedSteps(args.max_nonfinite_steps, output, engine, tokenizer, log.say)
    resume.restore_meter(meter, nonfinite, taken)
    pace = Pace(device, log.say)
    saver = resume.Saver(
        args, engine, agreement, resume.asked_batch(args, taken), write, log, meter, nonfinite, started,
        publish=lambda folder: publish(partial(copy_model, folder), output),
    )  # fmt: skip
    engine.train()
    pace.begin()
    over_all = args.average_tokens_across_devices
    counted = collectives.exchange_ahead(batches_of_steps, count_targets if over_all else lambda _: [], device)
    for step, (micro_batches, counts_R) in enumerate(counted, start=first_step + 1):
        pace.loaded()
        learning_rate = engine.get_lr()[0]
        micro_batches = [batch.to(device) for batch in micro_batches]
        targets = divisors(micro_batches, counts_R if over_all else None)
        sums_5 = torch.zeros(5, device=device)
        for micro, (batch, targets_3) in enumerate(zip(micro_batches, targets, strict=True)):
            setup.seed_step(args.seed, step, micro)
            losses_5 = engine(batch)
            loss = weighted(losses_5, args.bow_loss_weight, targets_3)
            engine.backward(engines.all_or_nothing(loss), scale_wrt_gas=False)
            applied = engines.take_step(engine)
            sums_5 += losses_5.detach()
        pace.end(sum(b.texts.tokens for b in micro_batches))
        nonfinite.saw(step, applied, sums_5[:3].sum(), micro_batches)
        if not applied:
            sums_5 = sums_5.masked_fill(sums_5 != 0, math.nan)  # what the objective has not stays 0
        meter.add(
            **dict(zip(_SUMS, sums_5, strict=True)),
            **dict(zip(_COUNTS, count_targets(micro_batches), strict=True)),
            tokens=sum(b.texts.tokens for b in micro_batches),
            padded_tokens=sum(b.texts.padded_tokens for b in micro_batches),
            flops=sum(model.flops(b.texts.runs) for b in micro_batches),
        )  # fmt: skip
        tokens_seen += sum(b.texts.tokens for b in micro_batches)
        log.advance()
        setup.empty_cache(args, step, device)
        if plan.logs(step):
            sums = meter.read()
            sums["flops"] += model.flops_a_prediction * (sums["encoder_targets"] + sums["decoder_targets"])
            log.write(
                {
                    "step": step,
                    "epoch": plan.epoch(step),
                    **losses_of(sums, args.bow_loss_weight),
                    "masked_share": sums["encoder_targets"] / sums["tokens"],
                    **({"hidden_share": model.hidden_share(micro_batches[-1])} if model.decoder else {}),
                    "learning_rate": learning_rate,
                    "grad_norm": engines.gradient_norm(engine),
                    **setup.rates(args, engine, device, sums, tokens_seen, nonfinite, pace),
                    **saver.record(),
                }
            )
        to_save = evaluations.at(step, meter)
        stops = failure_detector.last_step(step) == step < plan.total
        if plan.saves(step) or to_save or (stops and not args.save_only_model):
            saver.save(step, tokens_seen, evaluations.judge(step))
            engine.train()
        if stops:
            setup.stop(args, step)
        pace.begin()

    difference = publish(evaluations.result(write), output)
    log.close()
    log.say(
        f"done in {time.perf_counter() - started:.0f} s: the encoder is in {output / 'encoder_model'}\n"
        f"  {evaluations.say_result(difference)}\n  {saver.say_total()}"
    )


def open_data(args: PretrainArguments, tokenizer) -> shard_reader.PretrainShards:
    """The shards, made from JSON lines where they must be; a length not given is the shards'."""
    paths, weights = data_order.split_weights(args.train_data)
    folders = preprocess.prepare_all(
        "pretrain", paths, tokenizer, bool(weights or args.mixing_temperature),
        max_seq_length=args.max_seq_length, word_segmenter=args.word_segmenter, explicit=args.explicit,
        cache_dir=args.cache_dir, on_error=args.on_error, verify_data=args.verify_data,
        say=print if setup.is_first_on_host() else setup.silent,
    )  # fmt: skip
    data = shard_reader.open_folders(folders)
    if "max_seq_length" not in args.explicit:
        args.max_seq_length = data.manifest["max_seq_length"]
    return data


def make_model(args: PretrainArguments, config, tokenizer, data: shard_reader.PretrainShards) -> RetroMAE:
    """The encoder (loaded, or from scratch) with a decoder: the one saved beside the encoder, or a random one."""
    if args.model_name_or_path:
        with engines.sharded_loading(args.deepspeed, bf16=args.bf16, fp16=args.fp16):
            encoder = load_backbone(AutoModelForMaskedLM, args.model_name_or_path, config=config, cache_dir=args.cache_dir)
    else:
        encoder = build_backbone(AutoModelForMaskedLM, config)
        start_at_frequencies(encoder.get_output_embeddings().bias, data)
    if args.gradient_checkpointing:
        options = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    settings = RetroMAESettings(
        tokenizer.mask_token_id, args.encoder_mlm_probability, args.decoder_mlm_probability, args.decoder_query, args.objective
    )
    model = RetroMAE(encoder, settings, args.kernels)
    beside = Path(args.model_name_or_path).parent if args.model_name_or_path else None
    if model.decoder is not None and beside is not None and (beside / "decoder.safetensors").is_file():
        load_decoder(model.decoder, beside)
    return model


def start_at_frequencies(bias: torch.Tensor, data: shard_reader.PretrainShards, tokens: int = 1 << 21) -> None:
    """Set a new vocabulary head's bias to the log frequencies of the (first two million) tokens.

    From scratch, a head first learns how frequent each token is, and with tied weights it does so by pushing the
    embeddings of all rare tokens the same way, which costs a short run more than it ever gains. A bias that knows the
    frequencies leaves the embeddings free.
    """
    counts = np.ones(bias.numel())
    for first in range(0, len(data), 1024):
        if counts.sum() >= tokens:
            break
        ids, _ = data.texts(np.arange(first, min(first + 1024, len(data))))
        counts += np.bincount(ids.values, minlength=bias.numel())
    with torch.no_grad():
        bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))


def losses_of(sums: dict[str, float], bow_weight: float) -> dict[str, float]:
    """The record's losses and accuracies; of what the objective has not (no loss was added up), nothing."""
    record, loss = {}, 0.0
    for name, weight in zip(LOSSES, (1.0, 1.0, bow_weight), strict=True):
        targets = max(1, sums[f"{name}_targets"])
        if name != "encoder" and not sums[f"{name}_loss"]:
            continue
        record[f"{name}_loss"] = sums[f"{name}_loss"] / targets
        loss += weight * record[f"{name}_loss"]
        if name != "bow":
            record[f"{name}_accuracy"] = sums[f"{name}_correct"] / targets
    return {"loss": loss, **record}


def say_objective(args: PretrainArguments, model: RetroMAE) -> str:
    """In words, for the summary."""
    words = f"{args.objective}: {args.encoder_mlm_probability:.0%} of the words masked"
    if model.decoder is not None:
        kernels = decoder_attention_backend(args.kernels, next(model.parameters()).device.type)
        words += f", {args.decoder_mlm_probability:.0%} hidden from each decoder row ({kernels} attention)"
    return words + (f", bag of words x {args.bow_loss_weight:g}" if args.objective == "dupmae" else "")


def count_targets(micro_batches: list[collate.PretrainBatch]) -> list[int]:
    """How many terms each of this rank's three losses has in the step."""
    return [sum(counts) for counts in zip(*(batch.targets for batch in micro_batches), strict=True)]


def divisors(micro_batches: list[collate.PretrainBatch], counts_R: list[list[int]] | None) -> list[list[float]]:
    """What each micro batch's three sums are divided by.

    With the counts of every rank: the terms of the step, of all ranks and accumulation steps, over the number of ranks
    (DeepSpeed's mean over ranks multiplies it back). Without: the micro batch's own, times the accumulation steps.
    """
    if counts_R is not None:
        total_3 = [max(1e-9, sum(counts) / len(counts_R)) for counts in zip(*counts_R, strict=True)]
        return [total_3] * len(micro_batches)
    return [[max(1, count) * len(micro_batches) for count in batch.targets] for batch in micro_batches]


def weighted(losses_5: torch.Tensor, bow_weight: float, targets_3: list[float]) -> torch.Tensor:
    """The loss to go back from: the three sums, each over its number of terms in the whole step.

    With DeepSpeed's mean over ranks and without its division by the accumulation steps, its gradient is that of one
    process with the whole batch. Plain numbers, not tensors: copying them to a GPU would wait for it.
    """
    encoder, decoder, bow = (losses_5[k] / targets_3[k] for k in range(3))
    return encoder + decoder + bow_weight * bow


def write_model(engine, tokenizer, data: shard_reader.PretrainShards, max_seq_length: int, folder: Path) -> float:
    """Write `encoder_model/` and the decoder into an existing folder, load it back and compare vectors; on every rank."""
    weights = engines.full_parameters(engine)
    model: RetroMAE = engine.module
    suffix = len(data.manifest["tokenizer"]["suffix_ids"])
    ids = data.texts(np.arange(min(8, len(data))))[0].cut(max_seq_length, suffix).split()
    live_ND = Encoder(model.model.base_model, "cls", normalize=False).encode_ids(ids)

    def write() -> float:
        encoder = {k.removeprefix("model."): w for k, w in weights.items() if k.startswith("model.")}
        decoder = {k.removeprefix("decoder."): w for k, w in weights.items() if k.startswith("decoder.")}
        export.save_model(model.model, encoder, tokenizer, folder / "encoder_model")
        save_decoder(decoder, model.settings, folder)
        return export.check_saved(folder / "encoder_model", ids, live_ND, "cls", False, engines.precision(engine))

    return collectives.on_first_rank(write)


def copy_model(checkpoint_folder: Path, folder: Path) -> None:
    """A checkpoint's model (already checked) into an existing folder."""
    if collectives.rank() == 0:
        checkpoint.copy_model(checkpoint_folder, folder)


def publish(write, output: Path) -> float | None:
    """The model as it is now into OUTPUT/encoder_model, and the decoder beside it, replacing the last ones."""

    def place(aside: Path) -> None:
        filesystem.replace_folder(aside / "encoder_model", output / "encoder_model")
        filesystem.merge_folder(aside, output, last=())

    return checkpoint.write_aside(output, write, place)


def main(argv: list[str] | None = None) -> int:
    return setup.command(train, parse(PretrainArguments, argv))


if __name__ == "__main__":
    sys.exit(main())
