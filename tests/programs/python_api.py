"""Ranks that use bge_ds from Python. Arguments: folder of the runs, folder of the training data, JSON of flags."""

import json
from pathlib import Path

import datasets

from bge_ds import api, finetune
from bge_ds.config.arguments import FinetuneArguments
from bge_ds.distributed import collectives


def main(*words: str) -> None:
    folder, base, flags = Path(words[0]), Path(words[1]), json.loads(words[2])
    rows = [json.loads(line) for line in (base / "groups.jsonl").read_text().splitlines()]
    given = {"list": rows, "dataset": datasets.Dataset.from_list(rows), "iterator": (dict(row) for row in rows)}
    for name, data in given.items():
        assert api.finetune(data, output_dir=folder / name, **flags) == folder / name
    file = {"train_data": [str(base / "groups.jsonl")], "output_dir": str(folder / "file")}
    finetune.train(FinetuneArguments.build(**flags, **file))
    texts = [{"text": text} for row in rows for text in row["pos"]]
    shared = ("model_name_or_path", "cache_dir", "max_steps", "save_strategy", "dataloader_num_workers", "use_cpu")
    encoder = api.pretrain(texts, output_dir=folder / "pretrain", max_seq_length=40, **{name: flags[name] for name in shared})
    assert (encoder / "model.safetensors").is_file()
    if collectives.rank() == 0:
        model = api.load(folder / "list", use_cpu=True)
        vectors_ND = model(["the quick fox", "a text"], "query")
        found = {"shape": list(vectors_ND.shape), "lengths": vectors_ND.norm(dim=1).tolist(), "settings": model.effective()}
        found["measures"] = api.evaluate(model, base / "set")
        (folder / "found.json").write_text(json.dumps(found))
