"""The sides of a comparison, each a process of its own with its own interpreter; standard library only.

On Linux a process starts with the peak memory of the one that started it, so the one that starts them stays small.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, TextIO

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Shared:
    """What all sides of one comparison share. batch: queries or texts a step; steps: with the warm-up."""

    counts: ClassVar[str] = "tokens"  # what the rates of a row are about

    what: str
    batch: int
    steps: int
    warmup: int
    bf16: bool = False
    cuda: bool = False
    model: str = ""
    data: str = ""
    learning_rate: float = 2e-5

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp32"


@dataclass(frozen=True)
class Setting(Shared):
    """Fine-tuning. group: passages a query."""

    group: int = 8
    query_max_len: int = 64
    passage_max_len: int = 256
    temperature: float = 0.02


@dataclass
class Result:
    """A side's timed steps, over all repeats; `figure` and `note` for a row that is no training run."""

    side: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    padded: list[int] = field(default_factory=list)
    peak_bytes: float = 0
    versions: dict[str, str] = field(default_factory=dict)
    figure: float | None = None
    note: str = ""

    @property
    def rates(self) -> list[float]:
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    def extend(self, record: dict, warmup: int) -> None:
        for name in ("seconds", "tokens", "padded"):
            getattr(self, name).extend(record[name][warmup:])
        self.peak_bytes = max(self.peak_bytes, record["peak_bytes"])
        self.versions, self.note = record["versions"], record.get("note", "")


class SideFailed(RuntimeError):
    """A side's process ended with an error; the message names its log."""


# ----------------------------------------------------------------------------------------------- data and processes


def open_lines(source: Path) -> TextIO:
    return (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8")


def write_groups(source: Path, target: Path, groups: int, negatives: int) -> None:
    """The first groups with enough negatives, each with its first positive and first negatives: nothing left to draw."""
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with open_lines(source) as lines, target.open("w", encoding="utf-8") as out:
        for line in lines:
            row = json.loads(line)
            if len(row["neg"]) < negatives:
                continue
            row = {"query": row["query"], "pos": row["pos"][:1], "neg": row["neg"][:negatives]}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
            if written == groups:
                return
    raise ValueError(
        f"{source}: {written} groups have {negatives} negatives or more, {groups} are needed; give more data, smaller batches "
        "or fewer --steps"
    )


def different_texts(source: Path) -> Iterator[str]:
    """The passages of a file in order, each once: `text` of a line, or the `pos` of a group."""
    seen = set()
    with open_lines(source) as lines:
        for line in lines:
            row = json.loads(line)
            for text in [row["text"]] if "text" in row else row["pos"]:
                if text not in seen:
                    seen.add(text)
                    yield text


def environment(threads: int, **more: str) -> dict[str, str]:
    settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # A trainer that sees several GPUs would spread one process over them.
    settings["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**os.environ, **settings, **more}


def launch(commands: list[list[str]], log: Path, environments: list[dict[str, str]], folder: Path = HERE.parent) -> str:
    """Run processes side by side in a folder; what they wrote to their standard output."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as errors:
        running = [
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder)
            for command, env in zip(commands, environments, strict=True)
        ]
        try:
            outputs = [process.communicate()[0] for process in running]
        finally:
            for process in running:
                process.kill()
    with log.open("a", encoding="utf-8") as errors:
        errors.write("".join(outputs))
    if any(process.returncode for process in running):
        raise SideFailed(f"{' '.join(commands[0][:3])} ... failed, see {log}:\n" + log.read_text(encoding="utf-8")[-1500:])
    return "".join(outputs)


def last_json(output: str) -> dict:
    (line,) = [line for line in output.splitlines() if line.startswith("{") and line.endswith("}")][-1:]
    return json.loads(line)


# ----------------------------------------------------------------------------------------------- the sides


@dataclass(frozen=True)
class Run:
    """Where the sides of one comparison run: interpreters, folder for what they write, cores."""

    envs: Path
    work: Path
    threads: int

    def peer(self, name: str) -> str:
        python = self.envs / name / "bin" / "python"
        if not python.exists():
            raise SideFailed(f"{python} is missing; run benchmarks/make_environments.sh {self.envs}")
        return str(python)

    def fresh(self, name: str) -> Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def shards_of(setting: Setting, run: Run) -> Path:
    """The data file as shards, made once."""
    return make_shards("finetune", setting, run, query_max_len=setting.query_max_len, passage_max_len=setting.passage_max_len)


def make_shards(kind: str, setting: Shared, run: Run, **lengths: int) -> Path:
    folder = Path(setting.data).with_suffix(".shards_" + "_".join(map(str, lengths.values())))
    if not folder.exists():
        command = [sys.executable, "-m", "bge_ds.preprocess", kind, "--input", setting.data, "--output", str(folder)]
        command += ["--tokenizer", setting.model, *words_of(lengths)]
        launch([command], run.work / "preprocess.log", [environment(run.threads)])
    return folder


def words_of(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run_ours(setting: Setting, run: Run, sub_batch_tokens: int | None = None) -> dict:
    """The fine-tuning command itself."""
    flags = {
        "train_data": shards_of(setting, run), "train_group_size": setting.group, "query_max_len": setting.query_max_len,
        "passage_max_len": setting.passage_max_len, "sentence_pooling_method": "mean", "temperature": setting.temperature,
        **({"sub_batch_tokens": sub_batch_tokens} if sub_batch_tokens else {}),
    }  # fmt: skip
    note = f"pieces of {sub_batch_tokens} tokens" if sub_batch_tokens else ""
    return run_command("bge_ds.finetune", flags, setting, run) | {"note": note}


def run_command(module: str, flags: dict, setting: Shared, run: Run) -> dict:
    """One of our training commands as it is; its metrics.jsonl, one line a step."""
    output = run.fresh("ours")
    flags = flags | {
        "output_dir": output, "model_name_or_path": setting.model, "per_device_train_batch_size": setting.batch,
        "max_steps": setting.steps, "learning_rate": setting.learning_rate, "logging_steps": 1, "save_strategy": "no",
        "train_sampling_strategy": "sequential", "overwrite_output_dir": True, "bf16": setting.bf16,
        "use_cpu": not setting.cuda,
    }  # fmt: skip
    launch([[sys.executable, "-m", module, *words_of(flags)]], run.work / "ours.log", [environment(run.threads)])
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = [round(step["tokens_per_second"] * step["seconds_per_step"]) for step in steps]
    return {
        "seconds": [step["seconds_per_step"] for step in steps],
        "tokens": tokens,
        "padded": tokens,  # what was computed: nothing is padded
        "peak_bytes": max(step["peak_memory_bytes"] for step in steps),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
    }


def run_peer(setting: Shared, run: Run, env: str, script: str, **more) -> dict:
    asked = {**asdict(setting), "what": "step", **more, "output": str(run.fresh(env))}
    command = [run.peer(env), str(HERE / "peers" / script), json.dumps(asked)]
    return last_json(launch([command], run.work / f"{env}.log", [environment(run.threads)]))


def flagembedding(setting: Setting, run: Run) -> dict:
    return run_peer(setting, run, "flagembedding", "run_flagembedding.py")


def sentence_transformers(loss: str, size: int = 0, tokens: int = 0) -> Callable:
    """sentence-transformers with its plain loss, or the cached one in pieces of `size` texts or of `tokens` tokens."""

    def side(setting: Setting, run: Run) -> dict:
        options = {"loss": loss, "mini_batch": size, "mini_batch_tokens": tokens}
        return run_peer(setting, run, "sentence_transformers", "run_sentence_transformers.py", **options)

    return side


def ask_parts(
    run: Run, asked: dict, ranks: int = 1, threads: int | None = None, peer: str | None = None, script: str = "own_parts.py"
) -> dict:
    """One measurement of a script of ours, or of FlagEmbedding's loss, on some ranks."""
    script = HERE / "peers" / "run_flagembedding.py" if peer else HERE / script
    command = [run.peer(peer) if peer else sys.executable, str(script), json.dumps(asked)]
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(sock.getsockname()[1])}
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))}
    environments = [
        environment(threads or run.threads, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks), **address, **paths)
        for r in range(ranks)
    ]
    return last_json(launch([command] * ranks, run.work / f"parts_{asked['what']}.log", environments))
