"""What the doctor makes of the hosts' answers: plain functions from what they told (`probing.py`) to findings and remedies.

`told` is host -> facts, of the hosts that answered, in the hostfile's order; what differs is held against the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
ALL = "all"  # in place of a host's name: what concerns them all
SMALLEST_RANK = 1 << 30  # bytes of host memory: Python, torch and deepspeed, before a model is loaded
MANY_CHECKPOINTS = 50  # with room for fewer, a run that keeps all of them may fill the disk
ROOMY = 0.8  # the share of a device's memory that may go to weights and states: activations need the rest


@dataclass(frozen=True)
class Finding:
    """One line of the table. printed: what processes said, to be shown as it is."""

    check: str
    host: str
    mark: str
    text: str
    remedy: str = ""
    printed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What the run would be. port: where the ranks meet. keep: --save_total_limit, None for all."""

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
class Needs:
    """What the model needs, in bytes a rank by kind; offloaded kinds are the host's. checkpoint: bytes of one, all ranks'."""

    parts: dict[str, float] = field(default_factory=dict)
    offloaded: tuple[str, ...] = ()
    checkpoint: float = 0.0


def size(number: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


def _alike(
    check: str, told: dict[str, dict], value: Callable[[dict], object], what: str, remedy: str, mark: str = FAILED
) -> Iterator[Finding]:
    """A finding for each host whose value is not the first one's; none where all are alike."""
    first = next(iter(told))
    wanted = value(told[first])
    for host, facts in told.items():
        if (found := value(facts)) != wanted:
            yield Finding(check, host, mark, f"{what} {found}, and {wanted} on {first}", remedy)


# ------------------------------------------------------------------------------------------------------ software, data


def software(told: dict[str, dict]) -> Iterator[Finding]:
    check, remedy = "versions", "install the same versions on every host"
    found = list(_alike(check, told, lambda facts: facts["python"], "Python", "use the same Python on every host"))
    for package in next(iter(told.values()))["versions"]:
        found += _alike(check, told, lambda facts, package=package: facts["versions"].get(package), package, remedy)
    for host, facts in told.items():
        missing = [name for name, version in facts["versions"].items() if version == "missing"]
        if missing:
            found.append(Finding(check, host, FAILED, f"not installed: {', '.join(missing)}", "pip install bge_ds there"))
        if "error" in facts["code"]:
            found.append(Finding(check, host, FAILED, f"bge_ds: {facts['code']['error']}", "install bge_ds there again"))
    if not any("bge_ds" in finding.text for finding in found):
        remedy = "bring the same checkout to every host; its version is the same and its files are not"
        found += _alike(check, told, lambda facts: facts["code"]["mark"], "bge_ds's files hash to", remedy)
    if not found:
        facts = next(iter(told.values()))
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        found = [Finding(check, ALL, OK, f"Python {facts['python']}, {versions}")]
    yield from found


def data(told: dict[str, dict], plan: Plan) -> Iterator[Finding]:
    for path in plan.data:
        check = "data"
        bad = [(host, facts["data"][path]["error"]) for host, facts in told.items() if "error" in facts["data"][path]]
        for host, error in bad:
            remedy = f"bring {path} to this host, at the same path (a shared folder does it), or mend --train_data"
            yield Finding(check, host, FAILED, error, remedy)
        whole = {host: facts for host, facts in told.items() if host not in dict(bad)}
        if not whole:
            continue
        remedy = f"copy {path} from one host to the others: each rank reads its own host's rows"
        differing = list(_alike(check, whole, lambda facts, path=path: facts["data"][path]["mark"][:16], f"{path} is", remedy))
        yield from differing
        if not differing and not bad:
            one = next(iter(whole.values()))["data"][path]
            of = f", {size(one['bytes'])}" if one["bytes"] else ""
            yield Finding(check, ALL, OK, f"{path}: {one['kind']}{of}, {one['mark'][:16]}")


def model(told: dict[str, dict], plan: Plan) -> Iterator[Finding]:
    if not plan.model:
        return
    check, found = "model", []
    remedy = f"bring {plan.model} to every host, at the same path"
    for host, facts in told.items():
        if "error" in facts["model"]:
            found.append(Finding(check, host, FAILED, facts["model"]["error"], remedy))
    told = {host: facts for host, facts in told.items() if "error" not in facts["model"]}
    if told:
        found += _alike(check, told, lambda facts: f"is a {facts['model']['kind']}'s", f"{plan.model}", remedy)
    if not found and next(iter(told.values()))["model"]["kind"] == "folder":
        files = next(iter(told.values()))["model"]["files"]
        for host, facts in told.items():
            others = facts["model"]["files"]
            differing = sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name))
            if differing:
                text = f"{plan.model} differs from the first host's in {', '.join(differing[:4])}"
                found.append(Finding(check, host, FAILED, text, "copy the folder from the first host: it must be one model"))
    elif not found:
        for host, facts in told.items():
            if not facts["model"]["revision"] and facts["variables"].get("HF_HUB_OFFLINE", "0") not in ("0", ""):
                text = f"{plan.model} is neither a folder nor in the hub's cache there, and HF_HUB_OFFLINE is set"
                remedy = "download it there first, or unset HF_HUB_OFFLINE; is it meant to be a path?"
                found.append(Finding(check, host, FAILED, text, remedy))
        held = {host: facts for host, facts in told.items() if facts["model"]["revision"]}
        if held:
            remedy = "remove it from the hub's cache of one of them, or give a folder that all share"
            found += _alike(check, held, lambda facts: facts["model"]["revision"], f"{plan.model} is revision", remedy)
    if not found:
        facts = next(iter(told.values()))["model"]
        count = len(facts.get("files", ()))
        what = f"{count} file{'s' * (count != 1)}, one model" if facts["kind"] == "folder" else "a name of the hub"
        if facts.get("revision"):
            what += f", revision {facts['revision'][:12]} in the cache"
        found = [Finding(check, ALL, OK, f"{plan.model}: {what}")]
    yield from found


# ------------------------------------------------------------------------------------------------------------ devices


def accelerators(told: dict[str, dict], plan: Plan) -> Iterator[Finding]:
    check, found = "devices", []
    bad = [host for host, facts in told.items() if "error" in facts["devices"]]
    for host in bad:
        remedy = "mend torch or the driver there: `python -c 'import torch; print(torch.cuda.device_count())'` must work"
        found.append(Finding(check, host, FAILED, told[host]["devices"]["error"], remedy))
    told = {host: facts for host, facts in told.items() if host not in bad}
    if not told:
        yield from found
        return
    found += _alike(check, told, lambda facts: facts["devices"]["kind"], "trains on", "give all hosts GPUs, or --use_cpu")
    for host, facts in told.items():
        of, slots = facts["devices"], plan.slots[host]
        if of["kind"] == "cpu":
            if of["unseen"]:
                text = f"nvidia-smi lists {len(of['unseen'])} GPUs and torch {facts['versions']['torch']} sees none"
                remedy = "install a torch build for CUDA that the driver knows, or give --use_cpu"
                found.append(Finding(check, host, FAILED, text, remedy))
            if facts["memory"] < slots * SMALLEST_RANK:
                text = f"{size(facts['memory'])} for {slots} ranks: each takes some {size(SMALLEST_RANK)} before it trains"
                found.append(Finding(check, host, WARNING, text, "lower the number of ranks"))
            if slots > facts["cores"]:
                text = f"{slots} ranks on {facts['cores']} cores: they wait for one another"
                found.append(Finding(check, host, WARNING, text, f"lower the number of ranks to {facts['cores']} or fewer"))
            continue
        count = len(of["names"])
        if slots > count:
            remedy = f"write slots={count}" if plan.hostfile else f"give --num_gpus {count}"
            found.append(Finding(check, host, FAILED, f"{slots} ranks and {count} GPUs", remedy))
        elif slots < count:
            found.append(Finding(check, host, WARNING, f"{slots} ranks leave {count - slots} of {count} GPUs idle"))
        if why := of.get("no_kernels"):
            text = f"the fused kernels do not run ({why}): attention and losses fall back to loops, which are slower"
            remedy = "take GPUs of compute capability 8.0 or above (A100 and later)"
            if "triton" in why:
                remedy = "pip install triton there, the version that its torch asks for (`pip show torch`)"
            found.append(Finding(check, host, WARNING, text, remedy))
        for k, (free, total) in enumerate(zip(of["free"][:slots], of["memory"], strict=False)):
            if free < ROOMY * total:
                text = f"GPU {k}: {size(total - free)} of its {size(total)} are in use already"
                remedy = "nvidia-smi shows by whom; wait for them or take other GPUs"
                found.append(Finding(check, host, WARNING, text, remedy))
    gpus = {host: facts for host, facts in told.items() if facts["devices"]["kind"] == "cuda"}
    if gpus:
        names = "the slowest GPU sets everybody's pace; take hosts of one kind"
        remedy = "install the same on every host: NCCL of other versions may not talk"
        kinds = lambda facts: ", ".join(sorted(set(facts["devices"]["names"])))  # noqa: E731
        found += _alike(check, gpus, kinds, "GPUs are", names, WARNING)
        found += _alike(check, gpus, lambda facts: facts["devices"]["cuda"], "torch's CUDA is", remedy)
        found += _alike(check, gpus, lambda facts: facts["devices"]["driver"], "the driver is", remedy, WARNING)
    if not found:
        facts = next(iter(told.values()))
        of = facts["devices"]
        what = f"{facts['cores']} cores, {size(facts['memory'])}, no GPU in use"
        if of["kind"] == "cuda":
            what = f"{len(of['names'])} x {of['names'][0]}, CUDA {of['cuda']}, driver {of['driver'] or 'unknown'}"
        found = [Finding(check, ALL, OK, what)]
    yield from found


def memory(told: dict[str, dict], plan: Plan, needs: Needs) -> Iterator[Finding]:
    """Weights, gradients and states against what the smallest device, or a host's share a rank, holds."""
    check = "memory"
    on_device = {kind: count for kind, count in needs.parts.items() if kind not in needs.offloaded}
    listed = ", ".join(f"{kind} {size(count)}" for kind, count in needs.parts.items())
    remedy = (
        "take a higher ZeRO stage (--deepspeed zero2, zero3), one that offloads (zero2_offload, zero3_offload), more ranks, "
        "or a smaller model"
    )
    for host, facts in told.items():
        slots, of = plan.slots[host], facts["devices"]
        if "error" in of:
            continue
        checks = []  # (bytes needed, bytes there, whose)
        if of["kind"] == "cuda":
            checks.append((sum(on_device.values()), min(of["memory"]), "of a GPU"))
            aside = sum(needs.parts[kind] for kind in needs.offloaded)
            if aside:
                checks.append((aside * slots, facts["memory"], f"of the host, {slots} ranks together"))
        else:
            checks.append((sum(needs.parts.values()), facts["memory"] / slots, "of host memory a rank"))
        for need, there, whose in checks:
            text = f"{size(need)} ({listed}) of {size(there)} {whose}"
            text += "" if "activations" in needs.parts else ", and activations"
            if need > there:
                yield Finding(check, host, FAILED, text, remedy)
            elif need > ROOMY * there:
                yield Finding(check, host, WARNING, f"{text}: little is left for activations", remedy)
            else:
                yield Finding(check, host, OK, text)


# -------------------------------------------------------------------------------------------------------------- disk


def output(
    told: dict[str, dict], plan: Plan, needs: Needs | None, written: dict | None, looked: dict[str, dict]
) -> Iterator[Finding]:
    """written: the first host's answer to `write`; looked: the others' to `look`."""
    if not plan.output_dir:
        return
    check, first = "output", next(iter(told))
    for host, facts in told.items():
        if "error" in facts["output"]:
            yield Finding(check, host, FAILED, facts["output"]["error"], "name a folder in --output_dir")
    room = told[first]["output"]
    if "error" in room or written is None:
        return
    if "error" in written:
        remedy = f"let this user write in {room['parent']}, or name another --output_dir"
        yield Finding(check, first, FAILED, f"cannot be written: {written['error']}", remedy)
        return
    blind = [host for host, answer in looked.items() if not answer.get("seen")]
    for host in blind:
        text = f"does not see what {first} writes into {room['parent']}"
        remedy = "mount one folder of all hosts at this path there, or name another --output_dir: checkpoints are one folder"
        yield Finding(check, host, FAILED, text, remedy)
    seen = f", one folder of all {len(told)} hosts" if looked and not blind else ""
    text = f"{size(room['free'])} free in {room['parent']}{seen}"
    if needs is None:
        yield Finding(check, first, OK, f"{text}; with --model_name_or_path, held against the size of checkpoints")
        return
    kept = plan.keep or 1
    need = needs.checkpoint * (kept + 1)
    text += f"; a checkpoint is {size(needs.checkpoint)}, and {kept} kept and one being written are {size(need)}"
    if need > room["free"]:
        remedy = f"free {size(need - room['free'])} there, name another --output_dir, or lower --save_total_limit"
        yield Finding(check, first, FAILED, text, remedy)
    elif plan.keep is None and (fit := int(room["free"] // needs.checkpoint)) < MANY_CHECKPOINTS:
        remedy = "give --save_total_limit N, which keeps the last N (and the best)"
        yield Finding(check, first, WARNING, f"{text}; no --save_total_limit: the disk is full after {fit}", remedy)
    else:
        yield Finding(check, first, OK, text)
