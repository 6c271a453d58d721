"""Rendezvous: how the ranks of a run find rank 0 and connect to it, and what is said of ranks that do not come.

Rank 0 hosts the store at MASTER_ADDR:MASTER_PORT, which the process group uses later, and publishes in it the port that it
listens at. The other ranks read it there, connect, and send the run's secret, so that no other program is taken for a rank.
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

from bge_ds.health.connections import Link

KEY = "bge_ds/watch"


def host_store(world: int, timeout_s: float) -> tuple[dist.Store, str]:
    """(the store that rank 0 hosts, rank 0's address: "" where the store is at it). Raises RuntimeError that a user can read.

    Where a launcher's agent hosts the store, rank 0 may be on another host than it.
    """
    address, port = meeting_point()
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
    """Rank 0: where it listens for the others."""
    store.set(KEY, json.dumps({"address": address, "port": listener.getsockname()[1], "secret": secret}))


def call_rank_zero(rank: int, world: int, local: int, timeout_s: float) -> tuple[dist.Store, Link, list[dict]]:
    """(the store, the connection to rank 0, its first messages) once it answers. The caller's thread limits the time."""
    address, port = meeting_point()
    while True:
        try:
            # TCPStore would wait too, but fills the log while nobody answers.
            socket.create_connection((address, port), timeout=5).close()
            store = dist.TCPStore(address, port, world, False, timedelta(seconds=timeout_s), wait_for_workers=False)
            said = store.get(KEY)
            where = json.loads(said)
            link = Link(socket.create_connection((where["address"] or address, where["port"]), timeout=5))
            link.send("hello", secret=where["secret"], rank=rank, name=socket.gethostname(), pid=os.getpid(), local=local)
            # After an earlier run's end another program may listen at its rank 0's port, and never answer.
            return store, link, link.wait(timeout_s, lambda: store.get(KEY) == said)  # noqa: B023
        except (OSError, RuntimeError):  # nobody there yet, or what is left of an earlier run
            time.sleep(0.5)


def describe_absent(world: int, there: set[int], waited: str) -> str:
    """For a person: the ranks that have not come, with their hosts where they are known. there: those that have."""
    address, port = meeting_point()
    hosts = hosts_of_ranks()
    absent = [f"rank {r}" + (f" (host {hosts[r]})" if r in hosts else "") for r in range(world) if r not in there]
    shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    return (
        f"{shown} did not come {waited}{f'; the hosts of the job are {nodes}' if nodes else ''}; look for their own "
        f"lines above, and whether their hosts reach {address}:{port}"
    )


def describe_no_answer(waited: str) -> str:
    """For a person: that rank 0 does not answer."""
    address, port = meeting_point()
    return (
        f"rank 0 does not answer at {address}:{port} {waited}; look for its own lines, and whether "
        f"{socket.gethostname()} reaches that address"
    )


def meeting_point() -> tuple[str, int]:
    """Where the ranks meet, as the launcher says. Raises ValueError where it does not."""
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise ValueError(
            f"the environment has RANK and WORLD_SIZE but no {error.args[0]}: give the address of rank 0's host and a free "
            "port there as MASTER_ADDR and MASTER_PORT, or start by deepspeed or torchrun, which do"
        ) from None


def own_host() -> str:
    """Of rank 0: its name, and the address that others reach it by, where that is one."""
    address = os.environ.get("MASTER_ADDR", "")
    return socket.gethostname() + ("" if address in ("", "localhost", "127.0.0.1", "::1") else f", {address}")


def listen(backlog: int) -> socket.socket:
    with contextlib.suppress(OSError):  # a host without IPv6
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def own_address(address: str, port: int) -> str:
    """This host's address as seen from where it talks to address:port; "" where that is this host itself."""
    with socket.create_connection((address, port), timeout=5) as sock:
        own = sock.getsockname()[0]
        return "" if own == sock.getpeername()[0] else own


def hosts_of_ranks() -> dict[int, str]:
    """rank -> host, where this process's launcher is DeepSpeed's, which has them in its command line."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return {}
    for word in words:
        if word.startswith("--world_info="):
            slots = json.loads(base64.urlsafe_b64decode(word.removeprefix("--world_info=")))
            return dict(enumerate(host for host, ranks in slots.items() for _ in ranks))
    return {}
