"""The data side against its peers: preprocessing, opening, random reads, the loader, resuming.

    benchmarks/make_environments.sh .bench
    python benchmarks/data.py --data groups.jsonl.gz --model MODEL --envs .bench \\
        --sets tokenizer preprocess open reads loader resume

Every side runs in a process of its own, on the same texts, all sides of a set in turn. `datasets` is the one that this
project is installed with; MosaicML Streaming has an environment of its own. Prints a table and appends its rows to a
CSV file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from comparing import add_shared_flags, run_sets, say
from rows import hardware
from sides import HERE, Run, Shared, SideFailed, ask_parts, environment, last_json, launch

SETS = ("tokenizer", "preprocess", "open", "reads", "loader", "resume")
SCRIPT = "own_data.py"
DATA_COLUMNS = (
    "date", "hardware", "versions", "what", "side", "size", "figure", "unit", "lowest", "highest", "peak_MiB",
    "ours_times_as_fast", "ours_share_of_memory", "goal", "note",
)  # fmt: skip


@dataclass
class Side:
    """Figures of one side over all repeats, more is better unless the unit is a time; peak in bytes."""

    name: str
    figures: list[float] = field(default_factory=list)
    peak: float = 0
    note: str = ""


def rows_of(what: str, size: str, unit: str, sides: list[Side], where: str, goal: str = "") -> list[dict]:
    """One row a side; a peer's says how many times as fast ours was, the first side's median against its own."""
    rows, ours = [], sides[0]
    for side in sides:
        row = dict.fromkeys(DATA_COLUMNS, "")
        row |= {
            "date": datetime.date.today().isoformat(), "hardware": where, "what": what, "side": side.name, "size": size,
            "unit": unit, "note": side.note,
            "versions": " ".join(f"{name} {version(name)}" for name in ("torch", "tokenizers", "datasets", "pyarrow")),
        }  # fmt: skip
        if side.figures:
            row |= {"figure": show(statistics.median(side.figures)), "lowest": show(min(side.figures))}
            row |= {"highest": show(max(side.figures))}
        if side.peak:
            row["peak_MiB"] = f"{side.peak / 2**20:.1f}"
        if side is ours:
            row["goal"] = goal
        elif side.figures and ours.figures:
            ratio = statistics.median(ours.figures) / statistics.median(side.figures)
            row["ours_times_as_fast"] = f"{1 / ratio if unit in ('s', 'ms') else ratio:.2f}"
            if side.peak and ours.peak:
                row["ours_share_of_memory"] = f"{ours.peak / side.peak:.2f}"
        rows.append(row)
    return rows


def show(figure: float) -> str:
    return f"{figure:.0f}" if figure >= 1000 else f"{figure:.3g}"


def in_turn(sides: dict[str, Callable[[Side], None]], repeats: int, what: str) -> list[Side]:
    """All sides, `repeats` times; each adds a figure. One that fails is said and left without figures."""
    results = {name: Side(name) for name in sides}
    for turn in range(repeats):
        for name, work in sides.items():
            if results[name].note == "failed":
                continue
            say(f"{what}: {name}, turn {turn + 1} of {repeats}")
            try:
                work(results[name])
            except SideFailed as error:
                say(str(error))
                results[name] = Side(name, note="failed")
    return list(results.values())


def own(run: Run, what: str, **asked) -> dict:
    return ask_parts(run, {"what": what, **asked}, script=SCRIPT)


def peer(run: Run, script: str, python: str, **asked) -> dict:
    """One measurement of a peer, in a fresh folder `output` of its own."""
    name = Path(script).stem
    asked["output"] = str(run.fresh(name))
    log = run.work / f"{name}.log"
    # Each peer keeps what it derives where this run is, or an earlier run's would be found and nothing measured.
    home = {"HF_HOME": asked["output"], "HF_DATASETS_CACHE": asked["output"], "HF_DATASETS_OFFLINE": "1"}
    return last_json(launch([[python, str(HERE / "peers" / script), json.dumps(asked)]], log, [environment(1, **home)]))


# ----------------------------------------------------------------------------------------------- memory of a tree


def tree_memory(root: int) -> int:
    """Bytes that a process and all below it own: a shared page counts once, one that a file backs not at all."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
    tree, size = {root}, 0
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    for pid in tree:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        size += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return size


def watched(command: list[str], env: dict[str, str], log: Path) -> tuple[float, int, str]:
    """(seconds, peak bytes of the whole tree, looked at 20 times a second, standard output) of a command."""
    log.parent.mkdir(parents=True, exist_ok=True)
    out = log.with_suffix(".out")
    with log.open("w") as errors, out.open("w") as output:
        began, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, env=env, stdout=output, stderr=errors, cwd=HERE.parent)
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - began
    if process.returncode:
        raise SideFailed(f"{' '.join(command[:3])} ... failed, see {log}:\n" + log.read_text(encoding="utf-8")[-1500:])
    return seconds, peak, out.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------- the sets


def lines_of(args: argparse.Namespace, run: Run, size: int) -> str:
    target = run.work / f"lines_{size}.jsonl"
    if not target.exists():
        own(run, "lines", source=str(args.data.absolute()), target=str(target), bytes=size)
    return str(target)


def tokenizer_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    """One core: the command's tokens a second against the bare tokenizer's, all tokens counted, those cut off too."""
    lines, model = lines_of(args, run, args.core_bytes), str(args.model.absolute())
    tokens = own(run, "bare", lines=lines, model=model)["tokens"]

    def ours(side: Side) -> None:
        asked = {"lines": lines, "model": model, "target": str(run.work / "core"), "max_seq_length": 512}
        side.figures.append(tokens / own(run, "command", **asked)["seconds"])

    def bare(side: Side) -> None:
        side.figures.append(tokens / own(run, "bare", lines=lines, model=model)["seconds"])

    sides = in_turn({"bge_ds": ours, "tokenizers.encode_batch": bare}, args.repeats, "tokenizer")
    size = f"{args.core_bytes / 1e6:.0f} MB"
    return rows_of("preprocessing on one core", size, "tokens/s", sides, where, "0.8 of the bare tokenizer")


def preprocess_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    lines, model, processes = lines_of(args, run, args.bytes), str(args.model.absolute()), str(args.num_proc)

    def ours(side: Side) -> None:
        command = [sys.executable, "-m", "bge_ds.preprocess", "pretrain", "--input", lines, "--output", str(run.work / "all")]
        command += ["--tokenizer", model, "--num_proc", processes, "--max_seq_length", "512", "--overwrite"]
        seconds, peak, _ = watched(command, environment(1), run.work / "preprocess.log")
        side.figures.append(seconds)
        side.peak = max(side.peak, peak)

    def datasets(side: Side) -> None:
        output = str(run.fresh("run_datasets"))
        asked = {"what": "map", "lines": lines, "model": model, "max_seq_length": 512, "num_proc": args.num_proc}
        command = [sys.executable, str(HERE / "peers" / "run_datasets.py"), json.dumps({**asked, "output": output})]
        env = environment(1, HF_HOME=output, HF_DATASETS_CACHE=output)
        seconds, peak, _ = watched(command, env, run.work / "run_datasets.log")
        side.figures.append(seconds)
        side.peak = max(side.peak, peak)

    sides = in_turn({"bge_ds": ours, "datasets": datasets}, args.repeats, "preprocess")
    size = f"{os.path.getsize(lines) / 1e6:.0f} MB, {args.num_proc} processes"
    return rows_of("preprocessing JSON lines", size, "s", sides, where, "1.5 times as fast, half the memory")


def open_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    """Once with one shard and once with so many that they hold --open_bytes: time and memory must not differ much."""
    shards = own_shards(args, run, "pretrain", lines_of(args, run, args.core_bytes))
    rows = []
    for size in (1, args.open_bytes):
        linked = own(run, "link", shards=shards, target=str(run.fresh(f"linked_{size}")), bytes=size)

        def work(side: Side, size: int = size) -> None:
            found = own(run, "open", shards=str(run.work / f"linked_{size}"))
            side.figures.append(1e3 * found["seconds"])
            side.peak = max(side.peak, found["grown"])
            side.note = f"with its last row {1e3 * found['with_a_row']:.3g} ms; the peak is by how much the process grew"

        sides = in_turn({"bge_ds": work}, args.repeats, f"open {linked['bytes']} bytes")
        size = f"{linked['bytes'] / 1e9:.3g} GB in {linked['shards']} shards"
        rows += rows_of("opening shards", size, "ms", sides, where, "100 ms at 10 GB, constant memory")
    return rows


def own_shards(args: argparse.Namespace, run: Run, kind: str, data: str) -> str:
    """The command's shards of a file, made once."""
    target = run.work / f"shards_{kind}_{Path(data).name}"
    if not target.exists():
        command = [sys.executable, "-m", "bge_ds.preprocess", kind, "--input", data, "--output", str(target)]
        launch([[*command, "--tokenizer", str(args.model.absolute())]], run.work / "shards.log", [environment(1)])
    return str(target)


def reads_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    shards = own_shards(args, run, "finetune", str(args.data.absolute()))
    texts = run.fresh("texts")
    groups = own(run, "export", shards=shards, target=str(texts))["groups"]
    tokens = set()

    def counted(ask: Callable[[], dict]) -> Callable[[Side], None]:
        def work(side: Side) -> None:
            found = ask()
            tokens.add(found["tokens"])
            side.figures.append(args.reads / found["seconds"])

        return work

    asked = {"what": "reads", "texts": str(texts), "reads": args.reads}
    sides = {
        "bge_ds": counted(lambda: own(run, "reads", shards=shards, reads=args.reads)),
        "datasets": counted(lambda: peer(run, "run_datasets.py", sys.executable, **asked)),
        "MosaicML Streaming": counted(lambda: peer(run, "run_streaming.py", run.peer("streaming"), **asked)),
    }
    results = in_turn(sides, args.repeats, "reads")
    if len(tokens) > 1:
        raise ValueError(f"the sides read {sorted(tokens)} tokens: not the same texts, so their rates mean nothing")
    return rows_of("random reads, groups of 8 texts", f"{groups} groups", "groups/s", results, where, "10 times as fast")


def loader_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    """One worker, and none. The texts of pre-training are full, 512 tokens each."""
    full = run.work / "full.jsonl"
    if not full.exists():
        asked = {"what": "texts", "source": str(args.data.absolute()), "target": str(full), "count": args.full_texts}
        ask_parts(run, asked | {"model": str(args.model.absolute()), "least_tokens": 512}, script="own_pretraining.py")
    rows, goal = [], "5 M tokens/s"
    for kind, data, batch in (("pretrain", str(full), 16), ("finetune", str(args.data.absolute()), 32)):
        shards = own_shards(args, run, kind, data)

        def work(workers: int, shards: str = shards, batch: int = batch) -> Callable[[Side], None]:
            def measure(side: Side) -> None:
                asked = {"shards": shards, "batch": batch, "steps": args.loader_steps, "warm": 20, "workers": workers}
                found = own(run, "loader", **asked)
                side.figures.append(found["tokens"] / found["seconds"])

            return measure

        sides = {"bge_ds, one worker": work(1), "bge_ds, in the process itself": work(0)}
        results = in_turn(sides, args.repeats, f"loader, {kind}")
        unit = f"{batch} texts of 512 tokens" if kind == "pretrain" else f"{batch} groups of 8"
        rows += rows_of(f"loader, {kind}", unit, "tokens/s", results, where, goal)
    return rows


def resume_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    shards, rows = own_shards(args, run, "finetune", str(args.data.absolute())), []
    for step in (1, args.resume_step):

        def work(side: Side, step: int = step) -> None:
            side.figures.append(1e3 * own(run, "resume", shards=shards, batch=32, step=step)["seconds"])

        sides = in_turn({"bge_ds": work}, args.repeats, f"resume at {step}")
        rows += rows_of(f"first batch at step {step:,}", "32 groups of 8", "ms", sides, where, "10 ms")
    return rows


def run_set(name: str, args: argparse.Namespace, run: Run) -> list[dict]:
    run.work.mkdir(parents=True, exist_ok=True)
    work = {
        "tokenizer": tokenizer_set, "preprocess": preprocess_set, "open": open_set, "reads": reads_set,
        "loader": loader_set, "resume": resume_set,
    }[name]  # fmt: skip
    return work(args, run, hardware(Shared("", 0, 0, 0), run.threads))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="groups as JSON lines, .gz or not, with seven negatives each")
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--bytes", type=int, default=10**9, help="JSON lines of the set preprocess")
    add("--core_bytes", type=int, default=3 * 10**7, help="JSON lines of the set tokenizer")
    add("--open_bytes", type=int, default=10**10, help="shards of the set open")
    add("--num_proc", type=int, default=2, help="processes of the set preprocess, on both sides")
    add("--reads", type=int, default=20_000, help="groups read")
    add("--full_texts", type=int, default=2000, help="texts of 512 tokens for the loader")
    add("--loader_steps", type=int, default=2000, help="batches of the loader")
    add("--resume_step", type=int, default=10**6)
    add_shared_flags(parser, "data")
    return run_sets(parser.parse_args(argv), run_set, DATA_COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
