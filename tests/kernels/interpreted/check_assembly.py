"""The inline assembly of the kernels, emulated: every plane of every word is exact; run by test_interpreted.py.

The interpreter knows no assembly and gets bfloat16 products wrong, so both are done here: the few instructions that
occur, on the bits of packed words, and a fused multiply-add with one rounding, subnormal numbers included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import quantkit_kernels
import torch
import triton.language as tl
from triton.runtime import interpreter

from quantkit.types import Array
from tests.kernels.samples import tensor
from tests.kernels.words import Words, byte_plane, planes

Word = Array  # uint32


def lop3(first: Word, second: Word, third: Word, table: Word) -> Word:
    """Bit i of the result is bit (4 a + 2 b + c) of the table."""
    out, inputs = np.zeros_like(first), (third, second, first)
    for entry in range(8):
        if int(table.flat[0]) >> entry & 1:
            out |= np.bitwise_and.reduce([item if entry >> place & 1 else ~item for place, item in enumerate(inputs)])
    return out


def prmt(first: Word, second: Word, selector: Word) -> Word:
    """Byte i of the result is the byte of (second, first) that nibble i of the selector names."""
    both = first.astype(np.uint64) | second.astype(np.uint64) << np.uint64(32)
    chosen = [int(selector.flat[0]) >> 4 * place & 15 for place in range(4)]
    assert max(chosen) < 8  # no sign is spread
    parts = [(both >> np.uint64(8 * byte)).astype(np.uint8) for byte in chosen]
    return np.stack(parts, axis=-1).reshape(-1).view(np.uint32)


INSTRUCTIONS: dict[str, Callable[..., Word]] = {
    "and.b32": lambda first, second: first & second,
    "xor.b32": lambda first, second: first ^ second,
    "shr.u32": lambda first, second: first >> second,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
}


def execute(text: str, operands: list[Word]) -> Word:
    """The register $0 after a few instructions on registers $1, $2, ... and t."""
    registers = {f"${place}": value for place, value in enumerate(operands, 1)}
    like = operands[0]
    for line in text.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (item.strip() for item in rest.split(","))
        values = [registers[item] if item in registers else np.full_like(like, int(item, 0)) for item in sources]
        registers[target] = INSTRUCTIONS[name](*values)
    return registers["$0"]


def inline_asm(self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
    """Two values of 16 bits or four of 8 side by side in a register."""
    del self, constraints, pure
    assert {value.data.dtype.itemsize * pack for value in values} == {4}
    shape = values[0].data.shape
    made = execute(text, [np.ascontiguousarray(value.data).reshape(-1).view(np.uint32) for value in values])
    stored = {tl.float16: np.float16, tl.bfloat16: np.uint16, tl.int8: np.int8}[types[0].scalar]
    handle = interpreter.TensorHandle(made.view(stored).reshape(shape), types[0].scalar)
    return SimpleNamespace(get_result=lambda index: handle)


def to_double(values: Array) -> Array:
    """bfloat16 as bits, or float16."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def fused(self: Any, first: Any, second: Any, third: Any) -> Any:
    """first * second + third, rounded once; here every result can be held, so that nothing is rounded."""
    del self
    exact = to_double(first.data) * to_double(second.data) + to_double(third.data)
    if first.data.dtype == np.uint16:
        single = exact.astype(np.float32).view(np.uint32)
        assert not (single & 0xFFFF).any()
        return interpreter.TensorHandle((single >> 16).astype(np.uint16), first.dtype)
    half = exact.astype(np.float16)
    assert np.array_equal(half.astype(np.float64), exact)
    return interpreter.TensorHandle(half, first.dtype)


@pytest.mark.parametrize("dtype", [tl.float16, tl.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_word(bits: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the GPU's test of the same name, at three zero points: 0, the middle and the largest."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", inline_asm)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)
    every = Words.of(bits)
    for place in (0, len(every.points) // 2, len(every.points) - 1):
        exact = every.exact[place : place + 1]
        out = torch.full(exact.shape, float("nan"))
        point = tensor(every.points[place : place + 1])
        planes[(1, 1)](tensor(every.words), point, out, BITS=bits, DT=dtype, ASM=True, BLOCK=65536)
        assert np.array_equal(out.numpy(), exact)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_byte(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", inline_asm)
    stored = np.arange(256, dtype=np.uint8)
    wanted = [stored.astype(np.int16) - 128] if bits == 8 else [stored & 15, stored >> 4]
    for place, exact in enumerate(wanted):
        out = torch.empty(256, dtype=torch.int8)
        byte_plane[(1,)](tensor(stored.view(np.int8)), out, p=place, BITS=bits, ASM=True)
        assert out.tolist() == exact.tolist()


def test_the_emulated_instructions() -> None:
    words = np.array([0x12345678, 0xFFFF0001], np.uint32)
    assert execute("and.b32 $0, $1, 0x00ff00ff;", [words]).tolist() == [0x00340078, 0x00FF0001]
    assert execute("prmt.b32 $0, $1, 0, 0x4341;", [words]).tolist() == [0x00120056, 0x00FF0000]
    shifted = "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 15; }"
    assert execute(shifted, [words]).tolist() == [7, 0]
    either = execute("lop3.b32 $0, $1, 255, $2, 0xEA;", [words, np.array([0xF00, 0x100], np.uint32)])
    assert either.tolist() == [0xF78, 0x101]


def test_all_assembly_of_the_kernels_is_emulated() -> None:
    """No other instruction is in the kernels' sources."""
    folder = Path(str(quantkit_kernels.__file__)).parent
    found = set()
    for path in folder.glob("*.py"):
        found |= set(re.findall(r"\b([a-z][a-z0-9]*\.[busf](?:16|32|64)(?:x2)?)\b(?= [$t])", path.read_text()))
    assert found == set(INSTRUCTIONS)
