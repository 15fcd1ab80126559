"""If, Loop, Scan and sequences: all forms of their inputs, values of outer graphs, derivatives through iterations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnxruntime
import pytest
import torch

from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.single_node import Array, Case, by_torch

FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL
RNG = np.random.default_rng(15)


def value(name: str, kind: int = FLOAT, shape: list[int | str] | None = None) -> onnx.ValueInfoProto:
    return oh.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[onnx.NodeProto],
    feeds: dict[str, Array],
    outputs: list[str],
    constants: dict[str, Array] | None = None,
    opset: int = 21,
) -> onnx.ModelProto:
    formal = [value(k, oh.np_dtype_to_tensor_dtype(v.dtype), list(v.shape)) for k, v in feeds.items()]
    tensors = [nh.from_array(v, k) for k, v in (constants or {}).items()]
    graph = oh.make_graph(nodes, "g", formal, [onnx.ValueInfoProto(name=name) for name in outputs], tensors)
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=10)


def both(built: onnx.ModelProto, feeds: dict[str, Array]) -> tuple[list[Array], list[Array]]:
    """onnxruntime's results and ours."""
    session = onnxruntime.InferenceSession(built.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        found = to_torch(built).run({name: torch.from_numpy(array) for name, array in feeds.items()})
    return session.run(None, feeds), [item.numpy() for item in found.values()]


def agree(built: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    expected, found = both(built, feeds)
    for wanted, got in zip(expected, found, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    return found


def loop_body(condition: list[onnx.NodeProto], going: str) -> onnx.GraphProto:
    """state' = state * outer + state; one more output: the state before, and the iteration."""
    nodes = [
        *condition,
        oh.make_node("Mul", ["state", "outer"], ["scaled"]),
        oh.make_node("Add", ["scaled", "state"], ["next"]),
        oh.make_node("Identity", ["state"], ["seen"]),
        oh.make_node("Identity", ["step"], ["number"]),
    ]
    formal = [value("step", INT64, []), value("before", BOOL, []), value("state", FLOAT, [2])]
    results = [value(going, BOOL, []), value("next", FLOAT, [2]), value("seen", FLOAT, [2]), value("number", INT64, [])]
    return oh.make_graph(nodes, "body", formal, results)


FOREVER = [oh.make_node("Identity", ["before"], ["after"])]
UNTIL_LARGE = [
    oh.make_node("ReduceMax", ["state"], ["largest"], keepdims=0),
    oh.make_node("Less", ["largest", "bound"], ["after"]),
]
STATE = np.array([0.5, 1.0], dtype=np.float32)
OUTER = np.array([0.9, 1.1], dtype=np.float32)


@pytest.mark.parametrize(
    ("inputs", "condition", "steps"),
    [
        (["trips", "", "x"], FOREVER, 4),
        (["trips", "true", "x"], FOREVER, 4),
        (["", "true", "x"], UNTIL_LARGE, 6),
        (["trips", "true", "x"], UNTIL_LARGE, 4),
        (["trips", "", "x"], UNTIL_LARGE, 4),
        (["one", "true", "x"], FOREVER, 1),
    ],
)
def test_loops_like_onnxruntime(inputs: list[str], condition: list[onnx.NodeProto], steps: int) -> None:
    node = oh.make_node("Loop", inputs, ["final", "all", "numbers"], body=loop_body(condition, "after"))
    constants = {
        "trips": np.array(4),
        "one": np.array(1),
        "true": np.array(True),
        "bound": np.array(25, dtype=np.float32),
    }
    feeds = {"x": STATE, "outer": OUTER}
    found = agree(model([node], feeds, ["final", "all", "numbers"], constants), feeds)
    assert found[2].tolist() == list(range(steps))


def test_loop_that_never_runs() -> None:
    node = oh.make_node("Loop", ["trips", "false", "x"], ["final", "all", "numbers"], body=loop_body(FOREVER, "after"))
    constants = {"trips": np.array(4), "false": np.array(False)}
    built = model([node], {"x": STATE, "outer": OUTER}, ["final", "all", "numbers"], constants)
    final, everything, numbers = to_torch(built)(torch.from_numpy(STATE), torch.from_numpy(OUTER))
    assert torch.equal(final, torch.from_numpy(STATE))
    assert (len(everything), everything.dtype) == (0, torch.float32)
    assert (len(numbers), numbers.dtype) == (0, torch.int64)


def derivatives(built: onnx.ModelProto, *points: Array) -> None:
    module = to_torch(built, dtype=torch.float64)
    moving = tuple(torch.from_numpy(point).double().requires_grad_() for point in points)

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = module(*values)
        return tuple(item for item in (found if isinstance(found, tuple) else (found,)) if item.is_floating_point())

    assert torch.autograd.gradcheck(function, moving)
    assert torch.autograd.gradgradcheck(function, moving)


def test_derivatives_pass_through_loops_to_states_and_outer_values() -> None:
    node = oh.make_node("Loop", ["trips", "", "x"], ["final", "all", "numbers"], body=loop_body(FOREVER, "after"))
    feeds = {"x": STATE, "outer": OUTER}
    derivatives(model([node], feeds, ["final", "all"], {"trips": np.array(3)}), STATE, OUTER)


def branch(name: str, op: str) -> onnx.GraphProto:
    nodes = [oh.make_node(op, ["x", "y"], [f"{name}_0"]), oh.make_node("Identity", ["x"], [f"{name}_1"])]
    return oh.make_graph(nodes, name, [], [value(f"{name}_0", FLOAT, None), value(f"{name}_1", FLOAT, None)])


@pytest.mark.parametrize("condition", [np.array(True), np.array([False])], ids=["true", "false"])
def test_branches(condition: Array) -> None:
    node = oh.make_node("If", ["c"], ["a", "b"], then_branch=branch("t", "Add"), else_branch=branch("e", "Mul"))
    feeds = {"c": condition, "x": STATE, "y": OUTER}
    built = model([node], feeds, ["a", "b"])
    agree(built, feeds)
    fixed = model([node], {"x": STATE, "y": OUTER}, ["a", "b"], {"c": condition})
    derivatives(fixed, STATE, OUTER)


def scan_body() -> onnx.GraphProto:
    """state' = state + a * b; outputs: state', a with a batch of two, b."""
    nodes = [
        oh.make_node("Mul", ["a", "b"], ["product"]),
        oh.make_node("Add", ["state", "product"], ["next"]),
        oh.make_node("Identity", ["next"], ["sum"]),
        oh.make_node("Identity", ["a"], ["same"]),
    ]
    formal = [value(name, FLOAT, [2]) for name in ("state", "a", "b")]
    return oh.make_graph(nodes, "body", formal, [value(name, FLOAT, [2]) for name in ("next", "sum", "same")])


SCANNED = RNG.normal(size=(3, 2)).astype(np.float32)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"scan_input_directions": [1, 0], "scan_output_directions": [0, 1]},
        {"scan_input_axes": [0, -1], "scan_output_axes": [-1, 1]},
    ],
    ids=["plain", "directions", "axes"],
)
def test_scans_like_onnxruntime(attributes: dict[str, Any]) -> None:
    other = SCANNED.T.copy() if "scan_input_axes" in attributes else SCANNED[::-1].copy()
    feeds = {"x": STATE, "a": SCANNED, "b": other}
    node = oh.make_node("Scan", list(feeds), ["s", "o", "p"], body=scan_body(), num_scan_inputs=2, **attributes)
    built = model([node], feeds, ["s", "o", "p"])
    agree(built, feeds)
    derivatives(built, *feeds.values())


def test_scan_of_opset_8_has_batches_and_lengths() -> None:
    batch = RNG.normal(size=(2, 3, 2)).astype(np.float32)
    feeds = {"l": np.array([3, 2]), "x": np.stack([STATE, OUTER]), "a": batch, "b": batch[:, ::-1].copy()}
    node = oh.make_node("Scan", list(feeds), ["s", "o", "p"], body=scan_body(), num_scan_inputs=2, directions=[0, 1])
    found = to_torch(model([node], feeds, ["s", "o", "p"], opset=8))(*map(torch.from_numpy, feeds.values()))
    state = feeds["x"].copy()
    for sample, length in enumerate((3, 2)):
        for step in range(length):
            state[sample] += batch[sample, step] * feeds["b"][sample, length - 1 - step]
            np.testing.assert_allclose(found[1][sample, step], state[sample], rtol=1e-6)
            np.testing.assert_array_equal(found[2][sample, step], batch[sample, step])
    np.testing.assert_allclose(found[0], state, rtol=1e-6)
    assert not found[1][1, 2].any()


@pytest.mark.parametrize(
    ("attributes", "split", "pieces"),
    [
        ({"axis": 1}, None, [(3, 1), (3, 1)]),
        ({"axis": 0, "keepdims": 0}, None, [(2,), (2,), (2,)]),
        ({"axis": 0}, np.array(2), [(2, 2), (1, 2)]),
        ({"axis": 0, "keepdims": 0}, np.array([1, 2]), [(1, 2), (2, 2)]),
    ],
)
def test_sequences_of_pieces(attributes: dict[str, Any], split: Array | None, pieces: list[tuple[int, ...]]) -> None:
    case = Case("SplitToSequence", [SCANNED] if split is None else [SCANNED, split], attributes)
    (found,) = to_torch(case.model()).run({k: torch.from_numpy(v) for k, v in case.feeds().items()}).values()
    assert [tuple(piece.shape) for piece in found] == pieces


def test_sequences_are_never_changed_in_place() -> None:
    nodes = [
        oh.make_node("SequenceConstruct", ["x", "y"], ["s"]),
        oh.make_node("SequenceInsert", ["s", "x", "one"], ["longer"]),
        oh.make_node("SequenceErase", ["s"], ["shorter"]),
        oh.make_node("SequenceErase", ["longer", "minus"], ["erased"]),
        oh.make_node("ConcatFromSequence", ["longer"], ["joined"], axis=0),
        oh.make_node("ConcatFromSequence", ["erased"], ["stacked"], axis=-1, new_axis=1),
        oh.make_node("SequenceLength", ["shorter"], ["count"]),
        oh.make_node("SequenceAt", ["s", "minus"], ["last"]),
    ]
    feeds = {"x": STATE, "y": OUTER}
    constants = {"one": np.array(1), "minus": np.array(-1)}
    joined, stacked, count, last = agree(model(nodes, feeds, ["joined", "stacked", "count", "last"], constants), feeds)
    np.testing.assert_array_equal(joined, np.concatenate([STATE, STATE, OUTER]))
    np.testing.assert_array_equal(stacked, np.stack([STATE, STATE], -1))
    assert count == 1
    np.testing.assert_array_equal(last, OUTER)


def test_optionals() -> None:
    kind = oh.make_tensor_type_proto(FLOAT, None)
    nodes = [
        oh.make_node("Optional", ["x"], ["full"]),
        oh.make_node("Optional", [], ["empty"], type=kind),
        oh.make_node("OptionalHasElement", ["full"], ["yes"]),
        oh.make_node("OptionalHasElement", ["empty"], ["no"]),
        oh.make_node("OptionalGetElement", ["full"], ["y"]),
    ]
    yes, no, y = to_torch(model(nodes, {"x": STATE}, ["yes", "no", "y"]))(torch.from_numpy(STATE))
    assert bool(yes)
    assert not bool(no)
    assert torch.equal(y, torch.from_numpy(STATE))


def test_identity_passes_sequences() -> None:
    nodes = [oh.make_node("SequenceConstruct", ["x"], ["s"]), oh.make_node("Identity", ["s"], ["t"])]
    built = model(
        [*nodes, oh.make_node("SequenceAt", ["t", "zero"], ["y"])], {"x": STATE}, ["y"], {"zero": np.array(0)}
    )
    assert torch.equal(to_torch(built)(torch.from_numpy(STATE)), torch.from_numpy(STATE))
    assert by_torch(Case("Identity", [STATE]))[0].tolist() == STATE.tolist()
