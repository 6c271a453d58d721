"""What pre-training is worth: nDCG@10 after the same fine-tuning, against the number of pre-training tokens.

    python benchmarks/objectives.py --data DATA

DATA holds pretrain/train.jsonl.gz, debian/train.jsonl.gz and the BEIR-form folders debian/dev and xquad_en; a third set,
docstrings of the installed packages, is harvested. Every objective starts from the same random weights and sees the same texts
in the same order, token for token. Each number of tokens is a run of its own, its learning rate decaying to 0. A row is written
as soon as it is measured, and rows that objectives.csv has are not measured again, so a run that was stopped goes on.
`--start` measures continued pre-training of a trained encoder in the same way, at rates that fit it.
`--plot` draws the rows.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
OBJECTIVES = ("none", "mlm", "retromae", "dupmae")
KEY = ("model", "objective", "tokens", "step_tokens", "pooling", "seed", "finetune_steps", "set")
COLUMNS = ("date", *KEY, "nDCG@10")


def run(command: list[object], log: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        result = subprocess.run([sys.executable, *map(str, command)], stdout=out, stderr=out, env=environment)
    if result.returncode:
        raise SystemExit(f"failed, see {log}: {' '.join(map(str, command))}")


def flags(**values: object) -> list[object]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def make_sets(args: argparse.Namespace) -> list[Path]:
    """The retrieval sets; their names are those of the folders."""
    docstrings = args.work / "docstrings"
    if not (docstrings / "qrels.tsv").exists():
        run([EXAMPLES / "harvest.py", *flags(output=args.work / "harvested")], args.work / "harvest.log")
        (args.work / "harvested/test").rename(docstrings)
    return [args.data / "debian/dev", args.data / "xquad_en", docstrings]


def make_start(args: argparse.Namespace) -> Path:
    """Tokenizer and config of the small BERT, or the trained encoder of --start."""
    if args.start:
        return args.start
    folder = args.work / f"small_{args.layers}x{args.width}"
    if (folder / "config.json").exists():
        return folder
    texts = folder.with_suffix(".jsonl")
    args.work.mkdir(parents=True, exist_ok=True)
    with gzip.open(args.data / "pretrain/train.jsonl.gz") as source, open(texts, "wb") as out:
        out.write(source.read())
    command = [EXAMPLES / "make_tokenizer.py", *flags(input=texts, output=folder, vocabulary=args.vocabulary)]
    run(command, args.work / "tokenizer.log")
    texts.unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_attention_heads": args.width // 32}
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 4 * args.width}, indent=2))
    return folder


def label(start: Path, args: argparse.Namespace) -> str:
    """What stands first in the names of the folders."""
    return (args.name or start.name) if args.start else start.name


def pretrained(objective: str, tokens: int, seed: int, start: Path, args: argparse.Namespace) -> Path:
    """The folder of the encoder after its pre-training."""
    output = args.work / f"{label(start, args)}_{objective}_{tokens}_{args.step_tokens if tokens else 0}_{seed}"
    if objective == "none" and args.start:
        return start
    if objective == "none":
        if not (output / "config.json").exists():
            run([EXAMPLES / "random_model.py", *flags(config=start, output=output, seed=seed)], output.with_suffix(".log"))
        return output
    if not (output / "encoder_model" / "config.json").exists():
        settings = flags(
            objective=objective, model_name_or_path=pretrained("none", 0, seed, start, args), output_dir=output,
            train_data=args.data / "pretrain/train.jsonl.gz", cache_dir=args.work / "cache", max_seq_length=args.length,
            max_steps=max(1, tokens // args.step_tokens), per_device_train_tokens=args.step_tokens,
            learning_rate=args.learning_rate, warmup_steps=0.1, seed=seed, save_strategy="no", logging_steps=50,
        )  # fmt: skip
        run(["-m", "bge_ds.pretrain", "--overwrite_output_dir", *settings], output.with_suffix(".log"))
    return output / "encoder_model"


def finetuned(name: str, pooling: str, seed: int, model: Path, args: argparse.Namespace) -> Path:
    output = args.work / f"{name}_{pooling}_finetuned"
    if not (output / "model.safetensors").exists():
        settings = flags(
            model_name_or_path=model, output_dir=output, train_data=args.data / "debian/train.jsonl.gz", train_group_size=1,
            cache_dir=args.work / "cache", query_max_len=32, passage_max_len=args.length, per_device_train_batch_size=64,
            max_steps=args.finetune_steps, learning_rate=args.finetune_rate, warmup_steps=0.1, temperature=0.05,
            sentence_pooling_method=pooling, seed=seed, save_strategy="no",
        )  # fmt: skip
        run(["-m", "bge_ds.finetune", "--overwrite_output_dir", *settings], output.with_suffix(".log"))
    return output


def scores(model: Path, file: Path, pooling: str, sets: list[Path], args: argparse.Namespace) -> dict[str, float]:
    """nDCG@10 of each set."""
    if not file.exists():
        settings = flags(
            model_name_or_path=model,
            query_max_len=32,
            passage_max_len=args.length,
            output=file,
            sentence_pooling_method=pooling,
        )
        run(["-m", "bge_ds.evaluate", *settings, "--data", *sets], file.with_suffix(".log"))
    return {name: values["nDCG@10"] for name, values in json.loads(file.read_text())["results"].items()}


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def append(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(str(row[name]).ljust(9) for name in COLUMNS[2:]), flush=True)


def measure(args: argparse.Namespace) -> None:
    """Every point that has no row yet, after fine-tuning; with --raw, before it too (finetune_steps 0)."""
    start, sets = make_start(args), make_sets(args)
    model = f"{label(start, args)}, {args.length} tokens"
    if not args.start:
        model = f"BERT {args.layers} x {args.width}, {args.vocabulary} words, {args.length} tokens"
    points = [(tokens, objective) for tokens in args.tokens for objective in args.objectives if objective != "none"]
    if "none" in args.objectives:
        points.insert(0, (0, "none"))
    for tokens, objective in points:
        for seed in args.seeds:
            for pooling in args.poolings:
                key = {"model": model, "objective": objective, "tokens": tokens}
                key |= {"step_tokens": args.step_tokens if tokens else 0, "pooling": pooling, "seed": seed}
                rows = [[str(row[name]) for name in KEY[:7]] for row in read_rows(args.output)]
                if [*map(str, key.values()), str(args.finetune_steps)] in rows:
                    continue
                encoder = pretrained(objective, tokens, seed, start, args)
                name = f"{label(start, args)}_{objective}_{tokens}_{key['step_tokens']}_{seed}"
                tuned = finetuned(name, pooling, seed, encoder, args)
                for steps, folder in [(0, encoder)] * args.raw + [(args.finetune_steps, tuned)]:
                    found = scores(folder, args.work / f"{name}_{pooling}_{steps}.json", pooling, sets, args)
                    for where, value in found.items():
                        at = {"date": datetime.date.today().isoformat(), **key, "finetune_steps": steps, "set": where}
                        append(args.output, at | {"nDCG@10": f"{value:.4f}"})


def plot(args: argparse.Namespace, picture: Path) -> None:
    """A panel for each set and pooling: mean of the seeds and their range, after fine-tuning, against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = {"finetune_steps": {str(args.finetune_steps)}, "step_tokens": {"0", str(args.step_tokens)}}
    rows = [row for row in read_rows(args.output) if all(row[name] in values for name, values in wanted.items())]
    sets, poolings = (list(dict.fromkeys(row[name] for row in rows)) for name in ("set", "pooling"))
    figure, panels = plt.subplots(
        len(poolings), len(sets), figsize=(4 * len(sets), 3.2 * len(poolings)), squeeze=False, layout="constrained"
    )
    colours = dict(zip(OBJECTIVES, ("black", "tab:green", "tab:blue", "tab:red"), strict=True))
    for pooling, line in zip(poolings, panels, strict=True):
        for where, panel in zip(sets, line, strict=True):
            here = [row for row in rows if row["set"] == where and row["pooling"] == pooling]
            for objective in OBJECTIVES:
                of_tokens: dict[float, list[float]] = {}
                for row in here:
                    if row["objective"] == objective:
                        of_tokens.setdefault(int(row["tokens"]) / 1e6, []).append(float(row["nDCG@10"]))
                if not of_tokens:
                    continue
                means = {tokens: statistics.mean(values) for tokens, values in sorted(of_tokens.items())}
                if objective == "none":
                    panel.axhline(means[0], color="black", linestyle="--", label="none")
                    continue
                spread = [[means[t] - min(of_tokens[t]) for t in means], [max(of_tokens[t]) - means[t] for t in means]]
                panel.errorbar(
                    list(means), list(means.values()), spread, color=colours[objective], marker="o", capsize=3, label=objective
                )
            panel.set(
                title=f"{where}, {pooling} pooling", xscale="log", xlabel="pre-training tokens (millions)", ylabel="nDCG@10"
            )
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
    figure.savefig(picture, dpi=100)
    print(f"picture: {picture}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--data", type=Path, help="folder of the data sets")
    add("--work", type=Path, default=HERE.parent / "runs" / "objectives", help="folder for models and logs")
    add("--output", type=Path, default=HERE / "objectives.csv", help="CSV file the rows are appended to")
    add("--plot", type=Path, metavar="PICTURE", help="draw the rows that there are, and measure nothing")
    add("--seeds", type=int, nargs="+", default=[1, 2])
    add("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    add("--poolings", nargs="+", default=["cls", "mean"])
    add("--tokens", type=int, nargs="+", default=[300_000, 1_000_000, 3_000_000, 10_000_000], help="of pre-training")
    add("--vocabulary", type=int, default=4096, help="word pieces of the tokenizer")
    add("--width", type=int, default=128, help="features of the encoder")
    add("--layers", type=int, default=2)
    add("--length", type=int, default=64, help="tokens of a text, in both trainings")
    add("--start", type=Path, metavar="FOLDER", help="a trained encoder that every run starts from, not random weights")
    add("--name", help="with --start: what the rows call it (default: the folder's name)")
    add("--raw", action="store_true", help="score the encoders before fine-tuning, too")
    add("--step_tokens", type=int, default=512, help="tokens a step of pre-training")
    add("--learning_rate", type=float, default=2e-3)
    add("--finetune_steps", type=int, default=200)
    add("--finetune_rate", type=float, default=1e-3)
    return p


def main() -> None:
    args = parser().parse_args()
    if args.plot:
        plot(args, args.plot)
        return
    if args.data is None:
        parser().error("--data is needed to measure")
    args.data, args.work, args.start = args.data.absolute(), args.work.absolute(), args.start and args.start.absolute()
    measure(args)


if __name__ == "__main__":
    main()
