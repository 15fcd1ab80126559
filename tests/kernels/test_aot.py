"""The kernels' machine code without a GPU: what the rules choose compiles, spills nothing and issues little per weight.

In processes of their own: Triton compiles for a device that is not there, and its interpreter must be off. The limits
hold for the pinned Triton; another version makes other code of the same source.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from quantkit_kernels.aot import Resources, main_loop

REGISTERS = 255
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes per program
PER_WEIGHT = {2: 2.7, 3: 3.0, 4: 2.7, 8: 2.7}  # for M <= 16


def measured(*arguments: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "quantkit_kernels.shipped", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, err = process.communicate()
    assert process.returncode == 0, err[-4000:]
    return [json.loads(line) for line in out.splitlines()]


def limit(name: str) -> float | None:
    """Instructions per weight that a skinny kernel may take for M <= 16."""
    kernel, bits, _, rows, _ = name.split()
    if kernel != "skinny" or int(rows[1:]) > 16:
        return None
    return PER_WEIGHT[int(bits[1:])]


def check(found: dict[str, Any], arch: int) -> None:
    name = found["name"]
    assert found["spills"] == found["local"] == found["stack"] == 0, found
    assert found["registers"] <= REGISTERS, found
    assert found["registers"] * found["warps"] * 32 <= 65536, found
    assert found["shared"] <= SHARED[arch], found
    if found["per_weight"] is not None:
        assert found["copies16"] > 0, found
        assert found["tensor"] > 0, found
        assert limit(name) is None or found["per_weight"] <= limit(name), found


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[dict[str, Any]]]:
    hopper = [measured("--arch", "90", "--part", "0/2"), measured("--arch", "90", "--part", "1/2")]
    found = {90: [line for process in hopper for line in results(process)]}
    return found | {80: results(measured("--arch", "80"))}


@pytest.mark.parametrize("arch", [90, 80])
def test_machine_code(compiled: dict[int, list[dict[str, Any]]], arch: int) -> None:
    assert len(compiled[arch]) >= (30 if arch == 90 else 8)
    for found in compiled[arch]:
        check(found, arch)


LISTING = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDS R2, [R1] ;
        /*0030*/              @!P1 HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0060*/                   EXIT ;
"""


def test_main_loop_is_the_backward_branch_with_tensor_cores() -> None:
    loop = main_loop(LISTING)
    assert loop == ("LDS", "HMMA.16816.F32", "BRA")
    assert Resources(0, 0, 0, 0, 0, 0, 0, loop).per_weight(weights=64, warps=2) == 3.0
