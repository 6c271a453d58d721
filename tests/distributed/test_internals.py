"""The installed DeepSpeed has what the package relies on, and the list of it is complete."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator

import helpers
import pytest
import torch

from bge_ds.deepspeed_engine import optimizer_state
from bge_ds.deepspeed_engine.internals import INTERNALS

ROOM = helpers.REPO / "bge_ds" / "deepspeed_engine"
NAMES = {name for _, names, _ in INTERNALS for name in names}
BY_NAME = ("getattr", "hasattr", "setattr")
TORCH = {*dir(torch.optim.Optimizer), *dir(torch.nn.Parameter), "param_groups", "state", "defaults"}


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names, _ in INTERNALS for name in names])
def test_deepspeed_has(owner, name):
    """A class, or a base of it, has the attribute or sets it on itself; a module has it or sets it on parameters."""
    path, _, kind = owner.partition(":")
    holder = importlib.import_module(f"deepspeed.{path}")
    if kind:
        holder = getattr(holder, kind)
    if hasattr(holder, name):
        return
    sources = [base for base in holder.__mro__ if base.__module__.startswith("deepspeed")] if kind else [holder]
    setting = rf"^\s*(self\.)?{name}(: | = )" if kind else rf"\.{name} = "
    assert any(re.search(setting, inspect.getsource(source), re.M) for source in sources)


def accesses(path) -> Iterator[tuple[str, str]]:
    """(what it is read of or set on, attribute), also of getattr, hasattr and setattr with a literal name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value).split(".")[-1], node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in BY_NAME and isinstance(node.args[1], ast.Constant):
            yield ast.unparse(node.args[0]).split(".")[-1], node.args[1].value


def test_the_list_is_complete():
    """What is read of an engine, its optimizer, loss scaler or parameters is torch's, public, or on the list."""
    found = {access for path in ROOM.glob("*.py") for access in accesses(path)}
    used = {name for of, name in found if of == "engine" and re.match("_[^_]", name)}
    used |= {name for of, name in found if of in ("optimizer", "scaler", "mapping", "parameter", "p")}
    used |= {name for _, name in found if re.match("ds_(?!config)", name)}
    assert used - TORCH - NAMES == {"optimizer"}  # inside a wrapper, as `base_optimizer` says
    assert {*optimizer_state._COUNTERS, *optimizer_state._SCALER} <= NAMES


def test_no_other_folder_uses_them():
    """DeepSpeed's private attributes are known in one folder."""
    for path in (helpers.REPO / "bge_ds").rglob("*.py"):
        if ROOM not in path.parents:
            used = {name for _, name in accesses(path) if name in NAMES and name.startswith(("_", "ds_"))}
            assert not used, (path, used)


def test_each_is_used():
    """A line for what is not used any more would only raise false alarms."""
    text = "".join(path.read_text(encoding="utf-8") for path in ROOM.glob("*.py") if path.name != "internals.py")
    assert not {name for name in NAMES if not re.search(rf"\b{name}\b", text)}
