"""Checks every host before a run: `python -m bge_ds.doctor [--hostfile HOSTS] [--output_dir DIR] ...`.

Prints one table, a line a check and host, each failure with its remedy. Exit status 0: nothing failed; 1: something did; 2: the
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
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from bge_ds.config.arguments import FinetuneArguments, PretrainArguments
from bge_ds.config.parser import CommandParser, positive_int, to_bool
from bge_ds.doctor import checks, cluster, network_checks, probe
from bge_ds.doctor.checks import ALL, FAILED, OK, SKIPPED, Finding, Hosts, Plan, Requirements, counted
from bge_ds.doctor.cluster import ANSWER, NoAnswer, ProbeProcess
from bge_ds.doctor.table import Table
from bge_ds.health import exit_codes

THIS_MACHINE = "this machine"
CPU_RANKS = 2  # without GPUs and --num_gpus, as the scripts of launch/ start them
SHOWN_LINES = 40  # of the last output of the ranks
TIMED_OUT = "Timeout ("  # what faulthandler prints when a rank's time runs out
_NOISE = ("[INFO]", "^^^^", "exits with return code")  # of the launcher and of tracebacks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m bge_ds.doctor", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--hostfile", help="lines `NAME slots=N`; unset: this machine alone")
    add("--num_gpus", type=positive_int, help="ranks on this machine, where there is no hostfile (default: its GPUs, else 2)")
    add("--output_dir", default="", help="of the run: seen by all hosts, with room for its checkpoints")
    add("--save_total_limit", type=positive_int, help="of the run: how many checkpoints there must be room for")
    add("--model_name_or_path", default="", help="of the run: the same on all hosts, fits their memory")
    add("--train_data", nargs="+", default=[], help="of the run, PATH or PATH=WEIGHT: the same on all hosts")
    add("--cache_dir", default="", help="of the run")
    add("--deepspeed", default="auto", help="of the run: auto, a shipped config (zero1, ...) or a file")
    switch = {"nargs": "?", "const": True, "default": False, "type": to_bool}
    add("--bf16", **switch, help="of the run, for the memory it takes")
    add("--fp16", **switch, help="of the run, for the memory it takes")
    add("--use_cpu", **switch, help="of the run: train on the CPU even where there is a GPU")
    for name in ("per_device_train_batch_size", "query_max_len", "passage_max_len", "max_seq_length", "sub_batch_tokens",
                 "per_device_train_tokens"):  # fmt: skip
        add(f"--{name}", type=positive_int, help="of the run, for the memory of activations")
    add("--train_group_size", type=positive_int, default=8, help="of the run, for the memory of activations")
    add("--timeout", type=positive_int, default=120, help="seconds for the hosts' answers, and again for the test across ranks")
    # What this command starts: a probe on each host, the test on each rank (the launcher adds --local_rank).
    add("--probe", action="store_true", help=argparse.SUPPRESS)
    add("--selftest", help=argparse.SUPPRESS)
    add("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    args, others = parser.parse_known_args(argv)
    if unknown := _unknown(others):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.bf16 and args.fp16:
        parser.error("--bf16 and --fp16: give one of them")
    if args.hostfile and args.num_gpus:
        parser.error("--num_gpus is for this machine alone; with --hostfile the slots say how many ranks each host gets")
    return args


def _unknown(words: list[str]) -> list[str]:
    """The words that no training command takes either: all flags of a run may be given."""
    known = {field.name for kind in (FinetuneArguments, PretrainArguments) for field in dataclasses.fields(kind)}
    flags = [word for word in words if word.startswith("--")]
    unknown = [word for word in flags if word[2:].split("=")[0].replace("-", "_") not in known]
    return unknown or [word for word in words[:1] if word not in flags]


# ------------------------------------------------------------------------------------------------------- the hosts


class Probes:
    """Probe processes on several hosts. Hosts that give no answer are added to the table."""

    def __init__(self, commands: dict[str, list[str]], table: Table, timeout_s: float):
        self.table, self.timeout_s = table, timeout_s
        self.pool = ThreadPoolExecutor(min(64, len(commands)) + 1)
        self.processes = {host: ProbeProcess(command) for host, command in commands.items()}

    def ask(self, hosts: Iterable[str], do: str, **details) -> Hosts:
        """Host -> answer; all are asked at the same time."""
        asked = {host: self.pool.submit(self.processes[host].ask, self.timeout_s, do, **details) for host in hosts}
        answers, missing = {}, []
        for host, future in asked.items():
            try:
                answers[host] = future.result()
            except NoAnswer as error:
                missing.append(network_checks.no_answer(host, error, self.timeout_s))
        self.table.add(missing)
        return answers

    def close(self) -> None:
        list(self.pool.map(ProbeProcess.close, self.processes.values()))
        self.pool.shutdown()


def examine(args: argparse.Namespace) -> bool:
    """Makes all checks and prints them; True: none failed. Raises ValueError before anything is contacted."""
    slots = cluster.read_hostfile(args.hostfile) if args.hostfile else {}
    variables, env_files = cluster.forwarded_variables() if args.hostfile else ({}, [])
    import torch  # only now: the errors above are reported at once

    from bge_ds.doctor import memory

    gpus = 0 if args.use_cpu else torch.cuda.device_count()
    plan = make_plan(args, slots or {THIS_MACHINE: args.num_gpus or gpus or CPU_RANKS})
    config = memory.read_config(args.deepspeed, plan.ranks, args.bf16, args.fp16)
    table = Table(plan.slots)
    address = os.environ.get("MASTER_ADDR", "")
    if plan.hostfile:
        files = f"; forwards {', '.join(env_files)}" if env_files else ""
        text = f"{counted(len(slots), 'host')}, {counted(plan.ranks, 'rank')}{files}"
        table.add([Finding("hostfile", ALL, OK, text)])
        has_options = bool(os.environ.get("PDSH_SSH_ARGS_APPEND"))
        table.add(network_checks.launcher(bool(shutil.which("pdsh")), has_options, bool(address)))
    words = ["bge_ds.doctor", "--probe"]
    commands = {host: [sys.executable, "-u", "-m", *words] for host in plan.slots}
    if plan.hostfile:
        commands = {host: cluster.on_host(host, variables, *words) for host in plan.slots}
    with contextlib.closing(Probes(commands, table, args.timeout)) as probes:
        measuring = probes.pool.submit(required_memory, args, config, plan.ranks)
        question = {"data": plan.data, "model": plan.model, "output_dir": plan.output_dir}
        hosts = probes.ask(plan.slots, "facts", cache_dir=args.cache_dir, use_cpu=args.use_cpu, **question)
        required, problems = measuring.result()
        if hosts:
            address = address or next(iter(next(iter(hosts.values()))["addresses"]), "")
            if plan.hostfile and len(hosts) == len(slots):
                table.add([Finding("ssh", ALL, OK, f"{counted(len(hosts), 'host')} let this user in")])
            table.add(checks.software(hosts))
            for check in (checks.model, checks.data, checks.devices):
                table.add(check(hosts, plan))
            table.add(checks.memory(hosts, plan, required) if required else problems)
            check_network(probes, plan, hosts, required, address)
    if table.failed:
        table.add([Finding("gradients", ALL, SKIPPED, "the test across ranks waits until nothing above has failed")])
    else:
        on_cpu = next(iter(hosts.values()))["devices"]["kind"] == "cpu"
        outcome = launch_selftest(plan, config.get("zero_optimization", {}), address, on_cpu, args.timeout)
        table.add(network_checks.ranks(*outcome, plan.ranks, args.timeout))
    table.close()
    return not table.failed


def make_plan(args: argparse.Namespace, slots: dict[str, int]) -> Plan:
    from bge_ds.training.data_order import split_weights

    port = os.environ.get("MASTER_PORT", "29500")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ValueError(f"MASTER_PORT={port} is no port; set it to a number from 1 to 65535, or unset it")
    paths = tuple(split_weights(args.train_data)[0])
    return Plan(slots, args.hostfile, int(port), args.save_total_limit, paths, args.model_name_or_path, args.output_dir)


def check_network(probes: Probes, plan: Plan, hosts: Hosts, required: Requirements | None, address: str) -> None:
    """The checks between hosts: the shared folder, the port, the interfaces, the clocks."""
    first, *others = hosts
    written, seen = None, {}
    if plan.output_dir and "error" not in hosts[first]["output"]:
        file = {"folder": hosts[first]["output"]["parent"], "name": f".bge_ds-doctor-{uuid.uuid4().hex}"}
        written = probes.ask([first], "write", **file).get(first)
        if written and "error" not in written:
            seen = probes.ask(others, "look", **file)
    listened, connected = probes.ask([first], "listen", port=plan.port).get(first), {}
    if listened and "error" not in listened and address:
        connected = probes.ask(others, "connect", address=address, port=plan.port)
    times = probes.ask(hosts, "tell_time")
    probes.table.add(checks.output(hosts, plan, required, written, seen))
    if len(plan.slots) > 1:
        probes.table.add(network_checks.interfaces(hosts, connected))
        probes.table.add(network_checks.clocks(times))
    if listened:
        probes.table.add(network_checks.port(plan, first, address, listened, connected))


def required_memory(args: argparse.Namespace, config: dict, ranks: int) -> tuple[Requirements | None, list[Finding]]:
    """What the model requires, None where none is named or its config cannot be read; in the latter case a finding."""
    from bge_ds.doctor import memory

    if not args.model_name_or_path:
        return None, []
    length = args.max_seq_length or args.passage_max_len or 128
    tokens = args.sub_batch_tokens or args.per_device_train_tokens or 0  # that a rank computes at a time; 0: unknown
    if not tokens and args.per_device_train_batch_size:
        group = length if args.max_seq_length else (args.query_max_len or 32) + args.train_group_size * length
        tokens = args.per_device_train_batch_size * group
    half = any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    try:
        size = memory.measure(args.model_name_or_path, args.cache_dir, tokens, length, half)
    except (OSError, ValueError) as error:
        text = f"unknown, as the model's config cannot be read here: {str(error).strip().splitlines()[0]}"
        remedy = "give a folder or a hub name that transformers' AutoConfig reads here"
        return None, [Finding("memory", ALL, FAILED, text, remedy)]
    return memory.requirements(size, config, ranks), []


# ---------------------------------------------------------------------------------------------------------- the ranks


def launch_selftest(
    plan: Plan, zero: dict, address: str, use_cpu: bool, timeout_s: int
) -> tuple[int | None, dict | None, list[str]]:
    """(the launcher's exit status, None: it timed out; the first rank's result; the last output) of the test across ranks.

    Each rank ends itself after `timeout_s`, so none is left on other hosts when the launcher is killed here. SIGKILL is
    needed: on other signals the launcher ends every DeepSpeed run of this user on all hosts.
    """
    task = json.dumps({"zero": zero, "use_cpu": use_cpu, "timeout_s": timeout_s})
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(plan.port)]
    if plan.hostfile:
        # ssh and the address have been checked, so the launcher need not.
        command += ["--hostfile", plan.hostfile, "--force_multi", "--no_ssh_check", "--master_addr", address]
    else:
        command += ["--hostfile", os.devnull, "--num_gpus", str(plan.slots[THIS_MACHINE])]  # not the default hostfile
    # In base64, which no shell on the way changes.
    command += ["--module", "bge_ds.doctor", "--selftest", base64.urlsafe_b64encode(task.encode()).decode()]
    environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if use_cpu else {})}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        launcher = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            status = launcher.wait(timeout_s + 30)  # the time of a rank begins when it has started
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
    _, found, rest = printed.partition(ANSWER)
    result = json.JSONDecoder().raw_decode(rest)[0] if found else None
    lines = [line.rstrip() for line in printed.splitlines() if not any(word in line for word in (*_NOISE, ANSWER))]
    lines = [line for line in lines if line.strip()]
    # A stack of a rank that hung is printed innermost first, below the line TIMED_OUT; other output ends with what matters.
    start = next((i for i, line in enumerate(lines) if TIMED_OUT in line), -SHOWN_LINES)
    return status, result, lines[start:][:SHOWN_LINES]


def run_selftest(task: str) -> None:
    """On each rank."""
    details = json.loads(base64.urlsafe_b64decode(task))
    faulthandler.dump_traceback_later(details["timeout_s"], exit=True)  # prints where it hangs
    from bge_ds.distributed import collectives
    from bge_ds.doctor import selftest

    try:
        result = selftest.run(**details)
        if collectives.rank() == 0:
            print(ANSWER + json.dumps(result), flush=True)
    finally:
        collectives.leave()
    faulthandler.cancel_dump_traceback_later()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.probe:
        probe.answer(sys.stdin, sys.stdout)
        return exit_codes.DONE
    if args.selftest:
        run_selftest(args.selftest)
        return exit_codes.DONE
    try:
        return exit_codes.DONE if examine(args) else exit_codes.FAILED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISTAKE


if __name__ == "__main__":
    sys.exit(main())
