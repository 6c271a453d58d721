"""RetroMAE pre-training (arXiv 2205.12035) and DupMAE (arXiv 2211.08769): masked words of the encoder and of a weak decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForMaskedLM

from bge_ds.checkpoint import filesystem
from bge_ds.config.arguments import PretrainArguments
from bge_ds.config.run_config import fill_from_scratch, fill_from_shards
from bge_ds.data import collate
from bge_ds.data.beir import RetrievalSet
from bge_ds.data.preprocess import validate
from bge_ds.data.shards import shard_reader
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.evaluation.evaluators import SearchEvaluator
from bge_ds.kernels.decoder_attention import decoder_attention_backend
from bge_ds.modeling import export, model_card
from bge_ds.modeling.encoder import Encoder, build_backbone, check_lengths, check_vocabulary, load_backbone, load_config
from bge_ds.modeling.retromae import LOSSES, RetroMAE, RetroMAESettings, load_decoder, save_decoder, save_objective
from bge_ds.modeling.vocabulary import check_can_pretrain
from bge_ds.objectives import card, diagnosis
from bge_ds.objectives.shards import open_shards
from bge_ds.training.objective import Objective, Scores, Values

_SUMS = (*(f"{name}_loss" for name in LOSSES), "encoder_correct", "decoder_correct")
_COUNTS = tuple(f"{name}_targets" for name in LOSSES)


class RetroMAEObjective(Objective):
    title = "pre-training"
    loss_names = _SUMS
    resume_names = (
        "per_device_train_tokens", "max_seq_length", "encoder_mlm_probability", "decoder_mlm_probability", "decoder_query",
        "objective", "bow_loss_weight", "average_tokens_across_devices"
    )  # fmt: skip
    publishes_checkpoints = True

    def __init__(self, args: PretrainArguments):
        name = args.tokenizer_name or args.model_name_or_path
        self.tokenizer = validate.load_tokenizer(name, args.cache_dir)
        self.data: shard_reader.PretrainShards = open_shards(
            "pretrain", args, self.tokenizer, max_seq_length=args.max_seq_length, word_segmenter=args.word_segmenter
        )
        self.args: PretrainArguments = fill_from_shards(args, self.data.manifest, ("max_seq_length",))
        self.model_config = load_config(args.model_name_or_path or args.config_name, cache_dir=args.cache_dir)
        if not args.model_name_or_path:
            self.args = fill_from_scratch(self.args, self.model_config.hidden_size)
        check_can_pretrain(self.model_config)
        check_lengths(self.model_config, max_seq_length=self.args.max_seq_length)
        check_vocabulary(self.model_config, self.tokenizer)
        if self.tokenizer.mask_token_id is None:
            raise ValueError(f"the tokenizer of {name} has no mask token")

    def build_model(self, device: torch.device) -> nn.Module:
        decoder_attention_backend(self.args.kernels, device.type)  # refuses what cannot run here
        self.model = make_model(self.args, self.model_config, self.tokenizer)
        self.new_head = start_at_frequencies(self.model.model.get_output_embeddings().bias, self.data)
        return self.model

    def backbone(self, model: nn.Module) -> nn.Module:
        return model.model.base_model

    def facts(self, runs: str) -> list[tuple[str, str]]:
        args = self.args
        return [
            ("model", f"{args.model_name_or_path or f'from scratch, {args.config_name}'}, runs {runs}"),
            ("objective", say_objective(args, self.model)),
            *([("new head", "its bias starts at the log frequencies of the tokens")] if self.new_head else []),
            ("data", f"{len(self.data)} texts to {args.max_seq_length} tokens"),
        ]

    def warnings(self, eval_sets: Mapping[str, RetrievalSet], epochs: float) -> list[str]:
        encoder = self.model.model.base_model
        return diagnosis.of_pretraining(self.args, self.data, engines.count_elements(encoder), epochs)

    def collate(self, seed: int) -> tuple[Callable, dict]:
        args = self.args
        return collate.collate_texts, dict(
            seed=seed, max_seq_length=args.max_seq_length, encoder_share=args.encoder_mlm_probability
        )

    def counts_to_exchange(self, micro_batches: list) -> list[int]:
        return count_targets(micro_batches) if self.args.average_tokens_across_devices else []

    def shares(self, micro_batches: list, counts_R: list[list[int]]) -> list[list[float]]:
        return divisors(micro_batches, counts_R if self.args.average_tokens_across_devices else None)

    def backward(self, engine, batch, share: list[float], seed: Callable[[int], None]) -> Values:
        seed(0)
        losses_5 = engine(batch)
        loss = weighted(losses_5, self.args.bow_loss_weight, share)
        engine.backward(engines.all_or_nothing(loss), scale_wrt_gas=False)
        return dict(zip((*_SUMS, *_COUNTS), (*losses_5.detach().unbind(), *batch.targets), strict=True))

    def flops(self, model: nn.Module, batch) -> float:
        encoder, decoder, _ = batch.targets
        return model.flops(batch.texts.runs) + model.flops_a_prediction * (encoder + decoder)

    def record(self, sums: dict[str, float], model: nn.Module, batch) -> dict[str, float]:
        return {
            **losses_of(sums, self.args.bow_loss_weight),
            "masked_share": sums["encoder_targets"] / sums["tokens"],
            **({"hidden_share": model.hidden_share(batch)} if model.decoder else {}),
        }

    def evaluator(self, sets: dict[str, RetrievalSet], device: torch.device) -> SearchEvaluator:
        length, batch_size = self.args.max_seq_length, self.args.per_device_eval_batch_size
        return SearchEvaluator(
            sets, self.tokenizer, device, query_max_len=length, passage_max_len=length, batch_size=batch_size
        )

    def evaluated(self, model: nn.Module) -> nn.Module:
        return Encoder(model.model.base_model, "cls", normalize=True)

    def save(self, engine, folder: Path, scores: Scores) -> float:
        """Write `encoder_model/` and the decoder into an existing folder, load it back and compare vectors."""
        weights, model = engines.full_parameters(engine), engine.module
        suffix = len(self.data.manifest.tokenizer.suffix_ids)
        texts = self.data.texts(np.arange(min(8, len(self.data))))[0]
        ids = texts.cut(self.args.max_seq_length, suffix).split()
        live_ND = Encoder(model.model.base_model, "cls", normalize=False).encode_ids(ids)

        def write() -> float:
            encoder = {k.removeprefix("model."): w for k, w in weights.items() if k.startswith("model.")}
            decoder = {k.removeprefix("decoder."): w for k, w in weights.items() if k.startswith("decoder.")}
            export.save_model(model.model, encoder, self.tokenizer, folder / "encoder_model")
            save_objective(self.args.objective, folder / "encoder_model")
            save_decoder(decoder, model.settings, folder)
            text = card.of_pretraining(self.args, self.data, model.model.config, scores)
            (folder / "encoder_model" / model_card.FILE).write_text(text, encoding="utf-8")
            return export.check_saved(folder / "encoder_model", ids, live_ND, "cls", False, engines.precision(engine))

        return collectives.on_first_rank(write)

    def place(self, written: Path, output: Path) -> None:
        """`encoder_model/` is replaced as a whole, the decoder beside it."""
        filesystem.replace_folder(written / "encoder_model", output / "encoder_model")
        filesystem.merge_folder(written, output, last=())

    def model_folder(self, output: Path) -> Path:
        return output / "encoder_model"

    def result(self) -> str:
        return f"the encoder is in {Path(self.args.output_dir) / 'encoder_model'}"


def make_model(args: PretrainArguments, config, tokenizer) -> RetroMAE:
    """The encoder (loaded, or from scratch) with a decoder: the one saved beside the encoder, or a random one."""
    if args.model_name_or_path:
        with engines.sharded_loading(args.deepspeed, bf16=args.bf16, fp16=args.fp16):
            encoder = load_backbone(AutoModelForMaskedLM, args.model_name_or_path, config=config, cache_dir=args.cache_dir)
    else:
        encoder = build_backbone(AutoModelForMaskedLM, config)
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


def start_at_frequencies(bias: nn.Parameter | None, data: shard_reader.PretrainShards, tokens: int = 1 << 21) -> bool:
    """Set an untrained vocabulary head's bias (all zeros) to the log frequencies of the first two million tokens.

    Returns whether it was untrained. A new head first learns how frequent each token is. With tied weights it does so by
    pushing the embeddings of all rare tokens in one direction, which costs a short run more than it gains later
    (docs/pretraining.md has the figures). A bias that knows the frequencies leaves the embeddings free. On every rank.
    """
    if bias is None:
        return False
    with engines.whole(bias), torch.no_grad():
        if bias.any():
            return False
        counts = np.ones(bias.numel())
        for first in range(0, len(data), 1024):
            if counts.sum() >= tokens:
                break
            ids, _ = data.texts(np.arange(first, min(first + 1024, len(data))))
            counts += np.bincount(ids.values, minlength=bias.numel())
        bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))
    return True


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
