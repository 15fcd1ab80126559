"""The comparisons can fail: one wrong byte, a shifted zero point or swapped inputs must show in the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.graph.emit import Emission, emit, simulate
from quantkit.graph.targets import find_targets
from quantkit.runtime.ort import make_session
from quantkit.types import Array, Feed, QuantSpec
from tests.emitters.conftest import KINDS, RUNTIMES, Kind, accepted, disagreeing, feed_of, plan, reference, stack

DECIBELS = 105.0
KIND_OF = {
    "dynamic": KINDS["matmul"],
    "gather": Kind("Gather", (20,), ((20, 160),), {}, 2),
    "matmulnbits": KINDS["gemm bias"],
    "packed": KINDS["conv"],
    "qdq": KINDS["gemm bias"],
}
Change = Callable[[Array], Array]


def flip_byte(array: Array) -> Array:
    """One packed byte, upside down."""
    flat = array.reshape(-1)
    flat[flat.size // 2] ^= 0xFF
    return array


def flip_code(array: Array) -> Array:
    """The highest bit of one code of ONNX's own 4-bit type."""
    flat = array.astype(np.uint8).reshape(-1)
    flat[flat.size // 2] ^= 8
    return flat.reshape(array.shape).astype(array.dtype)


def next_byte(array: Array) -> Array:
    return np.roll(array.reshape(-1), 1).reshape(array.shape)


def other_nibble_first(array: Array) -> Array:
    swapped: Array = (array >> 4 | array << 4).astype(np.uint8)
    return swapped


def double(array: Array) -> Array:
    doubled: Array = array * np.asarray(2, array.dtype)
    return doubled


@dataclass(frozen=True)
class Checked:
    """One emitted layer, and the two things that it is compared with."""

    model: ir.Model
    emission: Emission
    feed: Feed
    promised: dict[str, Array]
    simulated: dict[str, Array]

    def agrees(self, model: ir.Model) -> tuple[bool, bool]:
        """With the float operators, with the simulation."""
        got = make_session(model).run(self.feed)
        wanted = (self.promised, self.simulated)
        first, second = (disagreeing(other, got, self.emission, DECIBELS) == {} for other in wanted)
        return first, second


def checked(form: str, runtime: str, spec: QuantSpec) -> Checked:
    kind = KIND_OF[form]
    model = stack(kind, 1)
    targets, _ = find_targets(model)
    layers = accepted(form, runtime, targets, [spec])
    assert layers
    feed = {"x": np.arange(20)} if form == "gather" else feed_of(kind)
    emission = plan(model, layers, feed, runtime)
    simulated = make_session(simulate(model, emission), optimize="none").run(feed)
    case = Checked(emit(model, emission).model, emission, feed, reference(model, emission, feed), simulated)
    assert case.agrees(case.model) == (True, True)
    return case


def mutated(model: ir.Model, role: str, change: Change, which: int = 0) -> ir.Model:
    """A copy in which one of the layer's initializers holds something else."""
    copy = model.clone()
    names = [name for name in copy.graph.initializers if role in name]
    value = copy.graph.initializers[names[which]]
    assert value.const_value is not None
    before = value.const_value.numpy()
    after = change(np.array(before))
    assert after.shape == before.shape and after.dtype == before.dtype and not np.array_equal(after, before)
    value.const_value = ir.Tensor(after, dtype=value.const_value.dtype, name=value.name)
    return copy


NATIVE = ("matmulnbits", "portable")
CASES = [(form, runtime) for form in KIND_OF for runtime in RUNTIMES if (form, runtime) != NATIVE]


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize(("form", "runtime"), CASES)
def test_codes(form: str, runtime: str, bits: int) -> None:
    case = checked(form, runtime, QuantSpec(bits, 16))
    planes = sum(".codes" in name for name in case.model.graph.initializers if name.startswith("L0"))
    for plane in range(planes):
        for change in (flip_byte, next_byte):
            assert case.agrees(mutated(case.model, "L0.codes", change, plane)) == (False, False), (plane, change)
    if bits == 4:
        assert case.agrees(mutated(case.model, "L0.codes", other_nibble_first)) == (False, False)


@pytest.mark.parametrize(("form", "runtime"), [*CASES, NATIVE])
def test_scales(form: str, runtime: str) -> None:
    case = checked(form, runtime, QuantSpec(4, 16))
    assert case.agrees(mutated(case.model, "L0.scales", double)) == (False, False)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("form", "runtime"), CASES)
def test_zero_points(form: str, runtime: str, bits: int) -> None:
    case = checked(form, runtime, QuantSpec(bits, 16))
    assert case.agrees(mutated(case.model, "L0.zero_points", flip_byte)) == (False, False)


def test_native_types() -> None:
    case = checked(*NATIVE, QuantSpec(4, 16))
    for role in ("L0.codes", "L0.zero_points"):
        assert case.agrees(mutated(case.model, role, flip_code)) == (False, False)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_swapped_planes(runtime: str) -> None:
    """7 bits are planes of 4, 2 and 1: the upper two in each other's place, filled up or cut to fit."""
    case = checked("packed", runtime, QuantSpec(7, 16))
    names = [name for name in case.model.graph.initializers if "L0.codes" in name]
    planes = [case.model.graph.initializers[name].const_value for name in names]
    assert len(planes) == 3 and planes[1] is not None and planes[2] is not None
    low, high = planes[1].numpy(), planes[2].numpy()
    swapped = mutated(case.model, "L0.codes", lambda array: np.resize(high, array.shape), 1)
    swapped = mutated(swapped, "L0.codes", lambda array: np.resize(low, array.shape), 2)
    assert case.agrees(swapped) == (False, False)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_bias_and_activation_scale(runtime: str) -> None:
    case = checked("qdq", runtime, QuantSpec(8, -1, symmetric=True))
    assert case.agrees(mutated(case.model, "c0.1.codes", lambda array: array + 40)) == (False, False)
    assert case.agrees(mutated(case.model, "x.scale", double)) == (False, False)
    assert case.agrees(mutated(case.model, "x.zero_point", flip_byte)) == (False, False)
