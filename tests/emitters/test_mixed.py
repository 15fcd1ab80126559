"""Groups of different widths in one matrix (SliM-LLM, arXiv 2405.14917): all emitters, operators and runtimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle, islice

import numpy as np
import onnx_ir as ir
import pytest

from quantkit.graph.emit import Assignment, emit, emitter, simulate
from quantkit.graph.targets import find_targets
from quantkit.packing import packed_size
from quantkit.runtime.ort import make_session, optimized_nodes
from quantkit.types import QuantSpec, Target
from tests.emitters.conftest import (
    FORMS,
    KINDS,
    RUNTIMES,
    Kind,
    accepted,
    check_file,
    disagreeing,
    expose,
    feed_of,
    operators,
    plan,
    quantize,
    reference,
    stack,
)
from tests.emitters.test_contract import CASES, DECIBELS, Case, oracle, place, stored_sizes
from tests.emitters.test_mutations import KIND_OF, flip_byte, next_byte
from tests.emitters.test_portable import DECIBELS as PORTABLE_DECIBELS
from tests.emitters.test_portable import RECURRENT, openvino_run, reference_run

# (widths, repeated over the groups; group size; symmetric): in order, out of order, all alike, all there are.
PATTERNS = (
    ((1, 2, 3, 4, 8), 32, False),
    ((8, 4, 3, 2, 1), 16, True),
    ((4, 2, 3), 48, False),  # a shorter last group, where K is no multiple of 48
    ((2, 4, 4, 8), 32, False),
    ((3, 3), 32, False),
    ((2, 3, 4), 128, True),
    ((5, 7, 6, 3), 16, False),
    ((8, 2), -1, False),
    ((3, 1, 4), 4, False),  # several groups in 9 inputs, the last of one
)


def labelled(target: Target, pattern: tuple[Sequence[int], int, bool]) -> QuantSpec:
    """The pattern for the target's number of groups; asked for at 4 bits, whatever the groups have."""
    widths, group_size, symmetric = pattern
    spec = QuantSpec(4, group_size, symmetric)
    return replace(spec, group_bits=tuple(islice(cycle(widths), spec.num_groups(target.shape[1]))))


def layers_of(form: str, runtime: str, targets: Mapping[str, Target]) -> dict[str, Assignment]:
    """The layers that the form takes: L<i> stored as PATTERNS[i]."""
    layers = {}
    for name, target in targets.items():
        spec = labelled(target, PATTERNS[int(str(target.node.name)[1:])])
        if emitter(form).refuse(target, spec, runtime) is None:
            layers[name] = Assignment(form, quantize(target, spec))
    return layers


@cache
def case_of(form: str, kind: str, runtime: str) -> Case:
    model = stack(KINDS[kind], len(PATTERNS))
    targets, _ = find_targets(model)
    layers = layers_of(form, runtime, targets)
    feed = feed_of(KINDS[kind])
    emission = plan(model, layers, feed, runtime)
    return Case(model, targets, layers, emission, emit(model, emission), feed)


@pytest.mark.parametrize(("form", "kind", "runtime"), CASES)
def test_file_computes_what_the_form_promises(form: str, kind: str, runtime: str) -> None:
    case = case_of(form, kind, runtime)
    mixed = [item for item in case.layers.values() if np.unique(item.weight.group_bits).size > 1]
    assert bool(mixed) == ((form, runtime) != ("matmulnbits", "portable"))
    proto = check_file(case.emitted.model)
    if runtime == "portable":
        assert not proto.functions and {domain for domain, _ in operators(proto)} == {""}
    got = make_session(case.emitted.model).run(case.feed)
    simulated = make_session(simulate(case.model, case.emission), optimize="none").run(case.feed)
    assert disagreeing(reference(case.model, case.emission, case.feed), got, case.emission, DECIBELS[form]) == {}
    assert disagreeing(simulated, got, case.emission, DECIBELS[form]) == {}


@pytest.mark.parametrize(("form", "kind", "runtime"), CASES)
def test_every_group_takes_its_own_width(form: str, kind: str, runtime: str) -> None:
    case = case_of(form, kind, runtime)
    sizes = stored_sizes(case.emitted.model)
    for name, item in case.layers.items():
        num_rows, num_inputs = item.weight.shape
        width = item.weight.spec.group_width(num_inputs)
        widths, counts = np.unique(item.weight.group_bits, return_counts=True)
        wanted = sum(packed_size(num_rows * n * width, int(bits)) for bits, n in zip(widths, counts, strict=True))
        assert sizes[f"{name}.codes"] == wanted, item.weight.spec
        assert sizes.get(f"{name}.scales", 0) <= 4 * item.weight.scales.size


@pytest.mark.parametrize(
    ("form", "kind", "runtime"), [item for item in CASES if item[0] in ("packed", "qdq", "dynamic")]
)
def test_rebuilt_weights_are_bit_exact(form: str, kind: str, runtime: str) -> None:
    case = case_of(form, kind, runtime)
    wanted = {name: oracle(form, case.targets[name], item.weight) for name, item in case.layers.items()}
    places = {name: place(form, case, name) for name in case.layers}
    kinds = {} if form == "packed" else dict.fromkeys(places.values(), ir.DataType.INT8)
    seen = expose(case.emitted.model, places.values(), case.feed, "fold", kinds)
    constants = case.emitted.model.graph.initializers
    for name, value_name in places.items():
        stored = constants[value_name].const_value if value_name in constants else None
        rebuilt = seen[value_name] if stored is None else stored.numpy()
        assert rebuilt.dtype == wanted[name].dtype
        assert np.array_equal(rebuilt, wanted[name]), case.layers[name].weight.spec


def test_widths_are_those_of_the_groups_not_the_layers() -> None:
    """Groups that are all alike are stored like a layer of that width, byte for byte."""
    for form, kind in (("packed", "matmul"), ("gather", "gather"), ("matmulnbits", "gemm bias"), ("qdq", "conv")):
        model = stack(KINDS[kind], 1)
        target = find_targets(model)[0]["L0"]
        plain = quantize(target, QuantSpec(3, 32))
        same = quantize(target, QuantSpec(8, 32, group_bits=(3,) * plain.scales.shape[1]))
        files = []
        for weight in (plain, same):
            emission = plan(model, {"L0": Assignment(form, weight)}, feed_of(KINDS[kind]), "ort-cpu")
            files.append(ir.to_proto(emit(model, emission).model).SerializeToString(deterministic=True))
        assert files[0] == files[1], form


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("form", "kind", "kernel"),
    [
        ("packed", "matmul", "MatMul"),
        ("packed", "lstm", "LSTM"),
        ("dynamic", "gemm bias", "DynamicQuantizeMatMul"),
        ("qdq", "conv bias", "QLinearConv"),
        ("qdq", "gemm transB", "QGemm"),
    ],
)
def test_onnxruntime_folds_the_groups_and_runs_its_own_kernel(form: str, kind: str, kernel: str, runtime: str) -> None:
    model = stack(KINDS[kind], 1)
    targets, _ = find_targets(model)
    layers = {
        name: Assignment(form, quantize(target, labelled(target, PATTERNS[0]))) for name, target in targets.items()
    }
    emitted = emit(model, plan(model, layers, feed_of(KINDS[kind]), runtime)).model
    names = [node.op_type for node in optimized_nodes(emitted)]
    assert kernel in names and not {"Gather", "Concat", "Unpack3", "BitShift", "Mod"} & set(names)


@pytest.mark.parametrize(("widths", "kernel_bits"), [((2, 3, 4, 2, 3), 4), ((4, 3, 8, 2, 4), 8), ((2, 3, 3, 2, 2), 4)])
def test_matmulnbits_widens_to_the_widest(widths: tuple[int, ...], kernel_bits: int) -> None:
    model = stack(KINDS["matmul"], 1)
    spec = QuantSpec(3, 32, group_bits=widths)
    layers = accepted("matmulnbits", "ort-cpu", find_targets(model)[0], [spec])
    (node,) = optimized_nodes(emit(model, plan(model, layers, {}, "ort-cpu")).model)
    assert node.op_type == "MatMulNBits"
    assert [item.i for item in node.attribute if item.name == "bits"] == [kernel_bits]


def test_matmulnbits_refuses_what_no_width_of_the_kernel_holds() -> None:
    target = find_targets(stack(KINDS["matmul"], 1))[0]["L0"]
    form = emitter("matmulnbits")
    assert form.refuse(target, QuantSpec(2, 32, group_bits=(1, 2, 3, 2, 2)), "ort-cpu") == "mid-rise grid"
    blocked = "blocked DequantizeLinear holds 4 and 8 bits in whole groups"
    assert form.refuse(target, QuantSpec(4, 32, group_bits=(4, 8, 4, 4, 4)), "portable") == blocked
    assert form.refuse(target, QuantSpec(2, 32, group_bits=(4,) * 5), "portable") is None
    slow = "2 bits in groups of 16: onnxruntime has no fast kernel"
    assert form.refuse(target, QuantSpec(4, 16, group_bits=(2,) * 10), "ort-cpu") == slow
    assert form.refuse(target, QuantSpec(2, 16, group_bits=(2, 3) * 5), "ort-cpu") is None


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("dynamic", "gemm transB bias"),
        ("packed", "matmul"),
        ("packed", "conv transpose"),
        *(("packed", kind) for kind in RECURRENT),
        ("qdq", "conv depthwise"),
        ("gather", "gather"),
    ],
)
def test_openvino(form: str, kind: str) -> None:
    numbers = (0, 2) if kind in RECURRENT else range(len(PATTERNS))  # recurrent layers one by one: see test_portable
    for group in ([number] for number in numbers) if kind in RECURRENT else [list(numbers)]:
        model = stack(KINDS[kind], len(group))
        targets, _ = find_targets(model)
        layers = {}
        for name, target in targets.items():
            spec = labelled(target, PATTERNS[group[int(str(target.node.name)[1:])]])
            layers[name] = Assignment(form, quantize(target, spec))
        feed = feed_of(KINDS[kind])
        emission = plan(model, layers, feed, "portable")
        got = openvino_run(check_file(emit(model, emission).model), feed)
        assert disagreeing(reference(model, emission, feed), got, emission, PORTABLE_DECIBELS) == {}


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("dynamic", Kind("Gemm", (3, 80), ((80, 8), (8,)), {}, 2)),
        ("packed", Kind("MatMul", (3, 80), ((80, 8),), {}, 2)),
        ("gather", Kind("Gather", (2, 3), ((20, 80),), {}, 3)),
    ],
)
def test_reference_implementation(form: str, kind: Kind) -> None:
    for runtime in RUNTIMES:
        if (form, runtime) != ("gather", "ort-cpu"):  # GatherBlockQuantized is onnxruntime's own
            model = stack(kind, len(PATTERNS))
            layers = layers_of(form, runtime, find_targets(model)[0])
            feed = feed_of(kind)
            emission = plan(model, layers, feed, runtime)
            got = reference_run(check_file(emit(model, emission).model), feed)
            assert disagreeing(reference(model, emission, feed), got, emission, PORTABLE_DECIBELS) == {}


@pytest.mark.parametrize("form", FORMS)
def test_wrong_bytes_and_swapped_groups_show(form: str) -> None:
    """The comparisons can fail: one byte of any plane, the planes of a width rolled, or two groups exchanged."""
    model = stack(KIND_OF[form], 1)
    targets, _ = find_targets(model)
    layers = accepted(form, "ort-cpu", targets, [QuantSpec(3, 32)])
    target = targets["L0"]
    groups = layers["L0"].weight.scales.shape[1]
    spec = QuantSpec(3, 32, group_bits=tuple(islice(cycle((4, 2, 3)), groups)))
    feed = {"x": np.arange(20)} if form == "gather" else feed_of(KIND_OF[form])
    emission = plan(model, {"L0": Assignment(form, quantize(target, spec))}, feed, "ort-cpu")
    emitted = emit(model, emission).model
    wanted = reference(model, emission, feed)
    names = [name for name in emitted.graph.initializers if "L0.codes" in name or name.startswith("groups")]
    assert len(names) == 5  # planes of 2, 2 + 1 and 4 bits, and the places of the groups
    for name in names:
        for change in (next_byte,) if name.startswith("groups") else (flip_byte, next_byte):
            copy = emitted.clone()
            value = copy.graph.initializers[name]
            assert value.const_value is not None
            value.const_value = ir.tensor(change(np.array(value.const_value.numpy())), name=name)
            assert disagreeing(wanted, make_session(copy).run(feed), emission, 60.0), (name, change)
