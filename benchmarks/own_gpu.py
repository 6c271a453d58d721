"""One part of benchmarks/gpu.sh in a process of its own: measures on the GPU and appends rows to a CSV file.

    python benchmarks/own_gpu.py PART OUT/gpu.csv --data FOLDER [--dry-run]

A dry run goes through every part with toy shapes on the CPU; its figures say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gpu_commands import command
from gpu_peers import padded_finetuning, padded_pretraining, sentence_transformers_finetuning
from gpu_setting import GROUP, WARMUP, Place, full_texts, groups, optimizer_of, shapes
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM

from bge_ds.config.arguments import FinetuneArguments
from bge_ds.data import collate
from bge_ds.kernels import packed
from bge_ds.kernels.decoder_attention import decoder_attention
from bge_ds.kernels.linear_cross_entropy import linear_cross_entropy
from bge_ds.kernels.linear_logsumexp import ExcludedPairs, linear_logsumexp
from bge_ds.modeling.encoder import Encoder, build_backbone
from bge_ds.modeling.flops import backbone_flops
from bge_ds.modeling.retromae import RetroMAE, RetroMAESettings
from bge_ds.objectives import contrastive, retromae
from bge_ds.training import setup


class Engine:
    """What `objectives.contrastive.backward` asks of an engine, by plain torch: 16-bit weights, no optimizer's masters."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.optimizer = type("Optimizer", (), {"_coalesce_grad_reduction": True})()

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, loss: torch.Tensor, **_) -> None:
        loss.backward()

    def coalesce_grad_reduction(self):
        return contextlib.nullcontext()


def ours_finetuning(place: Place, config, batch: collate.ContrastiveBatch, **flags) -> Callable[[], None]:
    pooling = "last_token" if config.model_type == "qwen3" else "cls"
    args = FinetuneArguments.build(
        output_dir="none", train_data="none", model_name_or_path="none", temperature=0.02, train_group_size=GROUP,
        sentence_pooling_method=pooling, per_device_train_batch_size=batch.queries, bf16=not place.dry, **flags,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Encoder(build_backbone(AutoModel, config), pooling).to(place.device, place.dtype).train()
    setup.compile_layers(args, model.backbone)
    engine, objective, optimizer = Engine(model), contrastive.objective_of(args), optimizer_of(model, place)

    def step() -> None:
        contrastive.backward(engine, batch, args, objective, lambda piece: torch.manual_seed(piece))
        optimizer.step()
        optimizer.zero_grad()

    return step


# ------------------------------------------------------------------------------------------------ the parts


def rates(place: Place) -> None:
    """What the card does at most: a large square product, and a copy of a GiB."""
    rate = place.matrix_rate()
    place.row("matrix rate", "torch", 2 * place.size(8192, 128) ** 3 / rate, 0, note=f"{rate / 1e12:.0f} TFLOP/s")
    x = torch.empty(place.size(1 << 29, 1 << 12), dtype=torch.bfloat16, device=place.device)
    y = torch.empty_like(x)
    seconds, _ = place.measure(lambda: y.copy_(x), best=True)
    place.row("memory rate", "torch", seconds, 0, note=f"{2 * x.nbytes / seconds / 1e12:.2f} TB/s read and written")


def finetuning(place: Place, names: list[str], dropout: float, goal: str) -> None:
    """Against the padded loop on the same batch; where that loop's memory does not do, once more on a quarter of it."""
    for name in names:
        for queries in (place.size(64, 4), place.size(16, 2)):
            if finetuning_of(place, name, queries, dropout, goal):
                break


def finetuning_of(place: Place, name: str, queries: int, dropout: float, goal: str) -> bool:
    """The rows of both sides; whether the padded loop got through."""
    config = shapes(place, dropout)[name]
    batch = groups(place, queries, config.vocab_size)
    what, tokens = what_of(name, queries, config, dropout), batch.texts.tokens
    peer = place.attempt(what, "padded, SDPA", partial(padded_finetuning, place, config, batch), steps=3, whole=True)
    if peer is not None:
        place.row(what, "padded, SDPA", *peer, tokens=tokens)
    found = place.attempt(what, "bge_ds", partial(ours_finetuning, place, config, batch), whole=True)
    if found is not None:
        flops = backbone_flops(build_meta(config), batch.texts.runs)
        place.row(what, "bge_ds", *found, tokens=tokens, flops=flops, peer=peer, goal=goal)
    return peer is not None


def what_of(name: str, queries: int, config, dropout: float) -> str:
    return f"fine-tuning, {name}, {queries} x {GROUP}, dropout {dropout if config.model_type == 'bert' else 0}"


def compiled(place: Place) -> None:
    """The same step with --torch_compile, whose first calls compile; our own plain step is the peer."""
    config, queries = shapes(place)["bge-base"], place.size(64, 4)
    batch = groups(place, queries, config.vocab_size)
    what, tokens = what_of("bge-base", queries, config, 0.1), batch.texts.tokens
    peer = place.attempt(what, "bge_ds", partial(ours_finetuning, place, config, batch), whole=True)
    make = partial(ours_finetuning, place, config, batch, torch_compile=True)
    found = place.attempt(what, "bge_ds, compiled", make, whole=True)
    if found is not None:
        flops = backbone_flops(build_meta(config), batch.texts.runs)
        place.row(what, "bge_ds, compiled", *found, tokens=tokens, flops=flops, peer=peer, goal="faster than uncompiled")


def against_sentence_transformers(place: Place) -> None:
    """Its ranking loss, whole and in pieces of several sizes; our row is compared with the fastest of them."""
    for name in ("bge-base", "bge-large"):
        config = shapes(place)[name]
        batch = groups(place, place.size(64, 4), config.vocab_size)
        what, tokens, best = what_of(name, batch.queries, config, 0.1), batch.texts.tokens, None
        for pieces_of in (None, place.size(16_384, 60), place.size(65_536, 200)):
            side = f"sentence-transformers, {'whole' if pieces_of is None else f'pieces of {pieces_of} tokens'}"
            make = partial(sentence_transformers_finetuning, place, config, batch, pieces_of)
            found = place.attempt(what, side, make, steps=3, whole=True)
            if found is not None:
                place.row(what, side, *found, tokens=tokens)
                best = found if best is None else min(best, found)
        found = place.attempt(what, "bge_ds", partial(ours_finetuning, place, config, batch), whole=True)
        if found is not None:
            place.row(what, "bge_ds", *found, tokens=tokens, peer=best, goal="1.5 x its best setting, no more memory")


def build_meta(config) -> nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(config)


def pieces(place: Place) -> None:
    """A batch of 8,192 queries in pieces against one of 256 in pieces, and against the rate of a plain step of 64.

    The large one takes some 20 s: it is measured once, after the others have warmed up what it needs.
    """
    config = shapes(place)["bge-base"]
    small, large, found = place.size(256, 4), place.size(8192, 16), {}
    for queries in (place.size(64, 3), small, large):
        batch = groups(place, queries, config.vocab_size, place.size(65_536, 100) if queries >= small else None)
        step = ours_finetuning(place, config, batch)
        often = {"steps": 1, "warmup": 0} if queries == large else {"steps": 3}
        found[queries] = place.measure(step, whole=True, **often), batch.texts.tokens
        del step
    ((plain, _), plain_tokens), (peer, peer_tokens), (ours, tokens) = found.values()
    place.row("in pieces, bge-base, 256 queries", "bge_ds", *peer, tokens=peer_tokens)
    share = tokens / ours[0] / (plain_tokens / plain)
    place.row("in pieces, bge-base, 8,192 queries", "bge_ds", *ours, tokens=tokens, peer=peer,
              note=f"{share:.2f} of the plain step's tokens a second",
              goal="memory <= 1.2 x that of 256; 0.45 of the plain step's rate")  # fmt: skip


def ours_pretraining(place: Place, config, batch: collate.PretrainBatch) -> Callable[[], None]:
    torch.manual_seed(0)
    model = RetroMAE(build_backbone(AutoModelForMaskedLM, config), RetroMAESettings(4)).to(place.device, place.dtype).train()
    optimizer = optimizer_of(model, place)
    targets = retromae.divisors([batch], [retromae.count_targets([batch])])[0]
    on_device = batch.to(place.device)

    def step() -> None:
        retromae.weighted(model(on_device), 0.1, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops_of(config, batch: collate.PretrainBatch) -> float:
    """Floating-point operations of a pre-training step."""
    with torch.device("meta"):
        model = RetroMAE(build_backbone(AutoModelForMaskedLM, config), RetroMAESettings(4))
    return model.flops(batch.texts.runs) + model.flops_a_prediction * (len(batch.masked_M) + batch.targets[1])


def pretraining(place: Place, names: list[str]) -> None:
    goal = "50 % of the matrix rate; 3 x the padded one; 1/4 of its memory"
    for name in names:
        config = shapes(place)[name]
        batch = full_texts(place, config)
        what, tokens, peer = f"RetroMAE, {name}, {len(batch.keys_N)} x {place.size(512, 24)}", batch.texts.tokens, None
        if config.model_type == "bert":
            side = "padded, SDPA, all logits"
            peer = place.attempt(what, side, partial(padded_pretraining, place, config, batch), steps=3, whole=True)
            if peer is not None:
                place.row(what, side, *peer, tokens=tokens)
        found = place.attempt(what, "bge_ds", partial(ours_pretraining, place, config, batch), whole=True)
        if found is not None:
            flops = flops_of(config, batch)
            place.row(what, "bge_ds", *found, tokens=tokens, flops=flops, peer=peer, goal=goal)


def kernels(place: Place) -> None:
    heads, width = place.size(12, 2), place.size(64, 16)
    for length in (place.size(512, 20), place.size(2048, 40)):
        count = max(1, place.size(16_384, 80) // length)
        texts, _ = packed.pack([np.full(length, 7)] * count)
        texts = texts.to(place.device)
        keys_N = torch.arange(count, device=place.device) * 7919
        sizes = [count * (length - 2), texts.tokens, texts.tokens]
        q, k, v = (torch.randn(n, heads, width, device=place.device, dtype=place.dtype).requires_grad_() for n in sizes)
        full = [
            torch.randn(count, heads, length, width, device=place.device, dtype=place.dtype).requires_grad_() for _ in "qkv"
        ]
        mask = torch.rand(count, 1, length, length, device=place.device) < 0.5
        flops = 6 * 2.0 * texts.tokens * length * heads * width

        def ours(q=q, k=k, v=v, keys_N=keys_N, texts=texts):
            out = decoder_attention(q, k, v, texts.positions_T, keys_N, texts.cu_seqlens, texts.runs, share=0.5)
            out.backward(out.detach())

        def sdpa(full=full, mask=None):
            out = F.scaled_dot_product_attention(*full, attn_mask=mask)
            out.backward(out.detach())

        masked = place.measure(lambda: sdpa(mask=mask))  # noqa: B023
        what = f"decoder attention, L {length}"
        place.row(what, "SDPA with a mask", *masked, flops=flops)
        place.row(what, "FlashAttention without one", *place.measure(sdpa), flops=flops)
        place.row(what, "bge_ds", *place.measure(ours), flops=flops, peer=masked, goal="2 x SDPA with a mask")
    rows, features = place.size(16_384, 40), place.size(768, 16)
    for vocabulary in (place.size(30_522, 100), place.size(250_002, 300)):
        x, w = (torch.randn(n, features, device=place.device, dtype=place.dtype).requires_grad_() for n in (rows, vocabulary))
        bias = torch.zeros(vocabulary, device=place.device, dtype=place.dtype).requires_grad_()
        target = torch.randint(vocabulary, (rows,), device=place.device)
        found = place.measure(lambda: linear_cross_entropy(x, w, target, bias)[0].backward())  # noqa: B023
        goal = f"60 % of the matrix rate; {rows * vocabulary * 10 / 8 / 2**20:.0f} MiB"
        place.row(f"linear cross entropy, {rows} x {vocabulary}", "bge_ds", *found, flops=6.0 * rows * vocabulary * features,
                  goal=goal)  # fmt: skip
    queries, passages, features = place.size(8192, 20), place.size(65_536, 160), place.size(1024, 16)
    x, w = (torch.randn(n, features, device=place.device).requires_grad_() for n in (queries, passages))
    hashes_P, first_B = torch.arange(passages, device=place.device), torch.arange(0, passages, GROUP, device=place.device)
    excluded = ExcludedPairs(first_B, torch.full_like(first_B, GROUP), hashes_P[first_B, None], hashes_P[:, None])
    found = place.measure(lambda: linear_logsumexp(x, w, excluded, narrow=torch.bfloat16)[0].sum().backward())
    place.row(f"contrastive loss, {queries} x {passages} x {features}", "bge_ds", *found,
              flops=8.0 * queries * passages * features, goal="60 % of the matrix rate")  # fmt: skip


def profile(place: Place) -> None:
    """The kernels that take most of a step's time, and the share of it in which the GPU idles, of both commands."""
    config = shapes(place)["bge-base"]
    batch = groups(place, place.size(64, 4), config.vocab_size)
    profile_of(place, "fine-tuning", ours_finetuning(place, config, batch))
    texts = full_texts(place, config)
    profile_of(place, "pre-training", ours_pretraining(place, config, texts))


def profile_of(place: Place, what: str, step: Callable[[], None]) -> None:
    for _ in range(WARMUP):
        step()
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([] if place.dry else [torch.profiler.ProfilerActivity.CUDA])
    with torch.profiler.profile(activities=kinds) as found:
        began = time.perf_counter()
        step()
        if not place.dry:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    order = "self_cpu_time_total" if place.dry else "self_device_time_total"
    events = found.key_averages()
    with (place.file.parent / "profile.txt").open("a", encoding="utf-8") as file:
        file.write(f"{what}, bge-base\n{events.table(sort_by=order, row_limit=30, max_name_column_width=80)}\n")
    busy = sum(getattr(event, order) for event in events if event.device_type.name == ("CPU" if place.dry else "CUDA")) / 1e6
    place.row(f"profile of a {what} step, bge-base", "bge_ds", wall, 0, note=f"idle {max(0.0, 1 - busy / wall):.0%}")


PARTS: dict[str, Callable[[Place], None]] = {
    "rates": rates,
    "large": lambda place: finetuning(
        place, ["bge-large"], 0.1, "50 % of the matrix rate; 4 x the padded loop; 1/3 of its memory"
    ),
    "kernels": kernels,
    "retromae": lambda place: pretraining(place, ["bge-base", "bge-large", "ModernBERT-base"]),
    "others": lambda place: finetuning(place, ["bge-base", "ModernBERT-base", "Qwen3-0.6B"], 0.1, "40 % of the matrix rate"),
    "no_dropout": lambda place: finetuning(place, ["bge-base"], 0.0, "40 % of the matrix rate"),
    "sentence_transformers": against_sentence_transformers,
    "pieces": pieces,
    "compiled": compiled,
    "profile": profile,
    "command": command,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path, help="the CSV file to append to")
    parser.add_argument("--data", type=Path, required=True, help="the folder that gpu_sample.py made")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    PARTS[args.part](Place(args.data, args.out, args.dry_run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
