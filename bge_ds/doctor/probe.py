"""The probe of one host: it reports versions, data, devices, network and disk, and removes what it made to find out."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import bge_ds
from bge_ds.doctor.cluster import ANSWER

PACKAGES = ("torch", "deepspeed", "transformers")
VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "HF_HUB_OFFLINE")
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")


def answer(questions: Iterable[str], out: TextIO) -> None:
    """Answers until the questions (lines of JSON) end, then removes what it made (a file, an open port)."""
    with ExitStack() as cleanup:
        for line in questions:
            question = json.loads(line)
            try:
                found = _ANSWERS[question.pop("do")](cleanup, **question)
            except OSError as error:
                found = {"error": str(error)}
            print(ANSWER + json.dumps({**found, "time": time.time()}), file=out, flush=True)


def facts(cleanup: ExitStack, *, data: list[str], model: str, output_dir: str, cache_dir: str, use_cpu: bool) -> dict:
    """What is found without changing anything on this host. A part that fails is {"error": why}."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES} | {"bge_ds": bge_ds.__version__},
        "code": _tried(_code),
        "devices": _tried(lambda: devices(use_cpu)),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "interfaces": interfaces(),
        "addresses": addresses(),
        "own_address": _own_address(),
        "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "data": {path: _tried(lambda path=path: data_entry(path, cache_dir)) for path in data},
        "model": _tried(lambda: model_files(model, cache_dir)) if model else None,
        "output": _tried(lambda: output_folder(output_dir)) if output_dir else None,
    }


def _tried(work: Callable[[], dict]) -> dict:
    try:
        return work()
    except Exception as error:  # a broken driver or library may raise anything, and the other facts are still wanted
        return {"error": str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _code() -> dict:
    """A hash of this package's own files: two checkouts may differ under one version."""
    import xxhash

    digest, folder = xxhash.xxh3_64(), Path(bge_ds.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return {"hash": digest.hexdigest(), "folder": str(folder)}


def devices(use_cpu: bool) -> dict:
    """kind (cuda or cpu). Of GPUs: names, memory and free memory in bytes, torch's CUDA version, the driver's version, and why
    the fused kernels do not run there ("": they do). Of a CPU: GPUs that the driver lists but torch does not see."""
    import torch

    from bge_ds.kernels import triton_support

    if use_cpu or not torch.cuda.is_available():
        # Where torch sees no GPU and the driver does, their versions do not match: a run would silently use the CPU.
        return {"kind": "cpu", "unseen": [] if use_cpu else _ask_driver("name")}
    known = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    return {
        "kind": "cuda",
        "names": [one.name for one in known],
        "memory": [one.total_memory for one in known],
        "free": [torch.cuda.mem_get_info(k)[0] for k in range(len(known))],
        "cuda": torch.version.cuda,
        "driver": ", ".join(sorted(set(_ask_driver("driver_version")))),
        "no_kernels": triton_support.triton_obstacle("cuda") or "",
    }


def _ask_driver(what: str) -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def interfaces() -> dict[str, list[str]]:
    """Name -> IPv4 addresses, then IPv6 ones, of every network interface."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with contextlib.suppress(ImportError):  # deepspeed, which needs psutil as well, is then reported as missing
        import psutil

        for name, entries in psutil.net_if_addrs().items():
            families = [[e.address for e in entries if e.family == family] for family in (socket.AF_INET, socket.AF_INET6)]
            found[name] = [address for addresses in families for address in addresses if not address.startswith("fe80")]
    return found


def addresses() -> list[str]:
    """This host's addresses as the launcher asks for them: the first host's first one is the rendezvous address."""
    try:
        return subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def _own_address() -> str:
    """The address that this host's name resolves to, "" if none; gloo listens there when no interface is set."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def data_entry(path: str, cache_dir: str) -> dict:
    """An entry of --train_data: its kind, a hash of its rows (or of the files), its bytes. Raises ValueError or OSError."""
    import xxhash

    from bge_ds.data.preprocess import input_files, prepare
    from bge_ds.data.shards import digests, manifest_file, shard_reader

    if path.startswith(input_files.table_files.HUB):
        return {"kind": "hub data set", "hash": path, "bytes": 0}
    if (Path(path) / manifest_file.MANIFEST).is_file():
        reader = shard_reader.open_folder(path)  # checks that every shard is there, in its size
        size = sum((Path(path) / shard.file).stat().st_size for shard in reader.manifest.shards)
        return {"kind": "shards", "hash": reader.fingerprint, "bytes": size}
    files = [file for source in input_files.find_sources([path]) for file in source.files()]
    hashes = digests.of_files(files, prepare.cache_folder(cache_dir))
    return {
        "kind": f"{len(files)} file{'s' * (len(files) > 1)}",
        "hash": xxhash.xxh3_128_hexdigest(" ".join(hashes).encode()),
        "bytes": sum(file.stat().st_size for file in files),
    }


def model_files(name: str, cache_dir: str) -> dict:
    """A model folder's files with the hash of each (of weights the size), or the cached revision of a hub model."""
    from bge_ds.data.files import hash_file

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return {"error": f"{name} is a folder without config.json"}
        files = {}
        for path in sorted(folder.iterdir()):
            if path.suffix in _WEIGHT_FILES:  # maybe many gigabytes: their sizes tell models apart
                files[path.name] = f"{path.stat().st_size} bytes"
            elif path.suffix in (".json", ".txt", ".model"):
                files[path.name] = hash_file(path)
        return {"kind": "folder", "files": files}
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir or None)
    return {"kind": "hub", "revision": Path(cached).parent.name if isinstance(cached, str) else ""}


def output_folder(output_dir: str) -> dict:
    """The output folder or its nearest parent that exists, and the free bytes there."""
    parent = Path(output_dir).absolute()
    while not parent.is_dir():
        if parent.exists():
            return {"error": f"{parent} is a file"}
        parent = parent.parent
    return {"parent": str(parent), "free": shutil.disk_usage(parent).free}


def write(cleanup: ExitStack, *, folder: str, name: str) -> dict:
    """Writes a file for the other hosts to see; it is removed when the probe ends."""
    path = Path(folder) / name
    path.write_text(name)
    cleanup.callback(path.unlink, missing_ok=True)
    return {"path": str(path)}


def look(cleanup: ExitStack, *, folder: str, name: str) -> dict:
    for _ in range(20):  # a network file system may take a moment
        if os.path.exists(os.path.join(folder, name)):
            return {"seen": True}
        time.sleep(0.25)
    return {"seen": False}


def listen(cleanup: ExitStack, *, port: int) -> dict:
    """Listens at a port until the probe ends."""
    sock = cleanup.enter_context(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the ranks' store does
    sock.bind(("", port))
    sock.listen()
    return {}


def connect(cleanup: ExitStack, *, address: str, port: int) -> dict:
    with socket.create_connection((address, port), timeout=10) as sock:
        return {"from": sock.getsockname()[0]}


_ANSWERS = {f.__name__: f for f in (facts, write, look, listen, connect)} | {"tell_time": lambda cleanup: {}}
