"""Results as rows: a table for a person, lines of a CSV file for later."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path

from sides import Result, Shared

COLUMNS = (
    "date", "hardware", "versions", "what", "side", "precision", "batch", "group", "tokens_per_step", "tokens_per_second",
    "lowest", "highest", "seconds_per_step", "peak_MiB", "padding", "ours_times_as_fast", "ours_share_of_memory", "figure",
    "note",
)  # fmt: skip
PRETRAINING_COLUMNS = (
    "date", "hardware", "versions", "what", "side", "precision", "batch", "max_seq_length", "texts_per_second", "lowest",
    "highest", "tokens_per_step", "tokens_per_second", "seconds_per_step", "peak_MiB", "padding", "ours_times_as_fast",
    "ours_share_of_memory", "figure", "note",
)  # fmt: skip


def hardware(setting: Shared, threads: int) -> str:
    if setting.cuda:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        facts = {name.strip(): value.strip() for name, value in lines.items()}
        marks = [m for m in ("avx512_bf16", "amx_bf16") if m in facts.get("flags", "").split()]
        model = " ".join([facts.get("model name", model), *marks])
    return f"{model}, {threads} cores"


def rows_of(setting: Shared, results: list[Result], where: str) -> list[dict]:
    """One row a side; a peer's says how many times as fast ours was, and what share of its memory ours took.

    The range and the comparison are of what the setting counts, tokens or texts.
    """
    base = next((r for r in results if r.side == "bge_ds" and r.seconds), None)
    rows = []
    for result in results:
        row = dict.fromkeys((*COLUMNS, *PRETRAINING_COLUMNS), "")
        row |= {name: value for name, value in asdict(setting).items() if name in row} | {
            "date": datetime.date.today().isoformat(), "hardware": where, "side": result.side,
            "precision": setting.precision, "note": result.note,
            "versions": " ".join(f"{name} {number}" for name, number in result.versions.items()),
            "figure": "" if result.figure is None else f"{result.figure:.3g}",
        }  # fmt: skip
        if result.seconds:
            counted = rates_of(setting, result)
            row |= {
                "tokens_per_step": round(statistics.mean(result.tokens)),
                "tokens_per_second": f"{statistics.median(result.rates):.0f}",
                "texts_per_second": f"{setting.batch / statistics.median(result.seconds):.3g}",
                "lowest": say_rate(setting, min(counted)), "highest": say_rate(setting, max(counted)),
                "seconds_per_step": f"{statistics.median(result.seconds):.3g}",
                "padding": f"{1 - sum(result.tokens) / sum(result.padded):.2f}",
            }  # fmt: skip
        if result.peak_bytes:
            row["peak_MiB"] = f"{result.peak_bytes / 2**20:.0f}"
        if base is not None and result is not base:
            if result.seconds:
                ratio = statistics.median(rates_of(setting, base)) / statistics.median(rates_of(setting, result))
                row["ours_times_as_fast"] = f"{ratio:.2f}"
            if result.peak_bytes:
                row["ours_share_of_memory"] = f"{base.peak_bytes / result.peak_bytes:.2f}"
        rows.append(row)
    return rows


def rates_of(setting: Shared, result: Result) -> list[float]:
    return result.rates if setting.counts == "tokens" else [setting.batch / seconds for seconds in result.seconds]


def say_rate(setting: Shared, rate: float) -> str:
    return f"{rate:.0f}" if setting.counts == "tokens" else f"{rate:.3g}"


def print_table(rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> None:
    if not rows:
        return
    shown = [name for name in columns[3:] if any(row[name] != "" for row in rows)]
    lines = [shown, *([str(row[name]) for name in shown] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def append_rows(file: Path, rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> None:
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
