"""Ranks that evaluate one model together; each writes its measures, its ranking and its number of forward passes.

Passes are counted, since under ZeRO-3 they must not differ. Arguments: model, folder of the set, folder to write into.
"""

import json
import os
from pathlib import Path

import torch

from bge_ds.data import beir
from bge_ds.data.preprocess import validate
from bge_ds.evaluation import distributed_texts, evaluators
from bge_ds.modeling.encoder import Encoder


def main(model_path: str, folder: str, out: str) -> None:
    if int(os.environ["WORLD_SIZE"]) > 1:
        torch.distributed.init_process_group("gloo")
    distributed_texts.SMALLEST_UNIT = 4
    sets = beir.read_folders([Path(folder)], "--eval_data")
    tokenizer, lengths = validate.load_tokenizer(model_path), {"query_max_len": 16, "passage_max_len": 24}
    evaluator = evaluators.SearchEvaluator(sets, tokenizer, torch.device("cpu"), batch_size=3, **lengths)
    model = Encoder.load(model_path, "mean").train()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    values = evaluator(model)
    values.pop("eval_seconds")
    assert model.training and model.backbone.training
    with torch.no_grad():
        rows = evaluator.rank("set", model.eval())
    Path(out, os.environ["RANK"]).write_text(json.dumps([values, rows.tolist(), len(passes)]))
