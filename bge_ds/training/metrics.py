"""What a person sees of a run: sums between two log lines, the progress bar, metrics.jsonl, the monitors."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bge_ds.checkpoint import checkpoint, filesystem
from bge_ds.distributed import collectives

Record = Mapping[str, float | None]  # a line of metrics.jsonl; None where there is no such value


class Meter:
    """Sums of named values since the last reading; those of tensors are kept on the device: adding never waits for it."""

    def __init__(self, device: torch.device, filter_nonfinite: bool = True):
        self.device, self.filter = device, filter_nonfinite
        self._reset()

    def _reset(self) -> None:
        # [sum, how many values it is of] by name: of plain numbers here, of tensors on the device, by the names added together.
        self.on_host: dict[str, list[float]] = {}
        self.on_device: dict[tuple[str, ...], torch.Tensor] = {}
        self.steps = 0
        self.began = time.perf_counter()

    def add(self, **values: torch.Tensor | float) -> None:
        """One optimizer step's values. A value that is not finite counts as the average of the others, where filtered."""
        tensors = {name: value.detach() for name, value in values.items() if isinstance(value, torch.Tensor)}
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                counts = math.isfinite(value) or not self.filter
                self._add_on_host(name, value if counts else 0.0, counts)
        if tensors:
            value_K = torch.stack([value.to(self.device, torch.float64) for value in tensors.values()])
            counts_K = torch.isfinite(value_K) if self.filter else torch.ones_like(value_K, dtype=torch.bool)
            added_2K = torch.stack([value_K.where(counts_K, 0.0), counts_K.double()])
            names = tuple(tensors)
            self.on_device[names] = self.on_device[names] + added_2K if names in self.on_device else added_2K
        self.steps += 1

    def _add_on_host(self, name: str, total: float, counted: float) -> None:
        before = self.on_host.get(name, [0.0, 0.0])
        self.on_host[name] = [before[0] + total, before[1] + counted]

    def _settle(self) -> None:
        """Bring what is on the device to the host, waiting for it."""
        for names, sums_2K in self.on_device.items():
            for name, total, counted in zip(names, *sums_2K.tolist(), strict=True):
                self._add_on_host(name, total, counted)
        self.on_device.clear()

    def keep(self) -> dict:
        """What has been added since the last reading, as plain numbers: for a run that resumes from here."""
        self._settle()
        return {"steps": self.steps, "seconds": time.perf_counter() - self.began, "sums": dict(self.on_host)}

    def go_on(self, kept: Mapping[str, Any]) -> None:
        """As if all that was kept had been added here."""
        for name, (total, counted) in kept["sums"].items():
            self._add_on_host(name, total, counted)
        self.steps = kept["steps"]
        self.began -= kept["seconds"]

    def leave_out(self, seconds: float) -> None:
        """Time since the last reading that was not training."""
        self.began += seconds

    def read(self) -> dict[str, float]:
        """Each value summed over the steps and the ranks (NaN where none was finite); `steps`, `seconds`. Starts anew."""
        self._settle()
        names = sorted(self.on_host)
        both = torch.tensor([self.on_host[name] for name in names], dtype=torch.float64, device=self.device).T
        totals, counted = collectives.sum_over_ranks(both.contiguous())
        # What was left out counts as the average of the rest, of any rank.
        totals = totals * (self.steps * collectives.world_size() / counted)
        result = dict(zip(names, totals.tolist(), strict=True))
        result |= {"steps": self.steps, "seconds": time.perf_counter() - self.began}
        self._reset()
        return result


def peak_memory(device: torch.device) -> float:
    """The largest peak of any rank so far, bytes: of the device, or of the process on a CPU."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak()
    return collectives.max_over_ranks(torch.tensor(float(peak), dtype=torch.float64, device=device)).item()


def process_peak() -> int:
    """Bytes. Linux's getrusage also counts the program that this process was forked from, a large launcher for one."""
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Dense bf16/fp16 peaks of GPUs, FLOP/s, from their makers' data sheets; the first name that fits counts.
_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "GB200": 2250e12, "A100": 312e12, "A10G": 70e12,
          "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "V100": 125e12, "T4": 65e12}  # fmt: skip
_SIDE = 1024  # of the matrices of `product_rate`


@cache
def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of 16-bit products that the device's maker names; None elsewhere: a rate measured on a busy machine is no peak."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in _PEAKS.items() if part in name), None)


@cache
def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on the CPU, measured once."""
    a, b = (torch.ones(_SIDE, _SIDE, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):  # the first also fetches memory
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
        if best > 0.5:  # emulated: seconds a product, and no need to know it exactly
            break
    return 2 * _SIDE**3 / best


def slow_precision(device: torch.device, dtype: torch.dtype) -> str | None:
    """Words to warn with where products of this type take over twice as long as fp32's: a CPU may have to emulate them."""
    if device.type != "cpu" or dtype == torch.float32:
        return None
    here, fp32 = product_rate(dtype), product_rate(torch.float32)
    if 2 * here > fp32:
        return None
    name, flag = str(dtype).removeprefix("torch."), "bf16" if dtype == torch.bfloat16 else "fp16"
    return f"{here / 1e9:,.0f} GFLOP/s in {name} and {fp32 / 1e9:,.0f} in fp32: this CPU emulates {name}, leave --{flag} out"


class RunLog:
    """Rank 0's bar, `metrics.jsonl` and monitors; on other ranks every method does nothing.

    A resumed run keeps the lines of the steps before it and drops what the stopped run wrote after its checkpoint.
    """

    def __init__(self, file: Path, *, first_step: int, total_steps: int, show_bar: bool, write_events: Callable):
        self.active = collectives.rank() == 0
        self.write_events = write_events
        if not self.active:
            return
        self.path = file
        with self._explained():
            self._open(file, first_step)
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=not show_bar, dynamic_ncols=True, file=sys.stderr
        )

    def _open(self, file: Path, first_step: int) -> None:
        kept = []
        if first_step and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line).get("step", 0) <= first_step]
        file.parent.mkdir(parents=True, exist_ok=True)
        if kept:  # whole at any time: what was logged is not made again
            filesystem.write_whole(file, "".join(line + "\n" for line in kept).encode(), sync=False)
        self.file = file.open("a" if kept else "w", encoding="utf-8")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            last = checkpoint.newest(self.path.parent)
            raise ValueError(
                f"{self.path} could not be written ({error}); the last checkpoint is {last or 'none'}. Make room or make "
                "the file writable, then resume with --resume_from_checkpoint auto"
            ) from error

    def advance(self) -> None:
        if self.active:
            self.bar.update()

    def write(self, record: Record) -> None:
        """One line of metrics; `record["step"]` is the number of steps done."""
        if not self.active:
            return
        record = self._append("train", record)
        shown = {
            "loss": f"{record['loss']:.4f}",
            "lr": f"{record['learning_rate']:.2e}",
            "tokens/s": f"{record['tokens_per_second']:,.0f}",
        }
        if "mfu" in record:
            shown["mfu"] = f"{record['mfu']:.0%}"
        if "negatives" in record:
            shown["negatives"] = f"{record['negatives']:.0f}"
        self.bar.set_postfix(shown)
        if self.bar.disable:
            self.say("  ".join([f"step {record['step']}"] + [f"{k} {v}" for k, v in shown.items()]))

    def write_evaluation(self, record: Record, shown: list[str]) -> None:
        """The same for an evaluation after that step: `eval_...` values and `eval_seconds`; a person is shown some of them."""
        if not self.active:
            return
        record = self._append("eval", record)
        words = [f"{k.removeprefix('eval_')} {record[k]:.4f}" for k in shown]
        self.say("  ".join([f"step {record['step']}: evaluated in {record['eval_seconds']:.1f} s", *words]))

    def _append(self, kind: str, record: Record) -> Record:
        """The record, rounded: a line of metrics.jsonl, and values of the monitors under `kind`."""
        record = {k: round(v, 9) if isinstance(v, float) else v for k, v in record.items()}
        # JSON has no NaN or infinity; other readers than Python's refuse them.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self._explained():
            self.file.write(json.dumps(finite, allow_nan=False) + "\n")
            self.file.flush()
        step = record["step"]
        self.write_events([(f"{kind}/{k.removeprefix('eval_')}", v, step) for k, v in record.items() if k != "step"])
        return record

    def say(self, text: str) -> None:
        if self.active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
