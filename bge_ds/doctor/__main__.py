"""Looks over every host before a run: `python -m bge_ds.doctor [--hostfile HOSTS] [--output_dir DIR] ...`.

One table, a line a check and host, each failure with its remedy. Exit status 0: nothing failed; 1: something did; 2: the
command line or the hostfile is wrong, and nothing was contacted. Give it the flags and variables that the run will get.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NoReturn

from bge_ds.doctor import cluster, judging, meeting, probing
from bge_ds.doctor.cluster import MARK, Silence, Talk
from bge_ds.doctor.judging import ALL, FAILED, OK, SKIPPED, WARNING, Finding, Plan
from bge_ds.health import exit_codes

HERE = "this machine"
CPU_RANKS = 2  # without GPUs and --num_gpus, as the scripts of launch/ start them
WIDTH = 118
SHOWN = 4  # hosts that are well, a line each; more are one line
SHOWN_LINES = 40  # of what ranks printed last
TIMED_OUT = "Timeout ("  # what faulthandler prints where a rank's clock ran out
_CHATTER = ("[INFO]", "^^^^", "exits with return code")  # of the launcher and of tracebacks
_COLOURS = {OK: "32", WARNING: "33", FAILED: "31", SKIPPED: "36"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(exit_codes.MISTAKE, f"error: {message} (--help explains every flag)\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m bge_ds.doctor", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--hostfile", help="lines `NAME slots=N`; unset: this machine alone")
    add("--num_gpus", type=_positive, help="ranks on this machine, where there is no hostfile (default: its GPUs, else 2)")
    add("--output_dir", default="", help="of the run: seen by all hosts, with room for its checkpoints")
    add("--save_total_limit", type=_positive, help="of the run: how many checkpoints there must be room for")
    add("--model_name_or_path", default="", help="of the run: the same on all hosts, fits their memory")
    add("--train_data", nargs="+", default=[], help="of the run, PATH or PATH=WEIGHT: the same on all hosts")
    add("--cache_dir", default="", help="of the run")
    add("--deepspeed", default="auto", help="of the run: auto, a shipped config (zero1, ...) or a file")
    switch = {"nargs": "?", "const": True, "default": False, "type": _switch}
    add("--bf16", **switch, help="of the run, for the memory it takes")
    add("--fp16", **switch, help="of the run, for the memory it takes")
    add("--use_cpu", **switch, help="of the run: train on the CPU even where there is a GPU")
    for name in ("per_device_train_batch_size", "query_max_len", "passage_max_len", "max_seq_length", "sub_batch_tokens",
                 "per_device_train_tokens"):  # fmt: skip
        add(f"--{name}", type=_positive, help="of the run, for the memory of activations")
    add("--train_group_size", type=_positive, default=8, help="of the run, for the memory of activations")
    add("--timeout", type=_positive, default=120, help="seconds for the hosts' answers, and again for the test across ranks")
    # What this command starts elsewhere: a probe on each host, a test on each rank (the launcher adds --local_rank).
    add("--probe", action="store_true", help=argparse.SUPPRESS)
    add("--rank_test", help=argparse.SUPPRESS)
    add("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    args, others = parser.parse_known_args(argv)
    if others and (strange := _strangers(others)):
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if args.bf16 and args.fp16:
        parser.error("--bf16 and --fp16: give one of them")
    if args.hostfile and args.num_gpus:
        parser.error("--num_gpus is for this machine alone; with --hostfile the slots say how many ranks each host gets")
    return args


def _strangers(words: list[str]) -> list[str]:
    """Those of the words that no training command takes either: the flags of a run may all be given."""
    from bge_ds.config.arguments import FinetuneArguments, PretrainArguments  # they import transformers

    known = {field.name for kind in (FinetuneArguments, PretrainArguments) for field in dataclasses.fields(kind)}
    flags = [word for word in words if word.startswith("--")]
    strange = [word for word in flags if word[2:].split("=")[0].replace("-", "_") not in known]
    return strange or ([] if words[0].startswith("--") else words[:1])


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


# ---------------------------------------------------------------------------------------------------------- the table


class Table:
    """Prints findings as they come; `failed` once one was a failure."""

    def __init__(self, hosts: Iterable[str]):
        self.hosts = list(hosts)
        self.column = min(24, max(map(len, [*self.hosts, ALL])))
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.counts = dict.fromkeys((OK, WARNING, FAILED, SKIPPED), 0)

    @property
    def failed(self) -> bool:
        return self.counts[FAILED] > 0

    def add(self, findings: Iterable[Finding]) -> None:
        """The findings of one check: what several hosts share is one line that names them."""
        groups: dict[tuple, list[Finding]] = {}
        findings = list(findings)
        for finding in findings:
            self.counts[finding.mark] += 1
            groups.setdefault((finding.check, finding.mark, finding.text, finding.remedy), []).append(finding)
        merged = [self._merge(group) for group in groups.values()]
        well = [finding for finding in merged if finding.mark == OK and finding.host != ALL]
        for finding in merged:
            if len(well) > SHOWN and finding in well:
                if finding is well[0]:
                    self._print(dataclasses.replace(finding, host=f"{len(well)} hosts", text=f"such as {finding.text}"))
                continue
            self._print(finding)

    def _merge(self, group: list[Finding]) -> Finding:
        first, names = group[0], [finding.host for finding in group]
        if len(names) == 1:
            return first
        if len(names) == len(self.hosts):
            return dataclasses.replace(first, host=ALL)
        return dataclasses.replace(first, host=f"{len(names)} hosts", text=f"{', '.join(names)}: {first.text}")

    def _print(self, finding: Finding) -> None:
        mark = f"{finding.mark:<8}"
        if self.colour:
            mark = f"\033[{_COLOURS[finding.mark]}m{mark}\033[0m"
        indent = " " * (8 + 11 + self.column + 2)
        lines = _wrapped(finding.text, WIDTH - len(indent))
        if finding.remedy:
            lines += _wrapped(f"-> {finding.remedy}", WIDTH - len(indent))
        print(f"{mark}{finding.check:<11}{finding.host:<{self.column}}  {lines[0]}", flush=True)
        for line in lines[1:]:
            print(indent + line, flush=True)
        for line in finding.printed:
            print(f"    | {line}"[:WIDTH], flush=True)

    def close(self) -> None:
        said = ", ".join(f"{count} {mark}" for mark, count in self.counts.items() if count)
        print(f"{said}: {'not ready' if self.failed else 'ready'}", flush=True)


def _wrapped(line: str, width: int) -> list[str]:
    deeper = "   " if line.startswith("-> ") else "    "
    return textwrap.wrap(line, width, subsequent_indent=deeper, break_on_hyphens=False) or [""]


# ------------------------------------------------------------------------------------------------------- the hosts


@contextlib.contextmanager
def talking(commands: dict[str, list[str]]) -> Iterator[tuple[dict[str, Talk], ThreadPoolExecutor]]:
    """Probes on all hosts at once, and threads to ask them by; in the end they end."""
    with ThreadPoolExecutor(min(64, len(commands))) as pool:
        talks = {host: Talk(command) for host, command in commands.items()}
        try:
            yield talks, pool
        finally:
            list(pool.map(Talk.close, talks.values()))


def collect(futures: dict[str, Future], timeout_s: float) -> tuple[dict[str, dict], list[Finding]]:
    """(host -> answer, why the others gave none)."""
    answers, silent = {}, []
    for host, future in futures.items():
        try:
            answers[host] = future.result()
        except Silence as silence:
            silent.append(meeting.silence(host, silence.status, silence.said, timeout_s))
    return answers, silent


def examine(args: argparse.Namespace) -> bool:
    """All checks, printed as they are made; whether none failed. Raises ValueError before anything is contacted."""
    slots = cluster.read_hostfile(args.hostfile) if args.hostfile else {}
    variables, env_files = cluster.forwarded_variables() if args.hostfile else ({}, [])
    from bge_ds.doctor import sizing  # torch and transformers: what is wrong above is said at once

    plan = make_plan(args, slots or {HERE: args.num_gpus or sizing.gpus(args.use_cpu) or CPU_RANKS})
    config = sizing.read_config(args.deepspeed, plan.ranks, args.bf16, args.fp16)
    table = Table(plan.slots)
    if args.hostfile:
        files = f"; forwards {', '.join(env_files)}" if env_files else ""
        table.add([Finding("hostfile", ALL, OK, f"{_counted(len(slots), 'host')}, {_counted(plan.ranks, 'rank')}{files}")])
        options, has_address = os.environ.get("PDSH_SSH_ARGS_APPEND"), bool(os.environ.get("MASTER_ADDR"))
        table.add(meeting.launcher(bool(shutil.which("pdsh")), bool(options), has_address))
    address, told = os.environ.get("MASTER_ADDR", ""), {}
    with talking(probes(plan, variables)) as (talks, pool):
        question = {"data": plan.data, "model": plan.model, "output_dir": plan.output_dir}
        question |= {"cache_dir": args.cache_dir, "use_cpu": args.use_cpu}
        asked = {host: pool.submit(talk.ask, args.timeout, "facts", **question) for host, talk in talks.items()}
        size, sizeless = measure_model(args, config)  # meanwhile
        told, silent = collect(asked, args.timeout)
        table.add(silent)
        if told:
            address = address or next(iter(next(iter(told.values()))["addresses"]), "")
            needs = sizing.needs(size, config, plan.ranks) if size else None
            if args.hostfile and not silent:
                table.add([Finding("ssh", ALL, OK, f"{_counted(len(told), 'host')} let this user in")])
            table.add(judging.software(told))
            for judge in (judging.model, judging.data, judging.accelerators):
                table.add(judge(told, plan))
            table.add(judging.memory(told, plan, needs) if needs else sizeless)
            check_together(table, plan, {host: talks[host] for host in told}, pool, told, needs, address, args.timeout)
    if table.failed:
        table.add([Finding("gradients", ALL, SKIPPED, "the test across ranks waits until nothing above has failed")])
    else:
        on_cpu = next(iter(told.values()))["devices"]["kind"] == "cpu"
        outcome = test_ranks(plan, config.get("zero_optimization", {}), address, on_cpu, args.timeout)
        table.add(meeting.ranks(*outcome, plan.ranks, args.timeout))
    table.close()
    return not table.failed


def probes(plan: Plan, variables: dict[str, str]) -> dict[str, list[str]]:
    """Host -> the command that starts its probe; without a hostfile it takes no ssh."""
    words = ["bge_ds.doctor", "--probe"]
    if not plan.hostfile:
        return {host: [sys.executable, "-u", "-m", *words] for host in plan.slots}
    return {host: cluster.on_host(host, variables, *words) for host in plan.slots}


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def make_plan(args: argparse.Namespace, slots: dict[str, int]) -> Plan:
    from bge_ds.training.data_order import split_weights

    port = os.environ.get("MASTER_PORT", "29500")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ValueError(f"MASTER_PORT={port} is no port; set it to a number from 1 to 65535, or unset it")
    paths = tuple(split_weights(args.train_data)[0])
    return Plan(slots, args.hostfile, int(port), args.save_total_limit, paths, args.model_name_or_path, args.output_dir)


def check_together(table: Table, plan: Plan, talks: dict[str, Talk], pool, told, needs, address: str, timeout_s: int) -> None:
    """What takes two hosts to find out: the shared folder, the port, the way between them, the clocks."""
    first, *others = talks

    def ask(hosts: Iterable[str], do: str, **details) -> dict[str, dict]:
        asked = {host: pool.submit(talks[host].ask, timeout_s, do, **details) for host in hosts}
        answers, silent = collect(asked, timeout_s)
        table.add(silent)
        return answers

    written, looked = None, {}
    if plan.output_dir and "error" not in told[first]["output"]:
        where = {"folder": told[first]["output"]["parent"], "name": f".bge_ds-doctor-{uuid.uuid4().hex}"}
        written = ask([first], "write", **where).get(first)
        if written and "error" not in written:
            looked = ask(others, "look", **where)
    listened, connected = ask([first], "listen", port=plan.port).get(first), {}
    if listened and "error" not in listened and address:
        connected = ask(others, "connect", address=address, port=plan.port)
    times = ask(talks, "tell_time")
    table.add(judging.output(told, plan, needs, written, looked))
    if len(plan.slots) > 1:
        table.add(meeting.interfaces(told, connected))
        table.add(meeting.clocks(times))
    if listened:
        table.add(meeting.port(plan, first, address, listened, connected))


# ---------------------------------------------------------------------------------------------------------- the model


def texts_at_once(args: argparse.Namespace) -> tuple[int, int]:
    """(tokens that a rank computes at a time, length of a text) by the run's flags; (0, _) where they do not say."""
    length = args.max_seq_length or args.passage_max_len or 128
    tokens = args.sub_batch_tokens or args.per_device_train_tokens or 0
    if not tokens and args.per_device_train_batch_size:
        group = length if args.max_seq_length else (args.query_max_len or 32) + args.train_group_size * length
        tokens = args.per_device_train_batch_size * group
    return tokens, length


def measure_model(args: argparse.Namespace, config: dict):
    """The model's `sizing.Size`, or a finding that says why there is none; neither where no model is named."""
    from bge_ds.doctor import sizing

    half = any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    if not args.model_name_or_path:
        return None, []
    try:
        return sizing.measure(args.model_name_or_path, args.cache_dir, *texts_at_once(args), half), []
    except (OSError, ValueError) as error:
        remedy = "give a folder or a hub name that transformers' AutoConfig reads here"
        text = f"unknown, as the model's config cannot be read here: {str(error).strip().splitlines()[0]}"
        return None, [Finding("memory", ALL, FAILED, text, remedy)]


# ---------------------------------------------------------------------------------------------------------- the ranks


def test_ranks(
    plan: Plan, zero: dict, address: str, use_cpu: bool, timeout_s: int
) -> tuple[int | None, dict | None, list[str]]:
    """(the launcher's exit status, None: the time ran out; the first rank's result; what was printed last) of the test.

    Each rank ends by its own clock after `timeout_s`. So nothing is left running on other hosts when the launcher is
    killed here, which happens by SIGKILL: asked to stop, it would end every DeepSpeed run of this user on all the hosts.
    """
    task = json.dumps({"zero": zero, "use_cpu": use_cpu, "timeout_s": timeout_s})
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(plan.port)]
    if plan.hostfile:
        # The address is given and ssh has been tried, so the launcher asks for neither.
        command += ["--hostfile", plan.hostfile, "--force_multi", "--no_ssh_check", "--master_addr", address]
    else:
        command += ["--hostfile", os.devnull, "--num_gpus", str(plan.slots[HERE])]  # not the default one, should there be one
    # In letters that no shell on the way changes.
    command += ["--module", "bge_ds.doctor", "--rank_test", base64.urlsafe_b64encode(task.encode()).decode()]
    environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if use_cpu else {})}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        launcher = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            status = launcher.wait(timeout_s + 30)  # ranks start to count when they have started
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
        log.seek(0)
        printed = log.read()
    if TIMED_OUT in printed:
        status = None
    _, mark, rest = printed.partition(MARK)
    result = json.JSONDecoder().raw_decode(rest)[0] if mark else None
    lines = [line.rstrip() for line in printed.splitlines() if not any(word in line for word in (*_CHATTER, MARK))]
    lines = [line for line in lines if line.strip()]
    # Where ranks hung is told innermost first, below the line that says so; all else ends with what matters.
    hung = next((i for i, line in enumerate(lines) if TIMED_OUT in line), -SHOWN_LINES)
    return status, result, lines[hung:][:SHOWN_LINES]


def rank_test(task: str) -> int:
    """On each rank."""
    details = json.loads(base64.urlsafe_b64decode(task))
    faulthandler.dump_traceback_later(details["timeout_s"], exit=True)  # says where it hangs
    from bge_ds.distributed import collectives
    from bge_ds.doctor import selftest

    try:
        result = selftest.run(**details)
        if collectives.rank() == 0:
            print(MARK + json.dumps(result), flush=True)
    finally:
        collectives.leave()
    faulthandler.cancel_dump_traceback_later()
    return exit_codes.DONE


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.probe:
        probing.answer(sys.stdin, sys.stdout)
        return exit_codes.DONE
    if args.rank_test:
        return rank_test(args.rank_test)
    try:
        return exit_codes.DONE if examine(args) else exit_codes.FAILED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISTAKE


if __name__ == "__main__":
    sys.exit(main())
