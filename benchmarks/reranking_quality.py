"""What a reranker is worth after the same steps with each trainer: nDCG@10 of the first passages of an embedder in its order.

    python benchmarks/reranking_quality.py --data mined.jsonl --eval_data BEIR_FOLDER --model EMBEDDER --envs .bench

Each seed draws its own groups of the data and its own new head; from there all sides have the same weights, the same pairs in
the same steps, and the same rates. Embedder and first stage are --model, with mean pooling. A row is written as soon as it is
measured, and one that --output has is not measured again.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

from comparing import add_shared_flags
from quality import Rows, read_scores
from reranking import Reranking, flagembedding, ours, sentence_transformers
from sides import Run, ask_parts, environment, launch, open_lines, words_of, write_groups

SIDES = {
    "bge_ds": (ours, "ours"),
    "FlagEmbedding": (flagembedding, "flagembedding"),
    "sentence-transformers": (sentence_transformers, "sentence_transformers"),
}


def evaluate(run: Run, flags: dict, folder: Path, name: str) -> dict[str, float]:
    output = run.work / f"{name}.json"
    command = [sys.executable, "-m", "bge_ds.evaluate", "--data", str(folder), "--output", str(output), "--use_cpu"]
    launch([[*command, *words_of(flags)]], run.work / f"{name}.log", [environment(run.threads)])
    return read_scores(output)


def first_stage(args: argparse.Namespace, run: Run, folder: Path) -> tuple[Path, float]:
    """The embedder's ranking of a set as a TREC run, and its nDCG@10."""
    lengths = {"query_max_len": args.query_max_len, "passage_max_len": args.passage_max_len}
    flags = {"model_name_or_path": args.model, "sentence_pooling_method": "mean", "normalize_embeddings": True, **lengths}
    rankings = run.work / f"first_{folder.name}"
    scores = evaluate(run, flags | {"run_output": rankings}, folder, rankings.name)
    (file,) = rankings.iterdir()
    return file, scores[folder.name]


def prepare(args: argparse.Namespace, run: Run, seed: int) -> Reranking:
    """Data and starting model of a seed."""
    setting = Reranking(
        "reranking", args.batch, args.steps, 0, args.bf16, learning_rate=args.learning_rate, group=args.group,
        query_max_len=args.query_max_len, passage_max_len=args.passage_max_len,
    )  # fmt: skip
    folder = run.fresh("data")
    with open_lines(args.data) as source:
        lines = source.readlines()
    random.Random(seed).shuffle(lines)
    (folder / "shuffled.jsonl").write_text("".join(lines), encoding="utf-8")
    write_groups(folder / "shuffled.jsonl", folder / "groups.jsonl", args.batch * args.steps, args.group - 1)
    asked = {"what": "cross_encoder", "model": str(args.model), "output": str(folder / "model"), "seed": seed}
    ask_parts(run, asked, script="own_inference.py")
    return replace(setting, data=str(folder / "groups.jsonl"), model=str(folder / "model"))


def measure(args: argparse.Namespace) -> None:
    rows = Rows(
        args.output, trained="reranker", steps=args.steps, batch=args.batch, group=args.group,
        lengths=f"{args.query_max_len}+{args.passage_max_len}", learning_rate=args.learning_rate,
        precision="bf16" if args.bf16 else "fp32",
    )  # fmt: skip
    names = [folder.name for folder in args.eval_data]
    whole = Run(args.envs, args.work, args.threads)
    rankings = {}
    for folder in args.eval_data:
        rankings[folder], value = first_stage(args, whole, folder)
        if not rows.values("first stage", folder.name):
            rows.append("first stage", "", {folder.name: value})
    for seed in args.seeds:
        wanted = [side for side in args.sides if any(str(seed) not in rows.values(side, name) for name in names)]
        if not wanted:
            continue
        run = replace(whole, work=args.work / f"seed_{seed}")
        setting = prepare(args, run, seed)
        tokens = {}
        for side in wanted:
            train, folder_name = SIDES[side]
            record = train(setting, run)
            tokens[side] = record["tokens"]
            print(f"{side}, seed {seed}: {sum(record['tokens']) / sum(record['seconds']):,.0f} tokens/s", flush=True)
            if record["tokens"] != tokens[wanted[0]]:
                raise SystemExit(f"{side} had other tokens than {wanted[0]}, so its score means nothing; see {run.work}")
            flags = {"rerank": run.work / folder_name, "rerank_depth": args.depth}
            flags["rerank_max_len"] = args.query_max_len + args.passage_max_len
            scores = {}
            for folder, file in rankings.items():
                found = evaluate(run, flags | {"search_results": file}, folder, f"{folder_name}_{folder.name}")
                (scores[folder.name],) = (value for name, value in found.items() if name.endswith(", reranked"))
            rows.append(side, seed, scores)
    rows.summary(("first stage", *SIDES), names)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shared_flags(p, "quality", stepped=False)
    add = p.add_argument
    add("--data", type=Path, required=True, help="JSON lines of groups with hard negatives, as bge_ds.mine writes them")
    add("--eval_data", type=Path, nargs="+", required=True, help="folders in BEIR's form")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES))
    add("--bf16", action="store_true")
    numbers = {"steps": 150, "batch": 4, "group": 8, "query_max_len": 8, "passage_max_len": 248, "depth": 10}
    for name, default in numbers.items():
        add(f"--{name}", type=int, default=default)
    add("--learning_rate", type=float, default=6e-5)
    args = p.parse_args()
    for name in ("data", "model", "envs", "work", "output"):
        setattr(args, name, getattr(args, name).absolute())
    args.eval_data = [folder.absolute() for folder in args.eval_data]
    args.work.mkdir(parents=True, exist_ok=True)
    measure(args)


if __name__ == "__main__":
    main()
