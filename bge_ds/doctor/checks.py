"""Checks of the hosts' facts, which `probe.py` collects: each function returns findings with remedies and contacts no host.

`hosts` maps the name of each host that answered to its facts, in the hostfile's order. The others are compared with the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
ALL = "all"  # in place of a host's name: the finding concerns all hosts
RANK_MEMORY = 1 << 30  # bytes of host memory that Python, torch and deepspeed take on a rank before a model is loaded
MANY_CHECKPOINTS = 50  # with room for fewer, a run without --save_total_limit may fill the disk
USABLE = 0.8  # fraction of a device's memory for weights and states: activations need the rest

Hosts = dict[str, dict]


@dataclass(frozen=True)
class Finding:
    """One line of the table. printed: output of processes, shown as it is."""

    check: str
    host: str
    status: str
    text: str
    remedy: str = ""
    printed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The run to be checked. slots: host -> ranks. port: of the rendezvous. keep: --save_total_limit; None: all are kept."""

    slots: dict[str, int]
    hostfile: str | None = None
    port: int = 29500
    keep: int | None = None
    data: tuple[str, ...] = ()
    model: str = ""
    output_dir: str = ""

    @property
    def ranks(self) -> int:
        return sum(self.slots.values())


@dataclass(frozen=True)
class Requirements:
    """parts: bytes a rank by kind (weights, ...). offloaded: the kinds in host memory. checkpoint: bytes of one, all ranks'."""

    parts: dict[str, float] = field(default_factory=dict)
    offloaded: tuple[str, ...] = ()
    checkpoint: float = 0.0


def size(number: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _differing(check: str, values: dict[str, Any], what: str, remedy: str, status: str = FAILED) -> list[Finding]:
    """A finding for each host (the keys of `values`) whose value differs from the first one's."""
    first = next(iter(values), "")
    return [
        Finding(check, host, status, f"{what} {value}, and {values[first]} on {first}", remedy)
        for host, value in values.items()
        if value != values[first]
    ]


def _errors(check: str, parts: dict[str, dict], remedy: str) -> tuple[list[Finding], dict[str, dict]]:
    """(a finding for each host whose part of the facts is an error, the parts of the other hosts)."""
    found = [Finding(check, host, FAILED, part["error"], remedy) for host, part in parts.items() if "error" in part]
    return found, {host: part for host, part in parts.items() if "error" not in part}


# ------------------------------------------------------------------------------------------------------ software, data


def software(hosts: Hosts) -> list[Finding]:
    """Versions of Python and the packages, and the files of bge_ds."""
    check, first = "versions", next(iter(hosts.values()))
    pythons = {host: facts["python"] for host, facts in hosts.items()}
    found = _differing(check, pythons, "Python", "use the same Python on every host")
    for package in first["versions"]:
        versions = {host: facts["versions"].get(package) for host, facts in hosts.items()}
        found += _differing(check, versions, package, "install the same versions on every host")
    for host, facts in hosts.items():
        missing = [name for name, version in facts["versions"].items() if version == "missing"]
        if missing:
            found.append(Finding(check, host, FAILED, f"not installed: {', '.join(missing)}", "pip install bge_ds there"))
        if "error" in facts["code"]:
            found.append(Finding(check, host, FAILED, f"bge_ds: {facts['code']['error']}", "install bge_ds there again"))
    if not any("bge_ds" in finding.text for finding in found):
        hashes = {host: facts["code"]["hash"] for host, facts in hosts.items()}
        remedy = "copy the same checkout to every host: the version is the same, but the files differ"
        found += _differing(check, hashes, "bge_ds's files hash to", remedy)
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return found or [Finding(check, ALL, OK, f"Python {first['python']}, {versions}")]


def data(hosts: Hosts, plan: Plan) -> list[Finding]:
    """Each entry of --train_data is on every host, with the same content."""
    check, findings = "data", []
    for path in plan.data:
        remedy = f"bring {path} to this host, at the same path (e.g. in a shared folder), or correct --train_data"
        found, entries = _errors(check, {host: facts["data"][path] for host, facts in hosts.items()}, remedy)
        remedy = f"copy {path} from one host to the others: each rank reads its own host's rows"
        found += _differing(check, {host: entry["hash"][:16] for host, entry in entries.items()}, f"{path} is", remedy)
        if not found:
            entry = next(iter(entries.values()))
            num_bytes = f", {size(entry['bytes'])}" if entry["bytes"] else ""
            found = [Finding(check, ALL, OK, f"{path}: {entry['kind']}{num_bytes}, {entry['hash'][:16]}")]
        findings += found
    return findings


def model(hosts: Hosts, plan: Plan) -> list[Finding]:
    """The model is on every host, or can be downloaded, and is the same everywhere."""
    if not plan.model:
        return []
    check, remedy = "model", f"bring {plan.model} to every host, at the same path"
    found, models = _errors(check, {host: facts["model"] for host, facts in hosts.items()}, remedy)
    found += _differing(check, {host: f"is a {held['kind']}'s" for host, held in models.items()}, plan.model, remedy)
    if found:
        return found
    first = next(iter(models.values()))
    if first["kind"] == "folder":
        files, text = first["files"], f"{counted(len(first['files']), 'file')}, one model"
        for host, held in models.items():
            names = sorted(name for name in files.keys() | held["files"] if files.get(name) != held["files"].get(name))
            if names:
                differing = f"{plan.model} differs from the first host's in {', '.join(names[:4])}"
                found.append(
                    Finding(check, host, FAILED, differing, "copy the folder from the first host: it must be one model")
                )
    else:
        text = "a name of the hub" + (f", revision {first['revision'][:12]} in the cache" if first["revision"] else "")
        for host, held in models.items():
            if not held["revision"] and hosts[host]["variables"].get("HF_HUB_OFFLINE", "0") not in ("0", ""):
                missing = f"{plan.model} is neither a folder nor in the hub's cache there, and HF_HUB_OFFLINE is set"
                remedy = "download it there first, or unset HF_HUB_OFFLINE; is it meant to be a path?"
                found.append(Finding(check, host, FAILED, missing, remedy))
        revisions = {host: held["revision"] for host, held in models.items() if held["revision"]}
        remedy = "remove it from the hub's cache of one of them, or give a folder that all share"
        found += _differing(check, revisions, f"{plan.model} is revision", remedy)
    return found or [Finding(check, ALL, OK, f"{plan.model}: {text}")]


# ------------------------------------------------------------------------------------------------------------ devices


def devices(hosts: Hosts, plan: Plan) -> list[Finding]:
    """GPUs or cores: enough for the ranks, usable, and of the same kind on every host."""
    check = "devices"
    remedy = "repair torch or the driver there: `python -c 'import torch; print(torch.cuda.device_count())'` must work"
    found, devices = _errors(check, {host: facts["devices"] for host, facts in hosts.items()}, remedy)
    kinds = {host: held["kind"] for host, held in devices.items()}
    found += _differing(check, kinds, "trains on", "give all hosts GPUs, or --use_cpu")
    for host, kind in kinds.items():
        found += (_cpu if kind == "cpu" else _gpus)(host, hosts[host], plan)
    gpus = {host: held for host, held in devices.items() if held["kind"] == "cuda"}
    names = {host: ", ".join(sorted(set(held["names"]))) for host, held in gpus.items()}
    remedy = "the slowest GPU sets the pace of all ranks; take hosts of one kind"
    found += _differing(check, names, "GPUs are", remedy, WARNING)
    remedy = "install the same on every host: NCCL of different versions may not communicate"
    found += _differing(check, {host: held["cuda"] for host, held in gpus.items()}, "torch's CUDA is", remedy)
    found += _differing(check, {host: held["driver"] for host, held in gpus.items()}, "the driver is", remedy, WARNING)
    if found:
        return found
    facts = next(iter(hosts.values()))
    held, text = facts["devices"], f"{facts['cores']} cores, {size(facts['memory'])}, no GPU in use"
    if held["kind"] == "cuda":
        text = f"{len(held['names'])} x {held['names'][0]}, CUDA {held['cuda']}, driver {held['driver'] or 'unknown'}"
    return [Finding(check, ALL, OK, text)]


def _cpu(host: str, facts: dict, plan: Plan) -> list[Finding]:
    check, found, slots, unseen = "devices", [], plan.slots[host], facts["devices"]["unseen"]
    if unseen:
        text = f"nvidia-smi lists {len(unseen)} GPUs and torch {facts['versions']['torch']} sees none"
        remedy = "install a torch build for a CUDA version that the driver supports, or give --use_cpu"
        found.append(Finding(check, host, FAILED, text, remedy))
    if facts["memory"] < slots * RANK_MEMORY:
        text = f"{size(facts['memory'])} for {slots} ranks: each takes about {size(RANK_MEMORY)} before it trains"
        found.append(Finding(check, host, WARNING, text, "lower the number of ranks"))
    if slots > facts["cores"]:
        text = f"{slots} ranks on {facts['cores']} cores: they wait for each other"
        found.append(Finding(check, host, WARNING, text, f"lower the number of ranks to {facts['cores']} or fewer"))
    return found


def _gpus(host: str, facts: dict, plan: Plan) -> list[Finding]:
    check, found, slots, gpus = "devices", [], plan.slots[host], facts["devices"]
    count = len(gpus["names"])
    if slots > count:
        remedy = f"write slots={count}" if plan.hostfile else f"give --num_gpus {count}"
        found.append(Finding(check, host, FAILED, f"{slots} ranks and {count} GPUs", remedy))
    elif slots < count:
        found.append(Finding(check, host, WARNING, f"{slots} ranks leave {count - slots} of {count} GPUs idle"))
    if why := gpus.get("no_kernels"):
        text = f"the fused kernels do not run ({why}): attention and losses fall back to loops, which are slower"
        remedy = "take GPUs of compute capability 8.0 or above (A100 and later)"
        if "triton" in why:
            remedy = "pip install triton there, the version that its torch requires (`pip show torch`)"
        found.append(Finding(check, host, WARNING, text, remedy))
    for index, (free, total) in enumerate(zip(gpus["free"][:slots], gpus["memory"], strict=False)):
        if free < USABLE * total:
            text = f"GPU {index}: {size(total - free)} of its {size(total)} are in use already"
            found.append(Finding(check, host, WARNING, text, "nvidia-smi shows by whom; wait for them or take other GPUs"))
    return found


def memory(hosts: Hosts, plan: Plan, required: Requirements) -> list[Finding]:
    """Whether weights, gradients and states fit the smallest GPU, or a rank's share of the host memory."""
    found, parts = [], required.parts
    offloaded = sum(parts[kind] for kind in required.offloaded)
    total = sum(parts.values())
    listed = ", ".join(f"{kind} {size(count)}" for kind, count in parts.items())
    remedy = (
        "take a higher ZeRO stage (--deepspeed zero2, zero3), one that offloads (zero2_offload, zero3_offload), more ranks, "
        "or a smaller model"
    )
    for host, facts in hosts.items():
        slots, held = plan.slots[host], facts["devices"]
        if "error" in held:
            continue
        if held["kind"] == "cpu":
            places = [(total, facts["memory"] / slots, "of host memory a rank")]
        else:
            places = [(total - offloaded, min(held["memory"]), "of a GPU")]
            if offloaded:
                places.append((offloaded * slots, facts["memory"], f"of the host, {slots} ranks together"))
        for needed, available, where in places:
            status, text = OK, f"{size(needed)} ({listed}) of {size(available)} {where}"
            text += "" if "activations" in parts else ", and activations"
            if needed > available:
                status = FAILED
            elif needed > USABLE * available:
                status, text = WARNING, f"{text}: little is left for activations"
            found.append(Finding("memory", host, status, text, "" if status == OK else remedy))
    return found


# -------------------------------------------------------------------------------------------------------------- disk


def output(
    hosts: Hosts, plan: Plan, required: Requirements | None, written: dict | None, seen: dict[str, dict]
) -> list[Finding]:
    """--output_dir can be written, is one folder of all hosts, and has room for the checkpoints.

    written: the first host's answer to `write`; seen: the other hosts' answers to `look`.
    """
    if not plan.output_dir:
        return []
    check, first = "output", next(iter(hosts))
    folders = {host: facts["output"] for host, facts in hosts.items()}
    found, _ = _errors(check, folders, "name a folder in --output_dir")
    if "error" in folders[first] or written is None:
        return found
    parent, free = folders[first]["parent"], folders[first]["free"]
    if "error" in written:
        remedy = f"let this user write in {parent}, or name another --output_dir"
        return [*found, Finding(check, first, FAILED, f"cannot be written: {written['error']}", remedy)]
    blind = [host for host, answer in seen.items() if not answer.get("seen")]
    remedy = "mount one folder of all hosts at this path there, or name another --output_dir: checkpoints are one folder"
    found += [Finding(check, host, FAILED, f"does not see what {first} writes into {parent}", remedy) for host in blind]
    text = f"{size(free)} free in {parent}" + (f", one folder of all {len(hosts)} hosts" if seen and not blind else "")
    if required is None:
        text += "; with --model_name_or_path, compared with the size of checkpoints"
        return [*found, Finding(check, first, OK, text)]
    kept, status, remedy = plan.keep or 1, OK, ""
    needed = required.checkpoint * (kept + 1)
    text += f"; a checkpoint is {size(required.checkpoint)}, and {kept} kept and one being written are {size(needed)}"
    if needed > free:
        status = FAILED
        remedy = f"free {size(needed - free)} there, name another --output_dir, or lower --save_total_limit"
    elif plan.keep is None and (fit := int(free // required.checkpoint)) < MANY_CHECKPOINTS:
        status, text = WARNING, f"{text}; no --save_total_limit: the disk is full after {fit}"
        remedy = "give --save_total_limit N, which keeps the last N (and the best)"
    return [*found, Finding(check, first, status, text, remedy)]
