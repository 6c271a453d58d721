"""What the parts of benchmarks/gpu.sh share: where they run, the rows they write, shapes of models, batches."""

from __future__ import annotations

import csv
import datetime
import gc
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import BertConfig, ModernBertConfig, Qwen3Config

from bge_ds.data import collate
from bge_ds.kernels import packed

COLUMNS = ("date", "hardware", "versions", "what", "side", "precision", "seconds", "tokens_per_second", "share_of_matrix_rate",
           "peak_MiB", "times_as_fast", "share_of_memory", "goal", "note")  # fmt: skip
GROUP = 8  # passages a query
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
        self, work: Callable[[], object], steps: int = STEPS, warmup: int = WARMUP, best: bool = False, whole: bool = False
    ) -> tuple[float, float]:
        """(seconds of a call, the median or the best of some; MiB at the peak beyond what was there before, or all of it)."""
        if self.dry:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began, 0.0
        for _ in range(warmup):
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

    def attempt(self, what: str, side: str, make: Callable[[], Callable[[], object]], **options) -> tuple[float, float] | None:
        """`measure` of what `make` gives, in a clean memory. Where either fails, a row says why, and the part goes on: None."""
        gc.collect()  # of the side before, modules and their parameters refer to each other
        if not self.dry:
            torch.cuda.empty_cache()
        try:
            return self.measure(make(), **options)
        except Exception as error:
            said = f"failed: {type(error).__name__}: {error}"
            self.row(what, side, note=said.splitlines()[0][:200])
            traceback.print_exc()
            return None

    def row(self, what: str, side: str, seconds: float = 0.0, peak: float = 0.0, *, tokens: float = 0.0, flops: float = 0.0,
            peer: tuple[float, float] | None = None, goal: str = "", note: str = "") -> None:  # fmt: skip
        """One row, written at once: a run that is cut off keeps what it has. peer: its seconds and peak."""
        values = {
            "date": datetime.date.today().isoformat(),
            "hardware": "a dry run" if self.dry else torch.cuda.get_device_name(),
            "versions": f"torch {torch.__version__} transformers {transformers.__version__}",
            "what": what, "side": side, "precision": str(self.dtype).removeprefix("torch."),
            "seconds": f"{seconds:.4g}" if seconds else "",
            "tokens_per_second": f"{tokens / seconds:.0f}" if tokens else "",
            "share_of_matrix_rate": f"{flops / seconds / self.matrix_rate():.3f}" if flops else "",
            "peak_MiB": f"{peak:.0f}" if peak else "", "goal": goal, "note": note,
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


def groups(place: Place, queries: int, vocabulary: int, max_tokens: int | None = None) -> collate.ContrastiveBatch:
    """Queries with their passages, lengths as in the sample (to 64 and 512 tokens)."""
    cap = place.size(512, 24)
    taken = list(itertools.islice(itertools.cycle(place.lengths["groups"]), queries))
    texts = [min(q, 64, cap) for q, _ in taken] + [min(n, cap) for _, passages in taken for n in passages]
    row, _ = packed.pack(texts_of(texts, vocabulary))
    own_BG = torch.arange(queries * GROUP).view(queries, GROUP)
    hashes_P = torch.arange(queries * GROUP)
    return collate.ContrastiveBatch(
        texts=row, queries=queries, own_BG=own_BG, hashes_P=hashes_P, known_BK=hashes_P[own_BG[:, :1]],
        own_only_B=torch.zeros(queries, dtype=torch.bool), rows_B=torch.arange(queries),
        bounds=packed.chunk_bounds(row.runs, None, max_tokens) if max_tokens else None,
    ).to(place.device)  # fmt: skip


def full_texts(place: Place, config) -> collate.PretrainBatch:
    """32 texts of 512 tokens, masked."""
    cap, count = place.size(512, 24), place.size(32, 4)
    texts, order = packed.pack(texts_of([cap] * count, config.vocab_size))
    words_T, keys_N = texts.positions_T, torch.arange(count) * 7919
    masked_M = collate.choose_masked(texts, words_T, keys_N, 0.3)
    return collate.PretrainBatch(texts, words_T, keys_N, torch.from_numpy(order), masked_M)


def optimizer_of(model: nn.Module, place: Place) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=not place.dry or None)
