"""Ranks that print the peak memory of loading a model and building its engine, as a share of the model, sharded and whole.

Arguments: a small model folder, a large one.
"""

import contextlib
import re
import threading
import time
from pathlib import Path

from bge_ds.deepspeed_engine import engine as engines
from bge_ds.modeling.encoder import Encoder


def own_bytes() -> int:
    # Anonymous memory: pages of the weights' file, which the system may take back at any time, do not count.
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(folder: str, context) -> float:
    before, highest, done = own_bytes(), [0], threading.Event()

    def watch():
        while not done.is_set():
            highest[0] = max(highest[0], own_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    with context:
        model = Encoder.load(folder)
    model.requires_grad_(False)
    model.backbone.embeddings.LayerNorm.requires_grad_(True)  # hardly any optimizer state: what is left is the weights
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    groups = engines.parameter_groups(model, 0.0)
    engine = engines.build(model, config, groups, adam={"lr": 1e-3}, optim="adamw_torch", schedule=None)
    done.set()
    thread.join()
    return (highest[0] - before) / (4 * engines.count_elements(engine.module))


def main(small: str, large: str) -> None:
    engines.start(use_cpu=True)
    peak_of(small, engines.sharded_loading("zero3"))  # what is imported and allocated once does not count either
    for kind, context in (("sharded", engines.sharded_loading("zero3")), ("whole", contextlib.nullcontext())):
        print(kind, f"{peak_of(large, context):.3f}", flush=True)
