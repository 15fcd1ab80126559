"""What users do to modules: train, copy, move, watch, feed wrong things; and what unusual graphs need."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.errors import InputError
from quantkit.runtime.ort import make_session
from quantkit.runtime.torch_backend import TorchModule, to_torch
from tests.runtime.torch_backend.graphs import BOOL, FLOAT, INT4, INT64, function_of, model_of, value

ONE = np.array([1], np.int64)


def mlp() -> onnx.ModelProto:
    weights = {"w": np.arange(9, dtype=np.float32).reshape(3, 3) / 10, "b": np.ones(3, np.float32)}
    nodes = [
        oh.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        oh.make_node("Add", ["a", "b"], ["c"]),
        oh.make_node("Tanh", ["c"], ["y"]),
    ]
    return model_of(nodes, [value("x", ["n", 3])], [value("y")], weights)


def branch(nodes: list[onnx.NodeProto], output: str, kind: int = FLOAT) -> onnx.GraphProto:
    return oh.make_graph(nodes, "branch", [], [value(output, None, kind)])


def elsewhere(module: TorchModule, feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs on a device that has no data: nothing may be read back, nothing made on the CPU."""
    with torch.no_grad():
        found = list(module.to("meta").run({name: item.to("meta") for name, item in feed.items()}).values())
    assert all(item.device.type == "meta" for item in found)
    return found


def test_changes_of_memory_mapped_weights_stay_in_memory(tmp_path: Path) -> None:
    model = mlp()
    model.graph.node.append(oh.make_node("DequantizeLinear", ["q", "s"], ["z"]))
    model.graph.output.append(value("z"))
    model.graph.initializer.extend(
        [oh.make_tensor("q", INT4, [5], [-8, 7, 1, -1, 3]), nh.from_array(np.float32(2), "s")]
    )
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    before = (tmp_path / "w.bin").read_bytes()
    module, x = to_torch(tmp_path / "m.onnx").requires_grad_(True), torch.ones(2, 3)
    assert module(x)[1].tolist() == [-16, 14, 2, -2, 6]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    first = module(x)[0].sum()
    first.backward()
    optimizer.step()
    assert module(x)[0].sum() < first
    module.load_state_dict({key: torch.zeros_like(item) for key, item in module.state_dict().items()})
    assert not module(x)[1].any()
    assert (tmp_path / "w.bin").read_bytes() == before
    assert to_torch(tmp_path / "m.onnx")(x)[0].sum() == first


def test_a_single_byte_is_not_shared_with_python() -> None:
    node = oh.make_node("DequantizeLinear", ["q", "s"], ["y"])
    model = model_of([node], [], [value("y")], {"q": np.uint8(200), "s": np.float32(1)})
    module = to_torch(model)
    module.get_buffer(module.keys["q"]).fill_(3)
    assert module() == 3
    assert bytes([200])[0] == 200


def test_integers_that_subgraphs_compute_are_taken_where_they_are() -> None:
    five = oh.make_node("Constant", [], ["five"], value_ints=[5, 5, 5, 5])
    nodes = [
        oh.make_node("Shape", ["x"], ["s"], end=1),
        oh.make_node("Equal", ["s", "three"], ["c"]),
        oh.make_node(
            "If",
            ["c"],
            ["k"],
            then_branch=branch([oh.make_node("ArgMax", ["x"], ["am"], axis=0, keepdims=0)], "am", INT64),
            else_branch=branch([five], "five", INT64),
        ),
        oh.make_node("Add", ["k", "one"], ["y"]),
    ]
    constants = {"three": np.array([3]), "one": ONE}
    module = to_torch(model_of(nodes, [value("x", ["n", 4])], [value("y", None, INT64)], constants))
    x = torch.eye(4)[:3]
    assert module(x).tolist() == [1, 2, 3, 1]
    assert module(x[:2]).tolist() == [6, 6, 6, 6]
    for rows in (2, 3):
        assert elsewhere(module, {"x": x[:rows]})[0].shape == (4,)


def test_shapes_are_combined_with_initializers_that_a_caller_may_replace() -> None:
    nodes = [
        oh.make_node("Shape", ["x"], ["s"]),
        oh.make_node("Add", ["s", "one"], ["t"]),
        oh.make_node("Cast", ["t"], ["f"], to=FLOAT),
        oh.make_node("Add", ["x", "f"], ["y"]),
    ]
    module = to_torch(model_of(nodes, [value("x", ["n", 2]), value("one", [1], INT64)], [value("y")], {"one": ONE}))
    x = torch.zeros(3, 2)
    assert torch.equal(module(x), torch.tensor([[4.0, 3.0]]).expand(3, 2))
    assert torch.equal(module(x, one=torch.tensor([2])), torch.tensor([[5.0, 4.0]]).expand(3, 2))
    assert elsewhere(module, {"x": x})[0].shape == (3, 2)


def head_function() -> list[onnx.FunctionProto]:
    """Outer(x, shape) = (the first numbers of x in that shape, their count), by a function within a function."""
    inner = [
        oh.make_node("Constant", [], ["start"], value_ints=[0]),
        oh.make_node("ReduceProd", ["shape"], ["count"], keepdims=1),
        oh.make_node("Slice", ["x", "start", "count"], ["part"]),
        oh.make_node("Reshape", ["part", "shape"], ["y"]),
    ]
    outer = [oh.make_node("Inner", ["x", "shape"], ["y", "count"], domain="local")]
    return [
        function_of("Outer", ["x", "shape"], ["y", "count"], outer),
        function_of("Inner", ["x", "shape"], ["y", "count"], inner),
    ]


@pytest.mark.parametrize("computed", [False, True])
def test_shapes_stay_shapes_inside_functions(computed: bool) -> None:
    nodes = [
        oh.make_node("Outer", ["x", "n" if computed else "two"], ["u", "count"], domain="local"),
        oh.make_node("Expand", ["u", "count"], ["y"]),
    ]
    if computed:
        nodes = [oh.make_node("Shape", ["z"], ["n"]), *nodes]
    inputs = [value("x", [8]), value("z", ["a", "b"])]
    model = model_of(nodes, inputs, [value("y")], {"two": np.array([1, 3])}, functions=head_function())
    feed = {"x": torch.arange(8.0), "z": torch.zeros(1, 3)}
    module = to_torch(model)
    assert module(**feed).tolist() == [[0, 1, 2]]
    assert elsewhere(module, feed)[0].shape == (1, 3)


def test_a_function_may_return_its_parameters_or_nothing() -> None:
    swap = function_of("Swap", ["a", "b"], ["b", "a"], [])
    idle = function_of("Idle", ["a"], [], [oh.make_node("Relu", ["a"], ["q"])])
    nodes = [
        oh.make_node("Idle", ["x"], [], domain="local"),
        oh.make_node("Swap", ["x", "w"], ["p", "q"], domain="local"),
        oh.make_node("Sub", ["p", "q"], ["y"]),
    ]
    weights = {"w": np.array([3, 5], np.float32)}
    model = model_of(nodes, [value("x", [2])], [value("y")], weights, functions=[swap, idle])
    assert to_torch(model)(torch.ones(2)).tolist() == [2, 4]


def test_lists_follow_to_the_device() -> None:
    nodes = [
        oh.make_node("Shape", ["x"], ["s"]),
        oh.make_node("Cast", ["s"], ["f"], to=FLOAT),
        oh.make_node("SequenceConstruct", ["f"], ["l"]),
        oh.make_node("SequenceInsert", ["l", "x"], ["m"]),
        oh.make_node("ConcatFromSequence", ["m"], ["y"], axis=0),
    ]
    module = to_torch(model_of(nodes, [value("x", ["n"])], [value("y")]))
    assert module(torch.tensor([7.0, 8.0])).tolist() == [2, 7, 8]
    assert elsewhere(module, {"x": torch.ones(2)})[0].shape == (3,)


def clashing() -> onnx.ModelProto:
    """A function's constant has the name of an initializer, and comes first; zeros are brought to the device inside."""
    nodes = [
        oh.make_node("Constant", [], ["w"], value_floats=[7.0, 7.0, 7.0]),
        oh.make_node("Add", ["a", "w"], ["p"]),
        oh.make_node("Shape", ["p"], ["s"]),
        oh.make_node("ConstantOfShape", ["s"], ["zeros"]),
        oh.make_node("Add", ["p", "zeros"], ["o"]),
    ]
    calls = [
        oh.make_node("Plus", ["x"], ["z"], domain="local"),
        oh.make_node("MatMul", ["z", "w"], ["y"]),
    ]
    functions = [function_of("Plus", ["a"], ["o"], nodes)]
    return model_of(calls, [value("x", ["n", 3])], [value("y")], {"w": np.eye(3, 2, dtype=np.float32)}, 21, functions)


def test_names_in_functions_do_not_hide_those_of_the_main_graph() -> None:
    module = to_torch(clashing())
    assert module.keys == {"w": "w"}
    assert {key: tuple(item.shape) for key, item in module.state_dict().items()} == {"w": (3, 2), "w_2": (3,)}
    assert module(torch.zeros(1, 3)).tolist() == [[7, 7]]


def test_a_copy_is_a_module_of_its_own() -> None:
    module, x = to_torch(clashing()), torch.zeros(1, 3)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.get_parameter("w").zero_()
    assert not other(x).any()
    assert module(x).tolist() == [[7, 7]]
    elsewhere(other, {"x": x})
    assert module(x).tolist() == [[7, 7]]


def test_nothing_of_the_graph_is_kept() -> None:
    def graphs() -> int:
        gc.collect()
        return sum(type(item) is ir.Graph for item in gc.get_objects())

    before = graphs()
    module = to_torch(clashing())
    assert graphs() == before
    parameters = {key: weakref.ref(item.untyped_storage()) for key, item in module.named_parameters()}
    module.to("meta")  # the old weights must go
    del module
    gc.collect()
    assert all(item() is None for item in parameters.values())


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.tensors += [weakref.ref(item) for item in (*args, result) if isinstance(item, torch.Tensor)]
        alive = [item for reference in self.tensors if (item := reference()) is not None]
        storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in alive}
        self.bytes = max(self.bytes, sum(storages.values()))
        return result


def test_a_deep_chain_needs_no_more_memory_than_written_in_torch() -> None:
    names = ["x", *(f"v{k}" for k in range(11)), "y"]
    nodes = [oh.make_node(("Neg", "Tanh")[k % 2], [names[k]], [names[k + 1]]) for k in range(12)]
    module, x = to_torch(model_of(nodes, [value("x", ["n"])], [value("y")])), torch.ones(1000)

    def eager(x: torch.Tensor) -> torch.Tensor:
        for k in range(12):
            x = (torch.neg, torch.tanh)[k % 2](x)
        return x

    peaks = []
    for run in (module, eager):
        with torch.no_grad(), Peak() as peak:
            run(x)
        peaks.append(peak.bytes)
    assert peaks == [3 * x.nbytes] * 2


def test_errors_tell_the_node_and_what_it_got() -> None:
    module = to_torch(mlp())
    with pytest.raises(RuntimeError) as caught:
        module(torch.ones(2, 4))
    assert caught.value.__notes__ == ["in MatMul 'product' of float32[2, 4], float32[3, 3]"]
    with pytest.raises(RuntimeError) as caught:
        module(torch.ones(2, 3, dtype=torch.float64))
    assert caught.value.__notes__ == ["in MatMul 'product' of float64[2, 3], float32[3, 3]"]
    inner = to_torch(clashing())
    with pytest.raises(RuntimeError) as caught:
        inner(torch.ones(2, 4))
    assert caught.value.__notes__ == [
        "in Add 'p' of float32[2, 4], float32[3]",
        "in Plus 'z' of float32[2, 4], float32[3]",
    ]


def test_inputs_that_are_no_tensors_are_told() -> None:
    with pytest.raises(InputError, match=r"'x' is a ndarray, give a torch.Tensor"):
        to_torch(mlp())(np.ones((1, 3), np.float32))


def test_watchers_may_come_twice_end_themselves_and_run_the_module() -> None:
    module, x = to_torch(clashing()), torch.ones(1, 3)
    calls: list[str] = []

    def counted(tensor: torch.Tensor) -> None:
        calls.append("counted")

    def once(tensor: torch.Tensor) -> None:
        calls.append("once")
        end_once()
        module(x.to(tensor.device))

    end_once = module.watch("z", once)
    end_first, end_second = module.watch("z", counted), module.watch("z", counted)
    module.to("meta")
    module(x.to("meta"))
    assert calls == ["once", *["counted"] * 4]
    end_first()
    end_first()
    module(x.to("meta"))
    assert len(calls) == 6
    end_second()
    module(x.to("meta"))
    assert len(calls) == 6


def test_threads_do_not_disturb_each_other() -> None:
    """A run on one device goes on while another thread is in the middle of one elsewhere."""
    module, x = to_torch(clashing()), torch.zeros(1, 3)
    other = copy.deepcopy(module).to("meta")
    inside, done = threading.Event(), threading.Event()

    def pause(tensor: torch.Tensor) -> None:
        inside.set()
        assert done.wait(10)

    def start_other(tensor: torch.Tensor) -> None:
        thread.start()
        assert inside.wait(10)

    thread = threading.Thread(target=lambda: other(x.to("meta")))
    other.watch("x", pause)
    module.watch("x", start_other)
    try:
        assert module(x).tolist() == [[7, 7]]
    finally:
        done.set()
        thread.join()


def test_packed_constants_may_be_empty_or_scalars() -> None:
    nodes = [oh.make_node("DequantizeLinear", [name, "s"], [f"{name}_y"]) for name in ("none", "one")]
    model = model_of(nodes, [], [value("none_y"), value("one_y")], {"s": np.float32(0.5)})
    model.graph.initializer.extend([oh.make_tensor("none", INT4, [0, 3], []), oh.make_tensor("one", INT4, [], [-3])])
    none, one = to_torch(model)()
    assert none.shape == (0, 3)
    assert one == -1.5


def test_an_empty_batch_is_split_into_heads() -> None:
    node = oh.make_node("Reshape", ["x", "shape"], ["y"])
    inputs = [value("x", ["n", 4, 6]), value("shape", [4], INT64)]
    model = model_of([node], inputs, [value("y")])
    found = to_torch(model)(torch.zeros(0, 4, 6), torch.tensor([0, 4, -1, 2]))
    assert found.shape == (0, 4, 3, 2)


QUANTIZED = {
    "linear": [oh.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), oh.make_node("Identity", ["s"], ["t"])],
    "dynamic": [oh.make_node("DynamicQuantizeLinear", ["x"], ["q", "t", "u"])],
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_straight_through_gradients_pass_forwards_as_well(name: str) -> None:
    nodes = [
        *QUANTIZED[name],
        oh.make_node("MatMulInteger", ["q", "w"], ["i"]),
        oh.make_node("Cast", ["i"], ["f"], to=FLOAT),
        oh.make_node("Mul", ["f", "t"], ["y"]),
    ]
    constants = {"s": np.float32(0.1), "z": np.uint8(128), "w": np.array([[1, -2], [3, 4]], np.int8)}
    module = to_torch(model_of(nodes, [value("x", [1, 2])], [value("y")], constants))
    x = torch.tensor([[0.3, -0.72]])
    forwards, backwards = torch.func.jacfwd(module)(x), torch.func.jacrev(module)(x)
    assert torch.allclose(forwards, backwards, atol=1e-4)
    assert backwards.abs().sum() > 1


def test_an_if_inside_a_loop_reads_what_three_graphs_define() -> None:
    more = [oh.make_node("Constant", [], ["k"], value_float=2.0), oh.make_node("Mul", ["state", "k"], ["r1"])]
    more.append(oh.make_node("Add", ["r1", "bias"], ["r"]))
    less = [oh.make_node("Constant", [], ["k"], value_float=-1.0), oh.make_node("Mul", ["state", "k"], ["r"])]
    body = oh.make_graph(
        [
            oh.make_node("Identity", ["go"], ["on"]),
            oh.make_node("Mod", ["step", "two"], ["odd"]),
            oh.make_node("Cast", ["odd"], ["c"], to=BOOL),
            oh.make_node("If", ["c"], ["next"], then_branch=branch(less, "r"), else_branch=branch(more, "r")),
            oh.make_node("ReduceMean", ["next"], ["seen"], keepdims=0),
        ],
        "body",
        [value("step", [], INT64), value("go", [], BOOL), value("state")],
        [value("on", [], BOOL), value("next"), value("seen")],
        [nh.from_array(np.int64(2), "two")],
    )
    nodes = [oh.make_node("Relu", ["x"], ["h"]), oh.make_node("Loop", ["n", "", "h"], ["y", "means"], body=body)]
    inputs = [value("x", [3]), value("n", [], INT64)]
    model = model_of(nodes, inputs, [value("y", [3]), value("means", ["n"])], {"bias": np.arange(3, dtype=np.float32)})
    feed = {"x": np.array([1, -1, 2], np.float32), "n": np.array(3)}
    expected = make_session(ir.from_proto(model), threads=1, optimize="none").run(feed)
    found = to_torch(model).run({name: torch.from_numpy(item) for name, item in feed.items()})
    for name, item in expected.items():
        np.testing.assert_allclose(found[name].numpy(), item, rtol=1e-6)
