"""Rendezvous: how the ranks of a run find rank 0 and connect to it, and the messages about ranks that do not.

Rank 0 hosts the store at MASTER_ADDR:MASTER_PORT, which the process group uses later, and publishes in it the port that it
listens at. The other ranks read it there, connect, and send the run's secret, which tells them from other programs.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from bge_ds.health.connections import Connection

KEY = "bge_ds/watch"


def host_store(world: int, timeout_s: float) -> tuple[dist.Store, str]:
    """(the store, rank 0's address: "" if it is the store's). Raises RuntimeError with a message for the user.

    Rank 0 hosts the store, unless the launcher's agent does, which may be on another host.
    """
    address, port = master_address()
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            address, port, world, is_master=not agent, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except RuntimeError as error:
        raise RuntimeError(
            f"rank 0 cannot meet the others at {address}:{port} ({str(error).splitlines()[0]}); where another run has the "
            "port, wait for its end or choose another by the launcher's --master_port"
        ) from error
    return store, own_address(address, port) if agent else ""


def publish(store: dist.Store, address: str, listener: socket.socket, secret: str) -> None:
    """On rank 0: publishes where it listens for the other ranks."""
    store.set(KEY, json.dumps({"address": address, "port": listener.getsockname()[1], "secret": secret}))


def find_rank_zero(rank: int, world: int, local: int, timeout_s: float) -> tuple[dist.Store, Connection, list[dict]]:
    """(the store, the connection to rank 0, its first messages) once it answers. The watching thread limits the time."""
    address, port = master_address()
    while True:
        try:
            # TCPStore would wait too, but it fills the log meanwhile.
            socket.create_connection((address, port), timeout=5).close()
            store = dist.TCPStore(address, port, world, False, timedelta(seconds=timeout_s), wait_for_workers=False)
            said = store.get(KEY)
            where = json.loads(said)
            connection = Connection(socket.create_connection((where["address"] or address, where["port"]), timeout=5))
            connection.send("hello", secret=where["secret"], rank=rank, name=socket.gethostname(), pid=os.getpid(), local=local)
            # The port may be that of an earlier run; another program that listens there now never answers.
            return store, connection, connection.wait(timeout_s, lambda: store.get(KEY) == said)  # noqa: B023
        except (OSError, RuntimeError):  # rank 0 has not started yet, or the store is that of an earlier run
            time.sleep(0.5)


def describe_absent(world: int, there: set[int], waited: str) -> str:
    """The message that names the ranks that have not joined, with their hosts if known. there: those that have joined."""
    address, port = master_address()
    hosts = hosts_of_ranks()
    absent = [f"rank {r}" + (f" (host {hosts[r]})" if r in hosts else "") for r in range(world) if r not in there]
    shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    return (
        f"{shown} did not come {waited}{f'; the hosts of the job are {nodes}' if nodes else ''}; look for their own "
        f"lines above, and whether their hosts reach {address}:{port}"
    )


def describe_no_answer(waited: str) -> str:
    """The message that rank 0 does not answer."""
    address, port = master_address()
    return (
        f"rank 0 does not answer at {address}:{port} {waited}; look for its own lines, and whether "
        f"{socket.gethostname()} reaches that address"
    )


def master_address() -> tuple[str, int]:
    """Where the store is, as the launcher sets it. Raises ValueError where it does not."""
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise ValueError(
            f"the environment has RANK and WORLD_SIZE but no {error.args[0]}: give the address of rank 0's host and a free "
            "port there as MASTER_ADDR and MASTER_PORT, or start by deepspeed or torchrun, which do"
        ) from None


def own_host() -> str:
    """Rank 0's host: its name and, if the ranks are on several hosts, its address."""
    address = os.environ.get("MASTER_ADDR", "")
    return socket.gethostname() + ("" if address in ("", "localhost", "127.0.0.1", "::1") else f", {address}")


def listen(backlog: int) -> socket.socket:
    with contextlib.suppress(OSError):  # a host without IPv6
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def own_address(address: str, port: int) -> str:
    """The address of this host that connects to address:port; "" if that is this host itself."""
    with socket.create_connection((address, port), timeout=5) as sock:
        own = sock.getsockname()[0]
        return "" if own == sock.getpeername()[0] else own


def hosts_of_ranks() -> dict[int, str]:
    """rank -> host, read from the command line of DeepSpeed's launcher; {} under another launcher."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return {}
    for word in words:
        if word.startswith("--world_info="):
            slots = json.loads(base64.urlsafe_b64decode(word.removeprefix("--world_info=")))
            return dict(enumerate(host for host, ranks in slots.items() for _ in ranks))
    return {}
