"""Checks of the network: ssh to the hosts, their clocks, interfaces, the rendezvous port, and the test across ranks.

As in `checks.py`, `hosts` maps each host that answered to its facts, and nothing here contacts a host.
"""

from __future__ import annotations

from bge_ds.doctor.checks import ALL, FAILED, OK, WARNING, Finding, Hosts, Plan, counted, size
from bge_ds.doctor.cluster import NO_FOLDER, NO_PYTHON, SSH_FAILED, NoAnswer

LARGEST_DIFFERENCE = 1e-4  # relative, of fp32 gradients summed in another order
LARGEST_CLOCK_DIFFERENCE_S = 5.0


def no_answer(host: str, error: NoAnswer, timeout_s: float) -> Finding:
    """Why a host gave no answer, by how its ssh ended."""
    last, check = error.printed[-1] if error.printed else "without output", "python"
    if error.status is None:
        check, text = "ssh", f"no answer within {timeout_s:.0f} s"
        remedy = f"check whether `ssh {host} true` ends and the host's disks answer; --timeout takes more seconds"
    elif error.status == SSH_FAILED:
        check, text = "ssh", f"cannot be reached: {last}"
        if "permission denied" in last.lower():
            remedy = f"let this user in without a password: ssh-copy-id {host}"
        elif "host key" in last.lower():
            remedy = f"accept its key once: ssh {host} true"
        else:
            remedy = (
                f"check that it is up, its name is right and sshd runs: `ssh {host} true` must work; its port and key belong "
                "into ~/.ssh/config or PDSH_SSH_ARGS_APPEND; or take it out of the hostfile"
            )
    elif error.status == NO_FOLDER:
        text, remedy = "this working folder does not exist there", "start from a folder all hosts have"
    elif error.status == NO_PYTHON:
        text = "this Python does not exist there"
        remedy = "install the environment at the same path on every host: the launcher starts this very Python there"
    else:
        text = f"the probe ended with status {error.status}: {last}"
        remedy = "install bge_ds there, the same version in the same environment, and read its output"
    return Finding(check, host, FAILED, text, remedy)


def launcher(has_pdsh: bool, has_ssh_options: bool, has_address: bool) -> list[Finding]:
    """What the launcher needs on the machine where it is started."""
    check, found = "launcher", []
    if not has_pdsh:
        text = "no pdsh here: the launcher starts every host with it"
        found.append(Finding(check, ALL, FAILED, text, "install pdsh (apt, dnf)"))
    if has_ssh_options and not has_address:
        text = "PDSH_SSH_ARGS_APPEND is set: the launcher asks the first host for its address without these options"
        remedy = "set MASTER_ADDR to the first host's address (launch/finetune_multinode.sh needs it), or use ~/.ssh/config"
        found.append(Finding(check, ALL, WARNING, text, remedy))
    return found


def clocks(times: dict[str, dict]) -> list[Finding]:
    """times: host -> its answer to `tell_time`, with when it was asked and answered by the clock here."""
    ahead = {host: answer["time"] - (answer["sent"] + answer["received"]) / 2 for host, answer in times.items()}
    first = next(iter(ahead), "")
    apart = {host: seconds - ahead[first] for host, seconds in ahead.items()}
    remedy = "run a time service (chrony, systemd-timesyncd): times in logs and of files differ between the hosts"
    found = [
        Finding("clock", host, WARNING, f"{abs(s):.0f} s {'ahead of' if s > 0 else 'behind'} {first}", remedy)
        for host, s in apart.items()
        if abs(s) > LARGEST_CLOCK_DIFFERENCE_S
    ]
    if apart and not found:
        found = [Finding("clock", ALL, OK, f"at most {max(map(abs, apart.values())):.1f} s apart")]
    return found


def selects(setting: str, name: str, exact: bool) -> bool:
    """Whether GLOO_SOCKET_IFNAME (exact names) or NCCL_SOCKET_IFNAME (prefixes; = exact, ^ not) selects interface `name`."""
    inverse, setting = setting.startswith("^"), setting.removeprefix("^")
    exact, setting = exact or setting.startswith("="), setting.removeprefix("=")
    hit = any(name == word or (not exact and name.startswith(word)) for word in setting.split(",") if word)
    return hit != inverse


def interfaces(hosts: Hosts, connected: dict[str, dict]) -> list[Finding]:
    """The network interface that the ranks use: the one that the variable names, or what each host would choose.

    connected: host -> answer to `connect`, whose `from` is the address that reaches the first host."""
    return [_interface(host, facts, connected.get(host, {}).get("from")) for host, facts in hosts.items()]


def _interface(host: str, facts: dict, address: str | None) -> Finding:
    gpu = facts["devices"].get("kind") == "cuda"
    variable = "NCCL_SOCKET_IFNAME" if gpu else "GLOO_SOCKET_IFNAME"
    setting = facts["variables"].get(variable)
    external = {name: addresses for name, addresses in facts["interfaces"].items() if name != "lo"}
    shown = ", ".join(f"{name} {held[0] if held else 'without an address'}" for name, held in sorted(external.items()))
    address = address or next(iter(facts["addresses"]), "")
    right = next((name for name, addresses in external.items() if address in addresses), "")
    where = "in .deepspeed_env (a name=value line there reaches all hosts)"
    remedy, status = f"set {variable}={right or 'NAME'} {where}", FAILED
    if setting:
        selected = [name for name in facts["interfaces"] if selects(setting, name, exact=not gpu)]
        usable = [name for name in selected if facts["interfaces"][name]]
        if not usable:
            what = f"{', '.join(selected)} has no address" if selected else "no such interface"
            text = f"{variable}={setting}: {what}"
            remedy = f"name one of these {where}: {shown or 'none has an address'}"
        elif right and right not in usable:
            status = FAILED if usable == ["lo"] else WARNING  # there may be a second, faster network
            text = f"{variable}={setting}, and the way between the hosts is by {right}"
            remedy += f", unless the hosts share {usable[0]} too"
        else:
            taken = right or usable[0]
            status, text = OK, f"{variable}={setting}: {taken} {facts['interfaces'][taken][0]}"
    elif not gpu and (facts["own_address"].startswith("127.") or not facts["own_address"]):
        # Measured: gloo listens at the address of the host's name, and the other hosts are refused there.
        text = f"{variable} is not set, and the host's own name stands for {facts['own_address'] or 'no address'}"
        remedy += f"; here are {shown}"
    elif sum(map(bool, external.values())) > 1:
        status, text = WARNING, f"{variable} is not set, and there are several: {shown}"
    else:
        status, text = OK, shown or "unknown"
    return Finding("interface", host, status, text, "" if status == OK else remedy)


def port(plan: Plan, first: str, address: str, listened: dict, connected: dict[str, dict]) -> list[Finding]:
    """The rendezvous port: free on the first host, open to the others.

    listened: the first host's answer to `listen`; connected: the others' to `connect`."""
    check = "port"
    if plan.hostfile and not address:
        text = "`hostname -I` gives no address there, and the ranks need one to connect to"
        return [Finding(check, first, FAILED, text, "set MASTER_ADDR to an address of it that the other hosts reach")]
    if "error" in listened:
        remedy = (
            f"`ss -ltnp` on {first} shows who has it (an earlier run's ranks?): end it, or set MASTER_PORT to a free port, "
            "here and for the run"
        )
        return [Finding(check, first, FAILED, f"{plan.port} cannot be had: {listened['error']}", remedy)]
    found = []
    for host, answer in connected.items():
        if "error" in answer:
            text = f"cannot connect to {address}:{plan.port}: {answer['error']}"
            remedy = (
                f"open the firewall between the hosts for all ports (ranks take others too), or name an address of {first} "
                f"that {host} reaches in MASTER_ADDR"
            )
            found.append(Finding(check, host, FAILED, text, remedy))
    reached = f", reached at {address} by the others" if connected else ""
    return found or [Finding(check, first, OK, f"{plan.port} is free{reached}")]


def ranks(status: int | None, result: dict | None, printed: list[str], wanted: int, timeout_s: float) -> list[Finding]:
    """The test across ranks. status: the launcher's exit status, None: it timed out. result: the first rank's."""
    check = "gradients"
    if result is None:
        text = f"no result within {timeout_s:.0f} s" if status is None else f"the launcher ended with status {status}"
        remedy = (
            "read the last output, below; a rank that hung shows where (File ...), and a wrong interface or a firewall is the "
            f"usual cause (NCCL_DEBUG=INFO says more); --timeout gives more than {timeout_s:.0f} s"
        )
        return [Finding(check, ALL, FAILED, text, remedy, tuple(printed) or ("nothing was printed",))]
    text = f"{counted(result['ranks'], 'rank')} against one process, ZeRO {result['stage']}: "
    text += f"largest relative difference {result['difference']:.1e}"
    if result["ranks"] != wanted:
        remedy = "look at the hostfile and at CUDA_VISIBLE_DEVICES: the launcher counts otherwise"
        finding = Finding(check, ALL, FAILED, f"{text}; {wanted} ranks were to start", remedy)
    elif not result["difference"] < LARGEST_DIFFERENCE:  # nan too
        remedy = "do not train: the ranks sum gradients wrongly; try other versions of torch, deepspeed and NCCL"
        finding = Finding(check, ALL, FAILED, f"{text}, and less than {LARGEST_DIFFERENCE:g} is right", remedy)
    elif status != 0:
        ended = "did not end" if status is None else f"ended with status {status}"
        remedy = "the test itself passed; look at what the ranks printed at their end, below"
        finding = Finding(check, ALL, WARNING, f"{text}; the launcher {ended}", remedy, tuple(printed))
    else:
        finding = Finding(check, ALL, OK, text)
    if not result.get("bytes_per_second"):
        return [finding]
    text = f"all_reduce of 16 MiB: {size(result['bytes_per_second'])}/s a rank, {result['seconds'] * 1000:.1f} ms"
    return [finding, Finding("bandwidth", ALL, OK, text)]
