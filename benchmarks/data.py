"""The data side against its peers: preprocessing and its memory, opening, random reads, the loader, resuming.

    benchmarks/make_environments.sh .bench streaming
    python benchmarks/data.py --data groups.jsonl.gz --model MODEL --envs .bench \\
        --sets tokenizer preprocess memory open reads loader resume

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
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from comparing import add_shared_flags, run_sets, say
from rows import hardware
from sides import HERE, Run, Shared, SideFailed, ask_parts, environment, last_json, launch
from watching import watched

SETS = ("tokenizer", "preprocess", "memory", "open", "reads", "loader", "resume")
TIMES = (1, 4, 16)  # the inputs of the set memory
SCRIPT = "own_data.py"
GROUP = 8  # passages of a group
READ_AT_ONCE = 32  # groups, as a training batch asks for them
DEFAULT_SHARD = 256 << 20  # bge_ds.data.shards.SHARD_BYTES, which is not imported: this process stays small
LENGTH = 512  # tokens of a text at most, in pre-training
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

    def take(self, figure: float, peak: float) -> None:
        self.figures.append(figure)
        self.peak = max(self.peak, peak)


def rows_of(what: str, size: str, unit: str, sides: list[Side], where: str, goal: str = "") -> list[dict]:
    """One row a side; a peer's says how many times as fast ours was, the first side's median against its own.

    The goal stands on our own rows, those of sides named bge_ds: nothing but a peer is compared."""
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
        if side.name.startswith("bge_ds"):
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


def in_turn(sides: dict[str, Callable[[Side], None]], repeats: int, what: str, alternate: bool = False) -> list[Side]:
    """All sides, `repeats` times; each adds a figure. One that fails is said and left without figures.

    alternate: every second turn in reverse order, so that a machine that slows down weighs on all alike.
    """
    results = {name: Side(name) for name in sides}
    for turn in range(repeats):
        for name, work in list(sides.items())[:: -1 if alternate and turn % 2 else 1]:
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


# ----------------------------------------------------------------------------------------------- the sets


def lines_of(args: argparse.Namespace, run: Run, size: int) -> str:
    return made_once(run, f"lines_{size}.jsonl", what="lines", source=str(args.data.absolute()), bytes=size)


def made_once(run: Run, name: str, script: str = SCRIPT, **asked) -> str:
    """A file of the work folder that a script writes as its `target`; it gets its name when it is whole."""
    target = run.work / name
    if not target.exists():
        draft = run.work / f"draft_{name}"
        ask_parts(run, asked | {"target": str(draft)}, script=script)
        draft.rename(target)
    return str(target)


def tokenizer_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    """One core: the command's tokens a second against the bare tokenizer's, all tokens counted, those cut off too."""
    lines, model = lines_of(args, run, args.core_bytes), str(args.model.absolute())
    tokens = own(run, "bare", lines=lines, model=model)["tokens"]

    def ours(side: Side) -> None:
        asked = {"lines": lines, "model": model, "target": str(run.work / "core"), "max_seq_length": LENGTH}
        side.figures.append(tokens / own(run, "command", **asked)["seconds"])

    def bare(side: Side) -> None:
        side.figures.append(tokens / own(run, "bare", lines=lines, model=model)["seconds"])

    sides = in_turn({"bge_ds": ours, "tokenizers.encode_batch": bare}, args.repeats, "tokenizer")
    size = f"{args.core_bytes / 1e6:.0f} MB"
    return rows_of("preprocessing on one core", size, "tokens/s", sides, where, "0.8 of the bare tokenizer")


def preprocess_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    """Both from the start of the interpreter to its end, files written: ours holds the words of the tokens, too."""
    lines, model, processes = lines_of(args, run, args.bytes), str(args.model.absolute()), str(args.num_proc)
    rows = set()

    def ours(side: Side) -> None:
        command = [sys.executable, "-m", "bge_ds.preprocess", "pretrain", "--input", lines, "--output", str(run.work / "all")]
        command += ["--tokenizer", model, "--num_proc", processes, "--max_seq_length", str(LENGTH), "--overwrite"]
        seconds, peak, _ = watched(command, environment(1), run.work / "preprocess.log")
        side.take(seconds, peak)
        rows.add(manifest_of(run.work / "all")["counts"]["texts"])

    def datasets(side: Side) -> None:
        output = str(run.fresh("run_datasets"))
        asked = {"what": "map", "lines": lines, "model": model, "max_seq_length": LENGTH, "num_proc": args.num_proc}
        command = [sys.executable, str(HERE / "peers" / "run_datasets.py"), json.dumps({**asked, "output": output})]
        env = environment(1, HF_HOME=output, HF_DATASETS_CACHE=output)
        seconds, peak, found = watched(command, env, run.work / "run_datasets.log")
        side.take(seconds, peak)
        rows.add(last_json(found)["rows"])

    sides = in_turn({"bge_ds": ours, "datasets": datasets}, args.repeats, "preprocess")
    if len(rows) > 1:
        raise ValueError(f"the sides made {sorted(rows)} rows of the same lines, so their times mean nothing")
    size = f"{os.path.getsize(lines) / 1e6:.0f} MB, {args.num_proc} processes"
    return rows_of("preprocessing JSON lines", size, "s", sides, where, "1.5 times as fast, half the memory")


def memory_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    """Groups of which no two texts are equal, so that the de-duplication has all of a segment's to remember."""

    def work(times: int) -> Callable[[Side], None]:
        def measure(side: Side) -> None:
            asked = {"source": str(args.data.absolute()), "bytes": times * args.memory_bytes}
            lines = made_once(run, f"groups_{asked['bytes']}.jsonl", what="groups", **asked)
            command = [sys.executable, "-m", "bge_ds.preprocess", "finetune", "--input", lines, "--overwrite"]
            command += ["--output", str(run.work / "memory"), "--tokenizer", str(args.model.absolute()), "--num_proc", "1"]
            command += ["--shard_bytes", str(args.shard_bytes)]
            seconds, peak, _ = watched(command, environment(1), run.work / "memory.log")
            side.take(peak, peak)
            side.note = f"{seconds:.0f} s; " + say_segments(run.work / "memory", args.shard_bytes)

        return measure

    sides = in_turn({f"bge_ds, {times}x": work(times) for times in TIMES}, args.repeats, "memory")
    once, rows = sides[0].figures, []
    for side, times in zip(sides, TIMES, strict=True):
        # Shares of the same turn's: in_turn runs the smallest input first. Where that one failed there are none.
        side.figures = [peak / first for peak, first in zip(side.figures, once, strict=False)]
        size = f"{times * args.memory_bytes / 1e6:.0f} MB, 1 process"
        goal = "at most 1.1" if times > 1 else ""
        rows += rows_of("memory of preprocessing groups", size, "times the memory of 1x", [side], where, goal)
    return rows


def say_segments(folder: Path, shard_bytes: int) -> str:
    """What a row of the set memory is about; raises ValueError where a passage came twice."""
    manifest = manifest_of(folder)
    counts, segments = manifest["counts"], len({(entry["source"], entry["segment"]) for entry in manifest["shards"]})
    if counts["passages"] != GROUP * counts["groups"]:
        raise ValueError(f"{folder}: {counts['passages']} different passages in {counts['groups']} groups of {GROUP}")
    said = f"{counts['passages']} passages, none twice; {segments} segments of {shard_bytes / 2**20:.4g} MiB (--shard_bytes)"
    return said if shard_bytes == DEFAULT_SHARD else f"{said}, the command's default is {DEFAULT_SHARD / 2**20:.0f}"


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def open_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    """Once with one shard and once with so many that they hold --open_bytes: time and memory must not differ much."""
    shards = own_shards(args, run, "pretrain", lines_of(args, run, args.core_bytes))
    rows = []
    for size in (1, args.open_bytes):
        linked = own(run, "link", shards=shards, target=str(run.fresh(f"linked_{size}")), bytes=size)

        def work(side: Side, size: int = size) -> None:
            found = own(run, "open", shards=str(run.work / f"linked_{size}"))
            if found["mapped"] != [0, 1]:
                raise ValueError(f"shards mapped when opened, and after the last row: {found['mapped']}, not none and one")
            side.take(1e3 * found["seconds"], found["grown"])
            side.note = f"with the last row {1e3 * found['with_a_row']:.3g} ms and one shard mapped, none before"

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
            side.note = found.get("version", "")  # of a peer with an environment of its own

        return work

    asked = {"what": "reads", "texts": str(texts), "reads": args.reads, "batch": READ_AT_ONCE}
    sides = {
        "bge_ds": counted(lambda: own(run, "reads", shards=shards, reads=args.reads, batch=READ_AT_ONCE)),
        "datasets, numpy": counted(lambda: peer(run, "run_datasets.py", sys.executable, way="numpy", **asked)),
        "datasets, lists": counted(lambda: peer(run, "run_datasets.py", sys.executable, way="lists", **asked)),
        "datasets, Arrow": counted(lambda: peer(run, "run_datasets.py", sys.executable, way="arrow", **asked)),
        "MosaicML Streaming": counted(lambda: peer(run, "run_streaming.py", run.peer("streaming"), **asked)),
    }
    results = in_turn(sides, args.repeats, "reads")
    if len(tokens) > 1:
        raise ValueError(f"the sides read {sorted(tokens)} tokens: not the same texts, so their rates mean nothing")
    size = f"{READ_AT_ONCE} of {groups} groups at a time"
    return rows_of("random reads, groups of 8 texts", size, "groups/s", results, where, "10 times as fast")


def loader_set(args: argparse.Namespace, run: Run, where: str) -> list[dict]:
    """One worker, and none. The texts of pre-training are full, 512 tokens each."""
    source, length = str(args.data.absolute()), {"model": str(args.model.absolute()), "least_tokens": LENGTH}
    name = f"full_{args.full_texts}.jsonl"
    full = made_once(run, name, "own_pretraining.py", what="texts", source=source, count=args.full_texts, **length)
    rows, goal = [], "5 M tokens/s"
    for kind, data, batch in (("pretrain", full, 16), ("finetune", source, 32)):
        shards = own_shards(args, run, kind, data)

        full_step = batch * LENGTH if kind == "pretrain" else None

        def work(workers: int, shards=shards, batch=batch, full_step=full_step) -> Callable[[Side], None]:
            def measure(side: Side) -> None:
                asked = {"shards": shards, "batch": batch, "steps": args.loader_steps, "warm": 20, "workers": workers}
                found = own(run, "loader", **asked)
                if full_step and found["tokens"] != full_step * args.loader_steps:
                    raise ValueError(f"{found['tokens']} tokens in {args.loader_steps} steps: not all texts are full")
                side.figures.append(found["tokens"] / found["seconds"])

            return measure

        sides = {"bge_ds, one worker": work(1), "bge_ds, in the process itself": work(0)}
        results = in_turn(sides, args.repeats, f"loader, {kind}")
        size = f"{batch} texts of {LENGTH} tokens" if kind == "pretrain" else f"{batch} groups of 8"
        rows += rows_of(f"loader, {kind}", size, "tokens/s", results, where, goal)
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
        "tokenizer": tokenizer_set, "preprocess": preprocess_set, "memory": memory_set, "open": open_set,
        "reads": reads_set, "loader": loader_set, "resume": resume_set,
    }[name]  # fmt: skip
    return work(args, run, hardware(Shared("", 0, 0, 0), run.threads))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="groups as JSON lines, .gz or not, with seven negatives each")
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--bytes", type=int, default=10**9, help="JSON lines of the set preprocess")
    add("--core_bytes", type=int, default=10**8, help="JSON lines of the set tokenizer, and of the shard that open links")
    add("--memory_bytes", type=int, default=64 * 10**6, help=f"JSON lines of the set memory, taken {TIMES} times")
    add("--shard_bytes", type=int, default=32 << 20, help="a segment of the set memory; of the input, as in the command")
    add("--open_bytes", type=int, default=10**10, help="shards of the set open")
    add("--num_proc", type=int, default=2, help="processes of the set preprocess, on both sides")
    add("--reads", type=int, default=20_000, help="groups read")
    add("--full_texts", type=int, default=2000, help="texts of 512 tokens for the loader")
    add("--loader_steps", type=int, default=2000, help="batches of the loader")
    add("--resume_step", type=int, default=10**6)
    add_shared_flags(parser, "data", stepped=False)
    args = parser.parse_args(argv)
    if args.memory_bytes <= args.shard_bytes:
        parser.error(f"--memory_bytes {args.memory_bytes} is no more than --shard_bytes {args.shard_bytes}: raise it")
    return run_sets(args, run_set, DATA_COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
