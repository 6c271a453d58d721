"""Lets the `deepspeed` command take `-m pkg.mod`, as `python` and `torchrun` do.

Stock DeepSpeed only knows `--module`. `setup.py` installs a one-line `*.pth` file that Python reads at start-up; for a
program named `deepspeed` (or `ds`) it calls `accept_dash_m`, which rewrites `sys.argv` before DeepSpeed parses it.
Only the launcher's own options are touched: whatever follows the script or module name belongs to the user.
Standard library only, since this runs while Python is still starting.
"""

import os
import sys
from collections.abc import Sequence

# The options of DeepSpeed's launcher that are followed by a value (its parser, 0.19). A newer one that is missing here
# ends the search at its value, so that the worst case is DeepSpeed's own message about `-m`, never a changed argument.
SHORT_WITH_VALUE = ("-H", "-i", "-e")
LONG_WITH_VALUE = (
    "--hostfile", "--include", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators", "--master_port", "--master_addr",
    "--node_rank", "--launcher", "--launcher_args", "--enable_each_rank_log", "--autotuning", "--bind_core_list", "--ssh_port",
    "--venv_script", "--log_level",
)  # fmt: skip


def module_flag_position(arguments: Sequence[str]) -> int | None:
    """Index in `arguments` (without the program name) of a `-m` meant for the launcher; None where there is none."""
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if word == "-m":
            return position
        if word == "--" or not word.startswith("-"):
            return None  # from here on it is the script and the user's own arguments
        # argparse takes an unambiguous beginning of a long name as well (`--num_g 2`).
        with_value = word in SHORT_WITH_VALUE or (
            word.startswith("--") and any(name.startswith(word) for name in LONG_WITH_VALUE)
        )
        position += 2 if with_value else 1
    return None


def is_deepspeed_command(program: str) -> bool:
    """Whether `program` (sys.argv[0]) is DeepSpeed's launcher and not some other program that is also called `ds`."""
    name = os.path.basename(program).lower()
    if name in ("deepspeed.exe", "ds.exe"):
        return True  # a binary that wraps the same script
    if name not in ("deepspeed", "ds"):
        return False
    with open(program, "rb") as script:
        return b"deepspeed.launcher" in script.read(4096)


def accept_dash_m() -> None:
    """Turns `deepspeed [options] -m pkg.mod ...` into `deepspeed [options] --module pkg.mod ...`, in place.

    Never raises: an error here would be an error at the start of Python itself. Where the script cannot be read,
    nothing changes and DeepSpeed reports `-m` as it always did.
    """
    try:
        if is_deepspeed_command(sys.argv[0]):
            position = module_flag_position(sys.argv[1:])
            if position is not None:
                sys.argv[position + 1] = "--module"
    except (OSError, AttributeError, IndexError, TypeError):
        return
