"""One part of benchmarks/gpu.sh in a process of its own: measures on the GPU and appends rows to a CSV file.

    python benchmarks/own_gpu.py sample FOLDER --groups groups.jsonl.gz --model TOKENIZER
    python benchmarks/own_gpu.py PART OUT/gpu.csv --data FOLDER [--dry-run]

`sample` stores lengths of real texts, in tokens: speed depends on them and not on the words, so ids are random. A dry run
goes through every part with toy shapes on the CPU; its figures say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gzip
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, ModernBertConfig, Qwen3Config

from bge_ds import finetune, pretrain
from bge_ds.arguments import FinetuneArguments
from bge_ds.data import batches
from bge_ds.kernels.decoder_attention import decoder_attention
from bge_ds.kernels.linear_cross_entropy import linear_cross_entropy
from bge_ds.kernels.linear_logsumexp import Excluded, linear_logsumexp
from bge_ds.modeling.encoder import Encoder, build_backbone
from bge_ds.modeling.flops import backbone_flops
from bge_ds.modeling.retromae import RetroMAE, RetroMAESettings

COLUMNS = ("date", "hardware", "versions", "what", "side", "precision", "seconds", "tokens_per_second", "share_of_matrix_rate",
           "peak_MiB", "times_as_fast", "share_of_memory", "goal", "note")  # fmt: skip
GROUP, KEPT, TEXTS = 8, 4096, 1600  # passages a query; groups whose lengths a sample has, and groups in full
WARMUP, STEPS = 3, 6


class Place:
    """Where a part runs, and how large: the GPU, or toy shapes on the CPU."""

    def __init__(self, data: Path, file: Path, dry: bool):
        self.dry, self.file, self.data = dry, file, data
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.lengths = json.loads((data / "lengths.json").read_text())
        self.rate: float | None = None

    def size(self, real: int, toy: int) -> int:
        return toy if self.dry else real

    def matrix_rate(self) -> float:
        """FLOP/s of a large square product, the best of some."""
        if self.rate is None:
            side = self.size(8192, 128)
            a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
            seconds, _ = self.measure(lambda: a @ b, steps=20, best=True)
            self.rate = 2 * side**3 / seconds
        return self.rate

    def measure(
        self, work: Callable[[], object], steps: int = STEPS, best: bool = False, whole: bool = False
    ) -> tuple[float, float]:
        """(seconds of a call, the median or the best of some; MiB at the peak beyond what was there before, or all of it)."""
        if self.dry:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began, 0.0
        for _ in range(WARMUP):
            work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, found = 0 if whole else torch.cuda.memory_allocated(), []
        for _ in range(steps):
            torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        return min(found) if best else statistics.median(found), peak

    def row(self, what: str, side: str, seconds: float, peak: float, *, tokens: float = 0.0, flops: float = 0.0,
            peer: tuple[float, float] | None = None, goal: str = "", note: str = "") -> None:  # fmt: skip
        """One row, written at once: a run that is cut off keeps what it has. peer: its seconds and peak."""
        values = {
            "date": datetime.date.today().isoformat(),
            "hardware": "a dry run" if self.dry else torch.cuda.get_device_name(),
            "versions": f"torch {torch.__version__} transformers {transformers.__version__}",
            "what": what, "side": side, "precision": str(self.dtype).removeprefix("torch."), "seconds": f"{seconds:.4g}",
            "tokens_per_second": f"{tokens / seconds:.0f}" if tokens else "",
            "share_of_matrix_rate": f"{flops / seconds / self.matrix_rate():.3f}" if flops else "",
            "peak_MiB": f"{peak:.0f}", "goal": goal, "note": note,
            "times_as_fast": f"{peer[0] / seconds:.2f}" if peer else "",
            "share_of_memory": f"{peak / peer[1]:.2f}" if peer and peer[1] else "",
        }  # fmt: skip
        new = not self.file.is_file()
        with self.file.open("a", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(values)
        print("  ".join(str(values[name]) for name in COLUMNS[3:] if values[name]), flush=True)


# ------------------------------------------------------------------------------------------------ models and batches


def shapes(place: Place, dropout: float = 0.1) -> dict[str, transformers.PretrainedConfig]:
    """The configs by name; in a dry run all of them are tiny."""
    bert = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if place.dry:
        tiny = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2}  # fmt: skip
        return {
            "bge-base": BertConfig(**tiny, **bert), "bge-large": BertConfig(**tiny, **bert),
            "ModernBERT-base": ModernBertConfig(**tiny, pad_token_id=0, cls_token_id=1, sep_token_id=2),
            "Qwen3-0.6B": Qwen3Config(**tiny, num_key_value_heads=1, head_dim=16),
        }  # fmt: skip
    return {
        "bge-base": BertConfig(**bert),
        "bge-large": BertConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, **bert),
        "ModernBERT-base": ModernBertConfig(),
        "Qwen3-0.6B": Qwen3Config(
            vocab_size=151_669, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        ),
    }  # fmt: skip


def texts_of(lengths: list[int], vocabulary: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(5, vocabulary, length) for length in lengths]


def groups(place: Place, queries: int, vocabulary: int, max_tokens: int | None = None) -> batches.ContrastiveBatch:
    """Queries with their passages, lengths as in the sample (to 64 and 512 tokens)."""
    cap = place.size(512, 24)
    taken = list(itertools.islice(itertools.cycle(place.lengths["groups"]), queries))
    texts = [min(q, 64, cap) for q, _ in taken] + [min(n, cap) for _, passages in taken for n in passages]
    packed, _ = batches.pack(texts_of(texts, vocabulary))
    own_BG = torch.arange(queries * GROUP).view(queries, GROUP)
    hashes_P = torch.arange(queries * GROUP)
    return batches.ContrastiveBatch(
        texts=packed, queries=queries, own_BG=own_BG, hashes_P=hashes_P, known_BK=hashes_P[own_BG[:, :1]],
        own_only_B=torch.zeros(queries, dtype=torch.bool), rows_B=torch.arange(queries),
        bounds=batches.chunk_bounds(packed.runs, None, max_tokens) if max_tokens else None,
    ).to(place.device)  # fmt: skip


class Engine:
    """What `finetune.backward` asks of an engine, by plain torch: 16-bit weights, no optimizer's masters."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.optimizer = type("Optimizer", (), {"_coalesce_grad_reduction": True})()

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, loss: torch.Tensor, **_) -> None:
        loss.backward()

    def coalesce_grad_reduction(self):
        return contextlib.nullcontext()


def optimizer_of(model: nn.Module, place: Place) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=not place.dry or None)


def ours_finetuning(place: Place, config, batch: batches.ContrastiveBatch, **flags) -> Callable[[], None]:
    pooling = "last_token" if config.model_type == "qwen3" else "cls"
    torch.manual_seed(0)
    model = Encoder(build_backbone(AutoModel, config), pooling).to(place.device, place.dtype).train()
    args = FinetuneArguments.build(
        output_dir="none", train_data="none", model_name_or_path="none", temperature=0.02, train_group_size=GROUP,
        sentence_pooling_method=pooling, per_device_train_batch_size=batch.queries, **flags,
    )  # fmt: skip
    engine, objective, optimizer = Engine(model), finetune.objective_of(args), optimizer_of(model, place)

    def step() -> None:
        finetune.backward(engine, batch, args, objective, lambda piece: torch.manual_seed(piece))
        optimizer.step()
        optimizer.zero_grad()

    return step


def padded_finetuning(place: Place, config, batch: batches.ContrastiveBatch) -> Callable[[], None]:
    """The plain loop: a padded model with SDPA, queries and passages apart, cross entropy over all passages."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="sdpa").to(place.device, place.dtype).train()
    optimizer, texts = optimizer_of(model, place), batch.texts
    rows = torch.tensor_split(texts.ids_T.cpu(), texts.cu_seqlens[1:-1].cpu().long())
    rows = [rows[k] for k in texts.place_N.tolist()]
    sides = []
    for part in (rows[: batch.queries], rows[batch.queries :]):
        ids_NL = nn.utils.rnn.pad_sequence(part, batch_first=True)
        real_NL = torch.arange(ids_NL.shape[1])[None] < torch.tensor([len(row) for row in part])[:, None]
        sides.append((ids_NL.to(place.device), real_NL.long().to(place.device)))
    target_B = torch.arange(batch.queries, device=place.device) * GROUP

    def step() -> None:
        q_BD, p_PD = (F.normalize(model(ids, real).last_hidden_state[:, 0].float(), dim=-1) for ids, real in sides)
        F.cross_entropy(q_BD @ p_PD.T / 0.02, target_B).backward()
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
    for name in names:
        config = shapes(place, dropout)[name]
        batch = groups(place, place.size(64, 4), config.vocab_size)
        what = f"fine-tuning, {name}, 64 x {GROUP}, dropout {dropout if config.model_type == 'bert' else 0}"
        peer = place.measure(padded_finetuning(place, config, batch), steps=3, whole=True)
        place.row(what, "padded, SDPA", *peer, tokens=batch.texts.tokens)
        found = place.measure(ours_finetuning(place, config, batch), whole=True)
        flops = backbone_flops(build_meta(config), batch.texts.runs)
        place.row(what, "bge_ds", *found, tokens=batch.texts.tokens, flops=flops, peer=peer, goal=goal)


def build_meta(config) -> nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(config)


def pieces(place: Place) -> None:
    """A batch of 8,192 queries in pieces against one of 256 in pieces, and against the plain step's rate."""
    config = shapes(place)["bge-base"]
    small, large = place.size(256, 4), place.size(8192, 16)
    found = {}
    for queries in (small, large):
        batch = groups(place, queries, config.vocab_size, place.size(65_536, 100))
        step = ours_finetuning(place, config, batch)
        found[queries] = place.measure(step, steps=1 if queries == large else 3, whole=True), batch.texts.tokens
        del step
    (peer, _), (ours, tokens) = found[small], found[large]
    place.row("in pieces, bge-base, 256 queries", "bge_ds", *peer, tokens=found[small][1])
    goal = "memory <= 1.2 x that of 256"
    place.row("in pieces, bge-base, 8,192 queries", "bge_ds", *ours, tokens=tokens, peer=peer, goal=goal)


def full_texts(place: Place, config) -> batches.PretrainBatch:
    """32 texts of 512 tokens, masked."""
    cap, count = place.size(512, 24), place.size(32, 4)
    texts, order = batches.pack(texts_of([cap] * count, config.vocab_size))
    words_T, keys_N = texts.positions_T, torch.arange(count) * 7919
    masked_M = batches.choose_masked(texts, words_T, keys_N, 0.3)
    return batches.PretrainBatch(texts, words_T, keys_N, torch.from_numpy(order), masked_M)


def ours_pretraining(place: Place, config, batch: batches.PretrainBatch) -> tuple[Callable[[], None], float]:
    """A step, and its floating-point operations."""
    torch.manual_seed(0)
    model = RetroMAE(build_backbone(AutoModelForMaskedLM, config), RetroMAESettings(4)).to(place.device, place.dtype).train()
    optimizer = optimizer_of(model, place)
    targets = pretrain.divisors([batch], [pretrain.count_targets([batch])])[0]
    predicted = len(batch.masked_M) + batch.targets[1]
    on_device = batch.to(place.device)

    def step() -> None:
        pretrain.weighted(model(on_device), 0.1, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model.flops(batch.texts.runs) + model.flops_a_prediction * predicted


def padded_pretraining(place: Place, config, batch: batches.PretrainBatch) -> Callable[[], None]:
    """The plain loop: SDPA with the decoder's masks, logits of all positions."""
    from own_pretraining import PlainRetroMAE, padded

    model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa")
    model.config.output_hidden_states = True
    plain = PlainRetroMAE(model, 4).to(place.device, place.dtype).train()
    rows, optimizer = [x.to(place.device) for x in padded(batch.texts)], optimizer_of(plain, place)

    def step() -> None:
        plain(*rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def pretraining(place: Place, names: list[str]) -> None:
    for name in names:
        config = shapes(place)[name]
        batch = full_texts(place, config)
        what, tokens, peer = f"RetroMAE, {name}, {len(batch.keys_N)} x {place.size(512, 24)}", batch.texts.tokens, None
        if config.model_type == "bert":
            peer = place.measure(padded_pretraining(place, config, batch), steps=3, whole=True)
            place.row(what, "padded, SDPA, all logits", *peer, tokens=tokens)
        step, flops = ours_pretraining(place, config, batch)
        goal = "50 % of the matrix rate; 3 x the padded one; 1/4 of its memory"
        place.row(what, "bge_ds", *place.measure(step, whole=True), tokens=tokens, flops=flops, peer=peer, goal=goal)
        del step


def kernels(place: Place) -> None:
    heads, width = place.size(12, 2), place.size(64, 16)
    for length in (place.size(512, 20), place.size(2048, 40)):
        count = max(1, place.size(16_384, 80) // length)
        texts, _ = batches.pack([np.full(length, 7)] * count)
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
    excluded = Excluded(first_B, torch.full_like(first_B, GROUP), hashes_P[first_B, None], hashes_P[:, None])
    found = place.measure(lambda: linear_logsumexp(x, w, excluded, narrow=torch.bfloat16)[0].sum().backward())
    place.row(f"contrastive loss, {queries} x {passages} x {features}", "bge_ds", *found,
              flops=8.0 * queries * passages * features, goal="60 % of the matrix rate")  # fmt: skip


def profile(place: Place) -> None:
    """The kernels that take most of a step's time, and the share of it in which the GPU idles, of both commands."""
    config = shapes(place)["bge-base"]
    batch = groups(place, place.size(64, 4), config.vocab_size)
    profile_of(place, "fine-tuning", ours_finetuning(place, config, batch))
    texts = full_texts(place, config)
    profile_of(place, "pre-training", ours_pretraining(place, config, texts)[0])


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


def command(place: Place) -> None:
    """The commands themselves, as users run them: engine, loader with one worker, log. The rate of the log's last lines."""
    config, size = shapes(place)["bge-base"], place.size(64, 4)
    common = {
        "model_name_or_path": "model", "per_device_train_batch_size": size, "max_steps": place.size(24, 4),
        "logging_steps": place.size(6, 2),
        "dataloader_num_workers": 1, "save_strategy": "no",
    }  # fmt: skip
    own = {
        "finetune": {"train_data": "groups.jsonl", "train_group_size": GROUP, "query_max_len": 64,
                     "passage_max_len": place.size(512, 24)},
        "pretrain": {"train_data": "texts.jsonl", "max_seq_length": place.size(512, 24)},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        AutoModelForMaskedLM.from_config(config).save_pretrained(model)
        for path in (place.data / "tokenizer").iterdir():
            shutil.copy(path, model)
        lines = list(lines_of(place.data / "groups.jsonl.gz"))[: place.size(TEXTS, 32)]
        with open(Path(folder) / "groups.jsonl", "w", encoding="utf-8") as groups, \
             open(Path(folder) / "texts.jsonl", "w", encoding="utf-8") as texts:  # fmt: skip
            for line in lines:
                groups.write(json.dumps(line) + "\n")
                texts.writelines(json.dumps({"text": text}) + "\n" for text in line["pos"])
        for name, flags in own.items():
            given = common | flags | {"output_dir": name}
            words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
            words += ["--use_cpu"] if place.dry else ["--bf16"]
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", f"bge_ds.{name}", *words], cwd=folder, capture_output=True, text=True, check=False
            )
            took = time.perf_counter() - began
            (place.file.parent / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
            if done.returncode:
                raise SystemExit(f"{name} ended with status {done.returncode}\n{done.stderr[-3000:]}")
            records = [json.loads(line) for line in (Path(folder) / name / "metrics.jsonl").read_text().splitlines()]
            rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r][1:]
            place.row(f"the {name} command, bge-base, real texts", "bge_ds", 1.0, 0, tokens=statistics.median(rates),
                      note=f"{took:.0f} s in all")  # fmt: skip


PARTS: dict[str, Callable[[Place], None]] = {
    "rates": rates,
    "large": lambda place: finetuning(
        place, ["bge-large"], 0.1, "50 % of the matrix rate; 4 x the padded loop; 1/3 of its memory"
    ),
    "kernels": kernels,
    "retromae": lambda place: pretraining(place, ["bge-base", "bge-large", "ModernBERT-base"]),
    "others": lambda place: finetuning(place, ["bge-base", "ModernBERT-base", "Qwen3-0.6B"], 0.1, "40 % of the matrix rate"),
    "no_dropout": lambda place: finetuning(place, ["bge-base"], 0.0, "40 % of the matrix rate"),
    "pieces": pieces,
    "profile": profile,
    "command": command,
}


# ------------------------------------------------------------------------------------------------ the sample


def lines_of(path: Path) -> Iterator[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, itertools.islice(file, KEPT))


def write_sample(folder: Path, groups: Path, model: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def lengths(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]

    found = []
    for line in lines_of(groups):
        passages = [line["pos"][0], *itertools.islice(itertools.cycle(line["neg"] or line["pos"]), GROUP - 1)]
        found.append((lengths([line["query"]])[0], lengths(passages)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lengths.json").write_text(json.dumps({"groups": found}), encoding="utf-8")
    with gzip.open(folder / "groups.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in itertools.islice(lines_of(groups), TEXTS))
    tokenizer.save_pretrained(folder / "tokenizer")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(found)} groups, {size / 2**20:.1f} MiB in {folder}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*PARTS, "sample"])
    parser.add_argument("out", type=Path, help="the CSV file to append to; of `sample`, a folder")
    parser.add_argument("--data", type=Path, help="the folder that `sample` made")
    parser.add_argument("--groups", type=Path, help="of `sample`: JSON lines of groups, may be .gz")
    parser.add_argument("--model", help="of `sample`: a folder with a tokenizer")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if args.part == "sample":
        write_sample(args.out, args.groups, args.model)
    else:
        PARTS[args.part](Place(args.data, args.out, args.dry_run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
