"""The part of benchmarks/gpu.sh that runs both commands, as users do."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_sample import TEXTS, lines_of
from gpu_setting import GROUP, Place, shapes
from transformers import AutoModelForMaskedLM, AutoTokenizer


def command(place: Place) -> None:
    """The commands themselves, as users run them: engine, loader with one worker, log. The rate of the log's last lines."""
    config, size = shapes(place)["bge-base"], place.size(64, 4)
    config.vocab_size = len(AutoTokenizer.from_pretrained(place.data / "tokenizer"))
    common = {
        "model_name_or_path": "model", "per_device_train_batch_size": size, "max_steps": place.size(24, 4),
        "logging_steps": place.size(6, 1), "dataloader_num_workers": 1, "save_strategy": "no", "cache_dir": "cache",
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
                [sys.executable, "-m", f"bge_ds.{name}", *words], cwd=folder, capture_output=True, text=True, check=False,
                timeout=place.size(25, 100),
            )  # fmt: skip
            took = time.perf_counter() - began
            (place.file.parent / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
            if done.returncode:
                raise SystemExit(f"{name} ended with status {done.returncode}\n{done.stderr[-3000:]}")
            records = [json.loads(line) for line in (Path(folder) / name / "metrics.jsonl").read_text().splitlines()]
            rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r][1:]
            waits = [r["loader_share"] for r in records if "loader_share" in r][1:]
            note = f"{took:.0f} s in all; waits {statistics.median(waits):.2%} of a step for its loader"
            place.row(f"the {name} command, bge-base, real texts", "bge_ds", 1.0, tokens=statistics.median(rates), note=note,
                      goal="loader <= 1 % of a step")  # fmt: skip
