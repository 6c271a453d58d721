"""What the doctor makes of hosts' answers: every line that warns or fails, from made-up answers, with its remedy."""

from __future__ import annotations

import copy

import pytest

from bge_ds.doctor import checks, network_checks
from bge_ds.doctor.checks import ALL, FAILED, OK, WARNING, Plan, Requirements
from bge_ds.doctor.cluster import NoAnswer

GIB = 1 << 30
CPU = {"kind": "cpu", "unseen": []}
GPU = {
    "kind": "cuda", "names": ["H100", "H100"], "memory": [80 * GIB] * 2, "free": [79 * GIB] * 2, "cuda": "12.8",
    "driver": "570.1", "no_kernels": "",
}  # fmt: skip
FOLDER = {"kind": "folder", "files": {"config.json": "aa", "model.safetensors": "90 bytes"}}
PLAN = Plan({"a": 2, "b": 2}, "hosts", data=("rows",), model="model", output_dir="/shared/out", keep=2)
NEEDS = Requirements({"weights": 10 * GIB, "gradients": 10 * GIB, "optimizer": 20 * GIB}, checkpoint=30 * GIB)
SAME_TIME = {"sent": 100.0, "received": 101.0, "time": 100.5}


def facts(**changes) -> dict:
    return copy.deepcopy({
        "python": "3.12.1", "versions": {"torch": "2.13", "deepspeed": "0.19.8", "transformers": "5.23", "bge_ds": "1"},
        "code": {"hash": "c0de", "folder": "/env"}, "devices": GPU, "cores": 64, "memory": 512 * GIB,
        "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]}, "addresses": ["10.0.0.1"], "own_address": "10.0.0.1",
        "variables": {"NCCL_SOCKET_IFNAME": "eth0"}, "data": {"rows": {"kind": "shards", "hash": "f1", "bytes": 5 * GIB}},
        "model": FOLDER, "output": {"parent": "/shared", "free": 100 * GIB},
    } | changes)  # fmt: skip


def on_cpu(**changes) -> dict:
    return facts(devices=CPU, variables={"GLOO_SOCKET_IFNAME": "eth0"}, **changes)


# judge, what b differs in from a whole host, mark, a part of the text, a part of the remedy.
SECOND_HOST = [
    (checks.software, {"python": "3.11.4"}, FAILED, "Python 3.11.4, and 3.12.1 on a", "the same Python"),
    (checks.software, {"versions": facts()["versions"] | {"torch": "2.12"}}, FAILED, "torch 2.12, and 2.13 on a", "install"),
    (checks.software, {"versions": facts()["versions"] | {"torch": "missing"}}, FAILED, "not installed: torch", "pip install"),
    (checks.software, {"code": {"hash": "0ther"}}, FAILED, "hash to 0ther, and c0de on a", "same checkout"),
    (checks.software, {"code": {"error": "gone"}}, FAILED, "bge_ds: gone", "install bge_ds"),
    (checks.data, {"data": {"rows": {"kind": "shards", "hash": "f2", "bytes": 1}}}, FAILED, "rows is f2, and f1", "copy rows"),
    (checks.data, {"data": {"rows": {"error": "no file rows"}}}, FAILED, "no file rows", "bring rows"),
    (checks.model, {"model": {"error": "no config"}}, FAILED, "no config", "bring model"),
    (checks.model, {"model": {"kind": "hub", "revision": ""}}, FAILED, "a hub's, and is a folder's on a", "bring model"),
    (checks.model, {"model": {"kind": "folder", "files": {"config.json": "aa", "model.safetensors": "91 bytes"}}},
     FAILED, "differs from the first host's in model.safetensors", "copy the folder"),
    (checks.devices, {"devices": {"error": "no driver"}}, FAILED, "no driver", "repair torch or the driver"),
    (checks.devices, {"devices": CPU}, FAILED, "trains on cpu, and cuda on a", "--use_cpu"),
    (checks.devices, {"devices": CPU | {"unseen": ["H100"]}}, FAILED, "lists 1 GPUs and torch 2.13 sees none", "CUDA"),
    (checks.devices, {"devices": GPU | {"names": ["H100"]}}, FAILED, "2 ranks and 1 GPUs", "slots=1"),
    (checks.devices, {"devices": GPU | {"names": ["H100"] * 3}}, WARNING, "1 of 3 GPUs idle", ""),
    (checks.devices, {"devices": GPU | {"free": [9 * GIB, 79 * GIB]}}, WARNING, "GPU 0: 71.0 GiB", "nvidia-smi"),
    (checks.devices, {"devices": GPU | {"names": ["A100"] * 2}}, WARNING, "GPUs are A100, and H100 on a", "one kind"),
    (checks.devices, {"devices": GPU | {"cuda": "11.8"}}, FAILED, "CUDA is 11.8, and 12.8 on a", "install the same"),
    (checks.devices, {"devices": GPU | {"no_kernels": "the triton package is not installed"}}, WARNING,
     "do not run (the triton package is not installed): attention and losses fall back", "pip install triton"),
    (checks.devices, {"devices": GPU | {"no_kernels": "the GPU's compute capability is below 8.0"}}, WARNING,
     "compute capability is below 8.0", "take GPUs of"),
    (checks.devices, {"devices": GPU | {"driver": "535"}}, WARNING, "driver is 535, and 570.1", "install the same"),
]  # fmt: skip


@pytest.mark.parametrize(("judge", "changes", "mark", "text", "remedy"), SECOND_HOST)
def test_what_one_host_has_otherwise_is_named_with_a_remedy(judge, changes, mark, text, remedy):
    """A host that differs from the first, or lacks something, is one line with its name, what is wrong, and what to do."""
    told = {"a": facts(), "b": facts(**changes)}
    findings = [f for f in run(judge, told, PLAN) if f.status == mark]
    found = [f for f in findings if text in f.text and remedy in f.remedy]
    assert len(found) == 1 and found[0].host == "b", findings
    assert not [f for f in run(judge, told, PLAN) if f.status != OK and f.host != "b"]


def run(judge, told, plan):
    return list(judge(told) if judge is checks.software else judge(told, plan))


@pytest.mark.parametrize("judge", [checks.software, checks.data, checks.model, checks.devices])
def test_hosts_that_are_alike_are_one_good_line(judge):
    """Nothing to say of hosts that are alike but that they are: one line for all, marked ok."""
    findings = run(judge, {"a": facts(), "b": facts()}, PLAN)
    assert [(f.status, f.host) for f in findings] == [(OK, ALL)]
    findings = run(judge, {"a": on_cpu(), "b": on_cpu()}, PLAN)
    assert [(f.status, f.host) for f in findings] == [(OK, ALL)]


def test_a_hub_model_needs_the_hub_or_the_cache():
    """A name that no folder has is a hub model: offline it must be cached, and cached hosts must hold one revision."""
    there, nowhere = {"kind": "hub", "revision": "abc"}, {"kind": "hub", "revision": ""}
    offline = {"HF_HUB_OFFLINE": "1"}

    def found(**second):
        return [(f.status, f.host) for f in checks.model({"a": facts(model=there), "b": facts(**second)}, PLAN)]

    assert found(model=nowhere) == [(OK, ALL)]
    assert found(model=nowhere, variables=offline) == [(FAILED, "b")]
    assert found(model={"kind": "hub", "revision": "def"}) == [(FAILED, "b")]


def test_cpu_ranks_want_cores_and_memory():
    """Without GPUs, more ranks than cores, or less than a GiB each, are a warning."""
    plan = Plan({"a": 8})
    (few,) = checks.devices({"a": on_cpu(cores=4)}, plan)
    assert few.status == WARNING and "8 ranks on 4 cores" in few.text and "4 or fewer" in few.remedy
    (small,) = checks.devices({"a": on_cpu(memory=4 * GIB)}, plan)
    assert small.status == WARNING and "4.0 GiB for 8 ranks" in small.text


@pytest.mark.parametrize(
    ("host", "needs", "marks"),
    [
        (facts(), NEEDS, [OK]),
        (facts(devices=GPU | {"memory": [48 * GIB, 80 * GIB]}), NEEDS, [WARNING]),
        (facts(devices=GPU | {"memory": [80 * GIB, 39 * GIB]}), NEEDS, [FAILED]),
        (facts(devices=GPU | {"memory": [24 * GIB] * 2}), Requirements(NEEDS.parts, ("optimizer",)), [WARNING, OK]),
        (facts(devices=GPU, memory=39 * GIB), Requirements(NEEDS.parts, ("optimizer",)), [OK, FAILED]),
        (on_cpu(memory=79 * GIB), NEEDS, [FAILED]),
        (on_cpu(memory=200 * GIB), NEEDS, [OK]),
    ],
)
def test_weights_and_states_must_fit(host, needs, marks):
    """40 GiB a rank: the smallest GPU must hold them, less what is offloaded; a CPU host, for each of its two ranks."""
    findings = list(checks.memory({"a": host}, Plan({"a": 2}), needs))
    assert [f.status for f in findings] == marks
    assert all("zero3" in f.remedy for f in findings if f.status != OK)
    assert "weights 10.0 GiB, gradients 10.0 GiB, optimizer 20.0 GiB" in findings[0].text


def output(free=100 * GIB, keep=2, needs=NEEDS, seen=True, written=None, **second):
    told = {"a": facts(output={"parent": "/shared", "free": free}), "b": facts(**second)}
    plan = Plan({"a": 2, "b": 2}, output_dir="/shared/out", keep=keep)
    return list(checks.output(told, plan, needs, {} if written is None else written, {"b": {"seen": seen}}))


def test_the_output_folder_is_shared_and_has_room():
    """Checkpoints kept and one being written must fit (the figures are said), and every host must see the first's file."""
    (good,) = output()
    assert good.status == OK and "2 kept and one being written are 90.0 GiB" in good.text and "of all 2 hosts" in good.text
    (full,) = output(free=89 * GIB)
    assert full.status == FAILED and "free 1.0 GiB there" in full.remedy
    (endless,) = output(keep=None, free=200 * GIB)
    assert endless.status == WARNING and "full after 6" in endless.text and "--save_total_limit" in endless.remedy
    assert [f.status for f in output(keep=None, free=2000 * GIB)] == [OK]
    blind, room = output(seen=False)
    assert (blind.status, blind.host, room.status) == (FAILED, "b", OK) and "mount one folder" in blind.remedy
    (denied,) = output(written={"error": "Permission denied"})
    assert denied.status == FAILED and "Permission denied" in denied.text and "let this user write" in denied.remedy
    (file, _) = output(output={"error": "/shared is a file"})
    assert (file.status, file.host) == (FAILED, "b") and "--output_dir" in file.remedy
    (unknown,) = output(needs=None)
    assert unknown.status == OK and "--model_name_or_path" in unknown.text


@pytest.mark.parametrize(
    ("status", "said", "text", "remedy"),
    [
        (None, [], "no answer within 9 s", "--timeout"),
        (255, ["root@b: Permission denied (publickey)."], "Permission denied", "ssh-copy-id b"),
        (255, ["Host key verification failed."], "Host key", "ssh b true"),
        (255, ["ssh: connect to host b port 22: No route to host"], "No route", "out of the hostfile"),
        (255, [], "without output", "ssh b true"),
        (113, [], "working folder does not exist", "folder all hosts have"),
        (114, [], "this Python does not exist", "same path"),
        (1, ["x", "ModuleNotFoundError: No module named 'bge_ds'"], "No module named 'bge_ds'", "install bge_ds there"),
    ],
)
def test_a_silent_host_is_told_by_how_its_ssh_ended(status, said, text, remedy):
    """A host without an answer: its name, why, and the remedy for that way of failing."""
    finding = network_checks.no_answer("b", NoAnswer(status, said), 9)
    assert (finding.status, finding.host) == (FAILED, "b")
    assert text in finding.text and remedy in finding.remedy


def test_what_the_launcher_needs_here():
    """No pdsh fails; ssh options that only pdsh knows want the first host's address."""
    assert not list(network_checks.launcher(True, False, False)) and not list(network_checks.launcher(True, True, True))
    assert [(f.status, "pdsh" in f.text) for f in network_checks.launcher(False, False, False)] == [(FAILED, True)]
    assert [(f.status, "MASTER_ADDR" in f.remedy) for f in network_checks.launcher(True, True, False)] == [(WARNING, True)]


def test_clocks_that_differ_are_a_warning():
    """More than 5 s apart by answers' own times; how long an answer took is no difference."""
    late = {"sent": 100.0, "received": 120.0, "time": 110.0}
    assert [(f.status, f.host) for f in network_checks.clocks({"a": SAME_TIME, "b": late})] == [(OK, ALL)]
    (found,) = network_checks.clocks({"a": SAME_TIME, "b": SAME_TIME | {"time": 94.0}, "c": SAME_TIME})
    assert (found.status, found.host) == (WARNING, "b") and "6 s behind a" in found.text and "chrony" in found.remedy


@pytest.mark.parametrize(
    ("setting", "exact", "means"),
    [
        ("eth0", True, ["eth0"]),
        ("eth", True, []),
        ("eth", False, ["eth0", "eth10"]),
        ("=eth0", False, ["eth0"]),
        ("^eth,docker", False, ["lo", "ib0"]),
        ("ib0,eth10", True, ["ib0", "eth10"]),
    ],
)
def test_names_of_interfaces_are_read_as_gloo_and_nccl_read_them(setting, exact, means):
    """gloo takes whole names; NCCL beginnings, = for whole names, ^ for all others."""
    assert [name for name in ("lo", "ib0", "eth0", "eth10") if network_checks.selects(setting, name, exact)] == means


TWO = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"], "docker0": ["172.17.0.1"]}


@pytest.mark.parametrize(
    ("host", "mark", "text", "remedy"),
    [
        (facts(), OK, "NCCL_SOCKET_IFNAME=eth0: eth0 10.0.0.1", ""),
        (facts(variables={"NCCL_SOCKET_IFNAME": "ib0"}), FAILED, "no such interface", "eth0 10.0.0.1"),
        (facts(interfaces={"lo": ["127.0.0.1"], "eth0": []}), FAILED, "eth0 has no address", "eth0 without an address"),
        (on_cpu(interfaces=TWO) | {"variables": {"GLOO_SOCKET_IFNAME": "lo"}}, FAILED, "by eth0", "GLOO_SOCKET_IFNAME=eth0"),
        (on_cpu(interfaces=TWO) | {"variables": {"GLOO_SOCKET_IFNAME": "docker0"}}, WARNING, "by eth0", "IFNAME=eth0"),
        (facts(variables={}), OK, "eth0 10.0.0.1", ""),
        (facts(variables={}, interfaces=TWO), WARNING, "docker0 172.17.0.1, eth0 10.0.0.2", "NCCL_SOCKET_IFNAME=eth0"),
        (on_cpu(own_address="127.0.1.1", interfaces=TWO) | {"variables": {}}, FAILED, "127.0.1.1", "GLOO_SOCKET_IFNAME=eth0"),
        (on_cpu(own_address="") | {"variables": {}}, FAILED, "no address", "GLOO_SOCKET_IFNAME"),
    ],
)  # fmt: skip
def test_the_interface_is_named_and_there(host, mark, text, remedy):
    """The interface that the ranks' library is told of exists, with an address, on the way to the first host."""
    (found,) = network_checks.interfaces({"b": host}, {"b": {"from": "10.0.0.2"}} if host["interfaces"] == TWO else {})
    assert found.status == mark and text in found.text and remedy in found.remedy, found


def test_the_meeting_place_is_free_and_reached():
    """A port in use, a host that cannot connect to it, or no address at all: each fails with its own remedy."""
    plan = Plan({"a": 1, "b": 1}, "hosts", port=29511)

    def found(address="10.0.0.1", listened=None, answer=None):
        connected = {"b": {"from": "10.0.0.2"} if answer is None else answer}
        (finding,) = network_checks.port(plan, "a", address, listened or {}, connected)
        return finding

    assert found().status == OK and "29511 is free, reached at 10.0.0.1" in found().text
    busy = found(listened={"error": "Address already in use"})
    assert (busy.status, busy.host) == (FAILED, "a") and "29511" in busy.text and "MASTER_PORT" in busy.remedy
    shut = found(answer={"error": "timed out"})
    assert (shut.status, shut.host) == (FAILED, "b") and "10.0.0.1:29511" in shut.text and "firewall" in shut.remedy
    nowhere = found(address="")
    assert nowhere.status == FAILED and "MASTER_ADDR" in nowhere.remedy


RESULT = {"ranks": 4, "stage": 2, "difference": 1e-6, "seconds": 0.01, "bytes_per_second": 2 * GIB}


@pytest.mark.parametrize(
    ("status", "result", "marks", "text"),
    [
        (0, RESULT, [OK, OK], "4 ranks against one process, ZeRO 2: largest relative difference 1.0e-06"),
        (0, RESULT | {"difference": 2e-4}, [FAILED, OK], "2.0e-04, and less than 0.0001"),
        (0, RESULT | {"difference": float("nan")}, [FAILED, OK], "nan"),
        (0, RESULT | {"ranks": 2}, [FAILED, OK], "4 ranks were to start"),
        (1, RESULT, [WARNING, OK], "ended with status 1"),
        (None, RESULT, [WARNING, OK], "did not end"),
        (None, None, [FAILED], "no result within 9 s"),
        (1, None, [FAILED], "ended with status 1"),
    ],
)
def test_the_ranks_gradient_is_judged(status, result, marks, text):
    """Only a difference below 1e-4, of as many ranks as were wanted, from a launcher that ended well, is ok."""
    findings = list(network_checks.ranks(status, result, ["last words"], 4, 9))
    assert [f.status for f in findings] == marks and text in findings[0].text
    if result is None:
        assert findings[0].printed == ("last words",) and findings[0].remedy
    else:
        assert "2.0 GiB/s" in findings[1].text
