"""Triton kernels compiled for GPUs that this machine does not have: what ptxas says of their registers and memory."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}


class Cost(NamedTuple):
    """Registers a thread, bytes of registers spilled to memory (stores and loads), bytes of shared memory a program."""

    registers: int
    spilled: int
    shared: int


@functools.cache
def ptxas(capability: int) -> Path | None:
    """The assembler that triton brings; newer GPUs have one of their own in some versions."""
    if find_spec("triton") is None:
        return None
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    names = ("ptxas-blackwell", "ptxas") if capability >= 100 else ("ptxas",)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def compile_ahead(kernel, pointers: dict[str, str], constants: dict, capability: int, scalars: dict | None = None) -> Cost:
    """Compile `kernel` for a compute capability (80, 90 or 100) as its launches do on aligned tensors.

    pointers: element type of each pointer argument, `*` for all others. constants: constexprs, and num_warps and
    num_stages. scalars: type of arguments that are numbers; others are i32.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, pointers["*"])
        else:
            signature[name] = (scalars or {}).get(name, "i32")
    # Pointers are multiples of 16 bytes; a column stride of 1 is a constant, as it is when the kernel is launched.
    ones = {name: 1 for name in kernel.arg_names if name.endswith("_column")}
    signature |= dict.fromkeys(ones, "constexpr")
    whole = [
        (number,)
        for number, name in enumerate(kernel.arg_names)
        if name.endswith(("_ptr", "_row", "_head")) and name not in constants
    ]
    attributes = {place: [["tt.divisibility", 16]] for place in whole}
    source = ASTSource(kernel, signature, constants | ones, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [ptxas(capability), "-v", f"--gpu-name={ARCHITECTURES[capability]}", "-o", "/dev/null", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return Cost(registers, spilled, made.metadata.shared)
