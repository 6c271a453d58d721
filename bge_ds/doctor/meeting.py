"""What the doctor makes of the way to the hosts and between them: ssh, clocks, interfaces, the meeting place, the ranks.

As in `judging.py`, `told` is host -> facts of the hosts that answered.
"""

from __future__ import annotations

from collections.abc import Iterator

from bge_ds.doctor.cluster import NO_FOLDER, NO_PYTHON, SSH_LOST
from bge_ds.doctor.judging import ALL, FAILED, OK, WARNING, Finding, Plan, size

LARGEST_DIFFERENCE = 1e-4  # relative, of fp32 gradients summed in another order
LARGEST_CLOCK_DIFFERENCE_S = 5.0


def silence(host: str, status: int | None, said: list[str], timeout_s: float) -> Finding:
    """Why a host gave no answer, by how its ssh ended."""
    last = said[-1] if said else "without a word"
    if status is None:
        remedy = f"look whether `ssh {host} true` ends and the host's disks answer; --timeout takes more seconds"
        return Finding("ssh", host, FAILED, f"no answer within {timeout_s:.0f} s", remedy)
    if status == SSH_LOST:
        if "permission denied" in last.lower():
            remedy = f"let this user in without a password: ssh-copy-id {host}"
        elif "host key" in last.lower():
            remedy = f"accept its key once: ssh {host} true"
        else:
            remedy = (
                f"look whether it is up, its name right and sshd running: `ssh {host} true` must work; its port and key belong "
                "into ~/.ssh/config or PDSH_SSH_ARGS_APPEND; or take it out of the hostfile"
            )
        return Finding("ssh", host, FAILED, f"cannot be reached: {last}", remedy)
    if status == NO_FOLDER:
        return Finding("python", host, FAILED, "this working folder does not exist there", "start from a folder all hosts have")
    if status == NO_PYTHON:
        remedy = "install the environment at the same path on every host: the launcher starts this very Python there"
        return Finding("python", host, FAILED, "this Python does not exist there", remedy)
    remedy = "install bge_ds there, the same version in the same environment, and look at what it said"
    return Finding("python", host, FAILED, f"the probe ended with status {status}: {last}", remedy)


def launcher(has_pdsh: bool, has_ssh_options: bool, has_address: bool) -> Iterator[Finding]:
    """What the launcher needs on the machine that it is started on."""
    if not has_pdsh:
        yield Finding("launcher", ALL, FAILED, "no pdsh here: the launcher starts every host by it", "install pdsh (apt, dnf)")
    if has_ssh_options and not has_address:
        text = "PDSH_SSH_ARGS_APPEND is set: the launcher asks the first host for its address without these options"
        remedy = "set MASTER_ADDR to the first host's address (launch/finetune_multinode.sh wants it), or use ~/.ssh/config"
        yield Finding("launcher", ALL, WARNING, text, remedy)


def clocks(times: dict[str, dict]) -> Iterator[Finding]:
    """times: host -> its answer to `tell_time`, with when it was asked and answered by the clock here."""
    if not times:
        return
    ahead = {host: answer["time"] - (answer["sent"] + answer["received"]) / 2 for host, answer in times.items()}
    first = next(iter(ahead))
    worst = max(abs(seconds - ahead[first]) for seconds in ahead.values())
    for host in ahead:
        if abs(difference := ahead[host] - ahead[first]) > LARGEST_CLOCK_DIFFERENCE_S:
            text = f"{abs(difference):.0f} s {'ahead of' if difference > 0 else 'behind'} {first}"
            remedy = "let a time service (chrony, systemd-timesyncd) run: logs and files' times of the hosts do not fit"
            yield Finding("clock", host, WARNING, text, remedy)
    if worst <= LARGEST_CLOCK_DIFFERENCE_S:
        yield Finding("clock", ALL, OK, f"at most {worst:.1f} s apart")


def meant(setting: str, name: str, exact: bool) -> bool:
    """Whether the value of GLOO_SOCKET_IFNAME (exact names) or NCCL_SOCKET_IFNAME (beginnings; = exact, ^ not) means `name`."""
    inverse, setting = setting.startswith("^"), setting.removeprefix("^")
    exact, setting = exact or setting.startswith("="), setting.removeprefix("=")
    hit = any(name == word or (not exact and name.startswith(word)) for word in setting.split(",") if word)
    return hit != inverse


def interfaces(told: dict[str, dict], connected: dict[str, dict]) -> Iterator[Finding]:
    """The interface that the ranks talk by: named and there with an address, or, unnamed, what each host would take.

    connected: host -> answer to `connect`, whose `from` is the address that reaches the first host."""
    check = "interface"
    for host, facts in told.items():
        found = {name: held for name, held in facts["interfaces"].items() if name != "lo"}
        gpu = facts["devices"].get("kind") == "cuda"
        variable = "NCCL_SOCKET_IFNAME" if gpu else "GLOO_SOCKET_IFNAME"
        setting = facts["variables"].get(variable)
        shown = ", ".join(f"{name} {held[0] if held else 'without an address'}" for name, held in sorted(found.items()))
        where = "in .deepspeed_env (a name=value line there reaches all hosts)"
        reaches = connected.get(host, {}).get("from") or next(iter(facts["addresses"]), "")
        right = next((name for name, held in found.items() if reaches in held), "")
        if setting:
            named = [name for name in facts["interfaces"] if meant(setting, name, exact=not gpu)]
            held = [name for name in named if facts["interfaces"][name]]
            if not held:
                what = f"{', '.join(named)} has no address" if named else "no such interface"
                remedy = f"name one of these {where}: {shown or 'none has an address'}"
                yield Finding(check, host, FAILED, f"{variable}={setting}: {what}", remedy)
            elif right and right not in held:
                text = f"{variable}={setting}, and the way between the hosts is by {right}"
                mark = FAILED if held == ["lo"] else WARNING  # there may be a second, faster network
                yield Finding(check, host, mark, text, f"set {variable}={right} {where}, unless the hosts share {held[0]} too")
            else:
                taken = right or held[0]
                yield Finding(check, host, OK, f"{variable}={setting}: {taken} {facts['interfaces'][taken][0]}")
        elif not gpu and (facts["own_address"].startswith("127.") or not facts["own_address"]):
            # Measured: gloo listens at what the host's name stands for, and the others are refused there.
            text = f"{variable} is not set, and the host's own name stands for {facts['own_address'] or 'no address'}"
            yield Finding(check, host, FAILED, text, f"set {variable}={right or 'NAME'} {where}; here are {shown}")
        elif sum(1 for held in found.values() if held) > 1:
            remedy = f"set {variable}={right or 'NAME'} {where}"
            yield Finding(check, host, WARNING, f"{variable} is not set, and there are several: {shown}", remedy)
        else:
            yield Finding(check, host, OK, shown or "unknown")


def port(plan: Plan, first: str, address: str, listened: dict, connected: dict[str, dict]) -> Iterator[Finding]:
    """The place where the ranks meet: free on the first host, open to the others."""
    check = "port"
    if plan.hostfile and not address:
        text = "`hostname -I` gives no address there, and the ranks meet at it"
        yield Finding(check, first, FAILED, text, "set MASTER_ADDR to an address of it that the other hosts reach")
        return
    if "error" in listened:
        remedy = (
            f"`ss -ltnp` on {first} shows who has it (an earlier run's ranks?): end it, or set MASTER_PORT to a free port, "
            "here and for the run"
        )
        yield Finding(check, first, FAILED, f"{plan.port} cannot be had: {listened['error']}", remedy)
        return
    for host, answer in connected.items():
        if "error" in answer:
            remedy = (
                f"open the firewall between the hosts for all ports (ranks take others too), or name an address of {first} "
                f"that {host} reaches in MASTER_ADDR"
            )
            yield Finding(check, host, FAILED, f"cannot connect to {address}:{plan.port}: {answer['error']}", remedy)
    if not any("error" in answer for answer in connected.values()):
        reached = f", reached at {address} by the others" if connected else ""
        yield Finding(check, first, OK, f"{plan.port} is free{reached}")


def ranks(status: int | None, result: dict | None, printed: list[str], wanted: int, timeout_s: float) -> Iterator[Finding]:
    """What came of the test across ranks. status: the launcher's, None where the time ran out; result: the first rank's."""
    check, said = "gradients", tuple(printed)
    if result is None:
        what = f"no result within {timeout_s:.0f} s" if status is None else f"the launcher ended with status {status}"
        remedy = (
            "read what was printed last, below; a rank that hung shows where (File ...), and a wrong interface or a firewall "
            f"is the usual cause (NCCL_DEBUG=INFO says more); --timeout gives more than {timeout_s:.0f} s"
        )
        yield Finding(check, ALL, FAILED, what, remedy, said or ("nothing was printed",))
        return
    count = f"{result['ranks']} rank{'s' * (result['ranks'] > 1)}"
    text = f"{count} against one process, ZeRO {result['stage']}: largest relative difference {result['difference']:.1e}"
    if result["ranks"] != wanted:
        remedy = "look at the hostfile and at CUDA_VISIBLE_DEVICES: the launcher counts otherwise"
        yield Finding(check, ALL, FAILED, f"{text}; {wanted} ranks were to start", remedy)
    elif not result["difference"] < LARGEST_DIFFERENCE:  # nan too
        remedy = "do not train: ranks add up wrong gradients; hold the versions of torch, deepspeed and NCCL against others"
        yield Finding(check, ALL, FAILED, f"{text}, and less than {LARGEST_DIFFERENCE:g} is right", remedy)
    elif status != 0:
        remedy = "the test itself went well; look at what the ranks said when they left, below"
        ended = "did not end" if status is None else f"ended with status {status}"
        yield Finding(check, ALL, WARNING, f"{text}; the launcher {ended}", remedy, said)
    else:
        yield Finding(check, ALL, OK, text)
    if result.get("bytes_per_second"):
        text = f"all_reduce of 16 MiB: {size(result['bytes_per_second'])}/s a rank, {result['seconds'] * 1000:.1f} ms"
        yield Finding("bandwidth", ALL, OK, text)
