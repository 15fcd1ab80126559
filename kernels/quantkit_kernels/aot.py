"""Machine code without a GPU: compile a kernel for an architecture, read its resources and its main loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

Constants = Mapping[str, int | float | bool | str]


@dataclass(frozen=True)
class Resources:
    """registers: per thread. stack, local: bytes per thread. shared: bytes per program, dynamic included.

    loop: opcodes of the main loop (the widest backward branch), in order; spills: LDL and STL in the whole kernel.
    copies16: asynchronous 16-byte copies from global to shared memory. tensor: tensor-core instructions.
    """

    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    copies16: int
    tensor: int
    loop: tuple[str, ...]

    def per_weight(self, weights: int, warps: int) -> float:
        """Instructions per weight in the main loop, which consumes `weights` of them in each pass of a program."""
        return len(self.loop) * warps * 32 / weights


def compile_kernel(
    kernel: Any, signature: Mapping[str, str], constants: Constants, arch: int, warps: int, stages: int
) -> Any:
    """The compiled kernel; pointers and integers count as divisible by 16, as a launch with such arguments has them.

    Args:
        signature: Triton type of every argument that is not in `constants`.
        arch: compute capability, 80 or 90.
    """
    full = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if full[name] == "i32" or full[name].startswith("*")
    }
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, full, dict(constants), divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> Resources:
    """Read from the cubin with the disassembler that Triton brings."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(str(tools / "cuobjdump"), "--dump-resource-usage", file.name)
        listing = _run(str(tools / "nvdisasm"), "-c", file.name)
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        registers=counts["REG"],
        stack=counts["STACK"],
        local=counts["LOCAL"],
        shared=int(compiled.metadata.shared),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        copies16=len(re.findall(r"LDGSTS\.E\.[A-Z0-9.]*128", listing)),
        tensor=len(re.findall(r"\b(?:HMMA|HGMMA|IMMA|IGMMA)\b", listing)),
        loop=main_loop(listing),
    )


def main_loop(listing: str) -> tuple[str, ...]:
    """Opcodes between the label and the branch of the widest backward branch that holds tensor-core instructions."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    best: tuple[str, ...] = ()
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(opcodes)
            continue
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
        if not instruction:
            continue
        opcodes.append(instruction[1])
        target = re.search(r"\bBRA.*`\((\.L_x_\d+)\)", line)
        if target and target[1] in labels:
            body = tuple(opcodes[labels[target[1]] :])
            if len(body) > len(best) and any("MMA" in opcode for opcode in body):
                best = body
    return best


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
