"""The module around the converters: names, constants, memory, hooks, nested graphs, messages."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.torch_backend import to_torch
from tests.runtime.torch_backend.graphs import FLOAT, INT64, function_of, model_of, value

SEED = 3


@pytest.fixture
def mlp() -> onnx.ModelProto:
    generator = np.random.default_rng(SEED)
    constants = {
        "w.1": generator.normal(size=(3, 5)).astype(np.float32),
        "w 1": generator.normal(size=(5,)).astype(np.float32),
        "w2": generator.normal(size=(5, 2)).astype(np.float32),
    }
    nodes = [
        oh.make_node("MatMul", ["x", "w.1"], ["a"]),
        oh.make_node("Add", ["a", "w 1"], ["b"]),
        oh.make_node("Relu", ["b"], ["c"]),
        oh.make_node("MatMul", ["c", "w2"], ["y"]),
    ]
    return model_of(nodes, [value("x", ["n", 3])], [value("y", ["n", 2])], constants)


def test_inputs_by_position_and_by_name_and_any_value_as_output(mlp: onnx.ModelProto) -> None:
    module = to_torch(mlp)
    x = torch.randn(4, 3)
    weights = {init.name: torch.from_numpy(nh.to_array(init).copy()) for init in mlp.graph.initializer}
    hidden = x @ weights["w.1"] + weights["w 1"]
    assert torch.allclose(module(x), hidden.relu() @ weights["w2"], atol=1e-6)
    assert torch.equal(module(x=x), module(x))
    found = module.run({"x": x}, ["b", "y", "x"])
    assert torch.allclose(found["b"], hidden, atol=1e-6)
    assert found["x"] is x
    assert list(found) == ["b", "y", "x"]


def test_parameters_have_keys_of_their_own_and_share_memory_with_the_model(mlp: onnx.ModelProto) -> None:
    module = to_torch(ir.from_proto(mlp))
    assert sorted(module.keys) == ["w 1", "w.1", "w2"]
    assert len({*module.keys.values()}) == 3
    assert {*module.state_dict()} == {*module.keys.values()}
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_functional_call_replaces_weights_and_gradients_reach_them(mlp: onnx.ModelProto) -> None:
    module = to_torch(mlp, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    key = module.keys["w2"]
    replaced = torch.func.functional_call(module, {key: torch.zeros(5, 2, dtype=torch.float64)}, (x,))
    assert torch.equal(replaced, torch.zeros(4, 2, dtype=torch.float64))
    module.requires_grad_(True)
    module(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_compute_type_covers_weights_and_casts() -> None:
    nodes = [oh.make_node("Cast", ["i"], ["f"], to=FLOAT), oh.make_node("MatMul", ["f", "w"], ["y"])]
    weight = np.array([[0.1], [0.2]], dtype=np.float32)
    model = model_of(nodes, [value("i", [1, 2], INT64)], [value("y", [1, 1])], {"w": weight})
    assert to_torch(model, dtype=torch.float64)(torch.tensor([[1, 2]])).dtype == torch.float64
    assert to_torch(model)(torch.tensor([[1, 2]])).dtype == torch.float32


def test_watch_sees_replaces_and_ends(mlp: onnx.ModelProto) -> None:
    module, x = to_torch(mlp), torch.randn(2, 3)
    before = module(x)
    seen: list[torch.Tensor] = []
    end = module.watch("c", lambda tensor: seen.append(tensor))
    assert torch.equal(module(x), before)
    assert len(seen) == 1
    assert bool((seen[0] >= 0).all())
    end()
    stop = module.watch("b", torch.zeros_like)
    assert torch.equal(module(x), torch.zeros(2, 2))
    assert len(seen) == 1
    stop()
    stop()
    stop = module.watch("x", lambda tensor: 2 * tensor)
    assert torch.allclose(module(x), module.run({"x": x})["y"])
    stop()
    assert torch.equal(module(x), before)


def test_intermediates_are_forgotten_after_their_last_reader(mlp: onnx.ModelProto) -> None:
    module = to_torch(mlp)
    alive: list[weakref.ref[torch.Tensor]] = []
    at_the_end: list[int] = []

    def remember(tensor: torch.Tensor) -> None:
        alive.append(weakref.ref(tensor))

    def count(tensor: torch.Tensor) -> None:
        gc.collect()
        at_the_end.append(sum(item() is not None for item in alive))

    for name in ("a", "b"):
        module.watch(name, remember)
    module.watch("y", count)
    with torch.no_grad():
        module(torch.randn(2, 3))
    assert len(alive) == 2
    assert at_the_end == [0]
    with torch.no_grad():
        assert set(module.run({"x": torch.randn(2, 3)}, ["a", "y"])) == {"a", "y"}  # asked for: kept
    assert at_the_end == [0, 1]


def test_external_weights_stay_memory_mapped(mlp: onnx.ModelProto, tmp_path: Path) -> None:
    original = onnx.ModelProto()
    original.CopyFrom(mlp)  # saving turns the weights into references
    onnx.save(mlp, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    module = to_torch(tmp_path / "m.onnx")
    x = torch.randn(2, 3)
    assert torch.equal(module(x), to_torch(original)(x))
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path / "w.bin") in mapped.read_text()


def test_initializer_that_is_also_an_input_may_be_overridden(mlp: onnx.ModelProto) -> None:
    mlp.graph.input.append(value("w2", [5, 2]))
    module, x = to_torch(mlp), torch.randn(2, 3)
    assert module.input_names == ("x",)
    assert torch.equal(module(x, w2=torch.zeros(5, 2)), torch.zeros(2, 2))
    assert module(x).abs().sum() > 0
    mlp.ir_version = 3  # then all initializers had to be inputs, and none may be overridden
    with pytest.raises(InputError, match="'w2' is unknown"):
        to_torch(mlp)(x, w2=torch.zeros(5, 2))


def test_packed_constants_are_unpacked_for_their_readers_only() -> None:
    packed = oh.make_tensor("w", onnx.TensorProto.INT4, [3, 3], [-8, -1, 0, 1, 7, 2, 3, -4, 5])
    nodes = [
        oh.make_node("DequantizeLinear", ["w", "s"], ["f"]),
        oh.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    model = model_of(nodes, [value("x", [1, 3])], [value("y", [1, 3])], {"s": np.float32(0.5)})
    model.graph.initializer.append(packed)
    module = to_torch(model)
    assert dict(module.named_buffers())[module.keys["w"]].numel() == 5  # 9 codes of 4 bits
    expected = torch.ones(1, 3) @ (torch.tensor([[-8.0, -1, 0], [1, 7, 2], [3, -4, 5]]) * 0.5)
    assert torch.equal(module(torch.ones(1, 3)), expected)


def local_function() -> onnx.FunctionProto:
    """Scaled(x, optional b; factor) = x * factor (+ b)."""
    constant = oh.make_node("Constant", [], ["k"])
    constant.attribute.add(name="value_float", ref_attr_name="factor", type=onnx.AttributeProto.FLOAT)
    nodes = [constant, oh.make_node("Mul", ["x", "k"], ["p"]), oh.make_node("Sum", ["p", "b"], ["y"])]
    return function_of("Scaled", ["x", "b"], ["y"], nodes, ["factor"])


def test_functions_of_the_model_expand_with_their_attributes_and_absent_inputs() -> None:
    nodes = [
        oh.make_node("Scaled", ["x", "x"], ["u"], domain="local", factor=3.0),
        oh.make_node("Scaled", ["u", "b"], ["y"], domain="local", factor=2.0),
    ]
    model = model_of(
        nodes, [value("x", [2])], [value("y", [2])], {"b": np.array([1, 1], np.float32)}, functions=[local_function()]
    )
    assert torch.equal(to_torch(model)(torch.tensor([1.0, 2.0])), torch.tensor([9.0, 17.0]))


def test_an_if_reads_values_and_constants_of_outer_graphs() -> None:
    def branch(op: str) -> onnx.GraphProto:
        return oh.make_graph([oh.make_node(op, ["h", "c"], [f"o_{op}"])], op, [], [value(f"o_{op}", [2])])

    nodes = [
        oh.make_node("Mul", ["x", "x"], ["h"]),
        oh.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        oh.make_node("Greater", ["total", "zero"], ["up"]),
        oh.make_node("If", ["up"], ["y"], then_branch=branch("Add"), else_branch=branch("Sub")),
    ]
    constants = {"c": np.array([1, 2], np.float32), "zero": np.float32(0)}
    module = to_torch(model_of(nodes, [value("x", [2])], [value("y", [2])], constants))
    assert torch.equal(module(torch.tensor([1.0, 2.0])), torch.tensor([2.0, 6.0]))
    assert torch.equal(module(torch.tensor([-1.0, -2.0])), torch.tensor([0.0, 2.0]))
    with pytest.raises(InputError, match="the main graph has no value 'o_Add'"):
        module.watch("o_Add", lambda tensor: None)


def test_every_unsupported_operator_is_named_with_its_nodes_before_anything_runs() -> None:
    nodes = [
        oh.make_node("Nonsense", ["x"], ["a"], name="first", domain="local"),
        oh.make_node("Nonsense", ["a"], ["b"], name="second", domain="local"),
        oh.make_node("StringNormalizer", ["b"], ["y"], name="text"),
    ]
    model = model_of(nodes, [value("x", [2])], [value("y", [2])])
    with pytest.raises(
        InputError, match=r"StringNormalizer \(nodes 'text'\); local.Nonsense \(nodes 'first', 'second'\)"
    ):
        to_torch(model)


def test_wrong_inputs_are_told(mlp: onnx.ModelProto) -> None:
    module = to_torch(mlp)
    with pytest.raises(InputError, match="'x' is missing"):
        module()
    with pytest.raises(InputError, match="'z' is unknown"):
        module(torch.ones(1, 3), z=1)
    with pytest.raises(InputError, match="by position and by name"):
        module(torch.ones(1, 3), x=torch.ones(1, 3))
    with pytest.raises(InputError, match="has 1 inputs, got 2"):
        module(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(InputError, match="no value 'nowhere'"):
        module.run({"x": torch.ones(1, 3)}, ["nowhere"])


def test_a_value_that_nothing_defines_is_told(mlp: onnx.ModelProto) -> None:
    graph = ir.from_proto(mlp)
    graph.graph.initializers["w2"].const_value = None
    with pytest.raises(InputError, match="'w2'"):
        to_torch(graph)


def test_constants_of_strings_are_refused() -> None:
    node = oh.make_node("Constant", [], ["s"], value_string="text")
    model = model_of([node, oh.make_node("Identity", ["s"], ["y"])], [], [value("y", [], onnx.TensorProto.STRING)])
    with pytest.raises(InputError, match="value_string"):
        to_torch(model)
