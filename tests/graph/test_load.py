"""Opening models: what is refused and with which words, and what reaches the passes untouched."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from quantkit.errors import InputError
from quantkit.graph.load import load_model

Array = npt.NDArray[Any]
Build = Callable[..., onnx.ModelProto]
Run = Callable[..., list[Array]]

LINEAR = "g (float[n,16] x, float[16,32] w) => (float[n,32] y) { y = MatMul(x, w) }"
WEIGHT = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)


@pytest.fixture
def linear(build: Build) -> onnx.ModelProto:
    return build(LINEAR, {"w": WEIGHT})


@pytest.fixture
def external(tmp_path: Path, linear: onnx.ModelProto) -> Path:
    """model.onnx with `w` at offset 64 of weights.bin."""
    (tmp_path / "weights.bin").write_bytes(b"\0" * 64 + WEIGHT.tobytes())
    return write_external(tmp_path, linear, location="weights.bin", offset="64", length="2048")


def write_external(folder: Path, model: onnx.ModelProto, **entries: str) -> Path:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_file(tmp_path: Path, linear: onnx.ModelProto) -> None:
    path = tmp_path / "linear.onnx"
    path.write_bytes(linear.SerializeToString())
    loaded = load_model(str(path))
    assert loaded.source == path
    assert loaded.size == path.stat().st_size
    assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.notes == ()


def test_any_suffix(tmp_path: Path, linear: onnx.ModelProto) -> None:
    path = tmp_path / "linear.json"
    path.write_bytes(linear.SerializeToString())
    assert len(load_model(path).model.graph) == 1


def test_external_data_stays_mapped(external: Path, run: Run) -> None:
    loaded = load_model(external)
    tensor = loaded.model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert np.array_equal(tensor.numpy(), WEIGHT)
    assert loaded.size == external.stat().st_size + 64 + 2048
    content = external.read_bytes() + WEIGHT.tobytes()
    assert loaded.digest == hashlib.sha256(content).hexdigest()


def test_relative_paths(external: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(external.parent)
    tensor = load_model("model.onnx").model.graph.initializers["w"].const_value
    assert tensor is not None and np.array_equal(tensor.numpy(), WEIGHT)


def test_digest_sees_external_bytes(external: Path) -> None:
    before = load_model(external).digest
    data = bytearray((external.parent / "weights.bin").read_bytes())
    data[-1] ^= 1
    (external.parent / "weights.bin").write_bytes(data)
    assert load_model(external).digest != before


def serialised(model: onnx.ModelProto | ir.Model) -> bytes:
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    return bytes(proto.SerializeToString(deterministic=True))


@pytest.mark.parametrize("kind", ["proto", "ir"])
def test_models_in_memory_are_not_changed(kind: str, linear: onnx.ModelProto, build: Build) -> None:
    node = "y = Dropout<ratio=0.1>(z) z0 = Constant<value=float[1]{1.5}>() y1 = Add(y, z0)"
    text = LINEAR.replace("=> (float[n,32] y)", "=> (float[n,32] y1)").replace(
        "y = MatMul(x, w)", f"z = MatMul(x, w) {node}"
    )
    proto = build(text, {"w": WEIGHT}, opset=11)
    proto.graph.node[0].doc_string = "kept in the original"
    original = ir.from_proto(proto) if kind == "ir" else proto
    before = serialised(original)
    loaded = load_model(original)
    assert serialised(original) == before
    loaded.model.graph.initializers["w"].name = "renamed"
    assert serialised(original) == before
    assert loaded.source is None
    assert 2048 < loaded.size < 2048 + 1000
    assert loaded.digest == load_model(original).digest


def test_external_model_in_memory(external: Path) -> None:
    model = ir.load(external)
    loaded = load_model(model)
    assert isinstance(loaded.model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert loaded.model.graph.initializers["w"].const_value is not model.graph.initializers["w"].const_value


def test_digest_in_memory_sees_weights_and_graph(build: Build) -> None:
    digests = {
        load_model(build(LINEAR, {"w": WEIGHT})).digest,
        load_model(build(LINEAR, {"w": WEIGHT + 1})).digest,
        load_model(build(LINEAR.replace("y = ", "[other] y = "), {"w": WEIGHT})).digest,
        load_model(build(LINEAR.replace("16,32", "16,16,2"), {"w": WEIGHT.reshape(16, 16, 2)})).digest,
    }
    assert len(digests) == 4


def test_strings_load(build: Build) -> None:
    text = "g (float[2] x) => (float[2] y, string[2] s) { y = Relu(x) s = Identity(names) }"
    model = build(text, {"names": np.array(["a", "b"], dtype=object)})
    assert load_model(model).digest == load_model(ir.from_proto(model)).digest


def test_names_and_metadata(build: Build) -> None:
    text = (
        "g (float[2] x) => (float[2] out) { a = Relu(x) [same] b = Relu(a) [same] c = Neg(b) "
        "d = If (f) <then_branch = t () => (float[2] u) { u = Relu(c) }, "
        "else_branch = e () => (float[2] v) { v = Abs(c) }> out = Add(d, a) }"
    )
    model = build(text.replace("(float[2] x)", "(float[2] x, bool f)", 1))
    model.graph.node[0].doc_string = "long"
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="long")
    model.graph.node[0].metadata_props.add(key="namespace", value="long too")
    model.graph.node[0].metadata_props.add(key="mine", value="short")
    model.metadata_props.add(key="author", value="me")
    loaded = load_model(model).model
    names = [node.name for node in loaded.graph.all_nodes()]
    assert names == ["Relu/a", "same", "same_2", "If/d", "Relu/u", "Abs/v", "Add/out"]
    first = loaded.graph[0]
    assert first.doc_string is None and first.metadata_props == {"mine": "short"}
    assert loaded.metadata_props == {"author": "me"}


def test_ir_3_initializers_stop_being_inputs(build: Build, run: Run) -> None:
    model = build(LINEAR, {"w": WEIGHT}, opset=8, ir_version=3, keep_inputs=True)
    loaded = load_model(model)
    assert [value.name for value in loaded.model.graph.inputs] == ["x"]
    assert "made 1 initializers constants that were listed as inputs" in loaded.notes
    feeds = {"x": np.ones((2, 16), np.float32)}
    np.testing.assert_allclose(run(loaded.model, feeds)[0], run(model, feeds)[0], rtol=1e-6)


def test_overridable_initializers_stay_inputs(build: Build) -> None:
    loaded = load_model(build(LINEAR, {"w": WEIGHT}, keep_inputs=True))
    assert [value.name for value in loaded.model.graph.inputs] == ["x", "w"]
    assert loaded.notes == ("1 initializers are also inputs, so a caller may override them: they stay as they are",)


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "float16"), (np.float64, "float64")])
def test_other_float_weights_are_noted(dtype: type, name: str, build: Build) -> None:
    kind = {"float16": "float16", "float64": "double"}[name]
    loaded = load_model(build(LINEAR.replace("float[", f"{kind}["), {"w": WEIGHT.astype(dtype)}))
    assert loaded.notes == (f"1 weights are {name}: only float32 weights are compressed",)


def test_only_contrib_operators(build: Build) -> None:
    model = build("g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu(x) }", domains=', "com.microsoft": 1')
    del model.opset_import[0]
    assert len(load_model(model).model.graph) == 1


def test_long_name_of_the_default_domain(linear: onnx.ModelProto, run: Run) -> None:
    linear.opset_import[0].domain = "ai.onnx"
    linear.graph.node[0].domain = "ai.onnx"
    loaded = load_model(linear)
    assert dict(loaded.model.opset_imports) == {"": 21}
    assert run(loaded.model, {"x": np.ones((1, 16), np.float32)})[0].shape == (1, 32)


def test_passes_stay_silent(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("onnx_ir").level
    load_model(build(LINEAR, {"w": WEIGHT}, keep_inputs=True))
    assert caplog.records == []
    assert logging.getLogger("onnx_ir").level == level


def refuse(model: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(model)  # type: ignore[arg-type]


def test_wrong_type() -> None:
    refuse(b"model", "a model is a path, an onnx.ModelProto or an onnx_ir.Model, got bytes")


def test_wrong_paths(tmp_path: Path) -> None:
    refuse(tmp_path / "absent.onnx", "absent.onnx does not exist: check the path")
    refuse(tmp_path, "is a folder: give the .onnx file in it")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "pipe is not a regular file")
    (tmp_path / "empty.onnx").touch()
    refuse(tmp_path / "empty.onnx", "empty.onnx is empty")


def test_broken_files(tmp_path: Path, linear: onnx.ModelProto) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(linear.SerializeToString()[:-40])
    refuse(path, "model.onnx is not an ONNX model, or is truncated")
    path.write_bytes(b"hello, this is no model at all\n" * 20)
    refuse(path, "model.onnx is not an ONNX model, or is truncated")
    path.write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())
    refuse(path, "model.onnx holds no ONNX graph")


@pytest.mark.parametrize("location", ["/etc/hostname", "../weights.bin", "sub/../../weights.bin", "..\\weights.bin"])
def test_data_outside_the_folder(location: str, tmp_path: Path, linear: onnx.ModelProto) -> None:
    path = write_external(tmp_path, linear, location=location)
    refuse(path, "tensor 'w' of .*model.onnx has its data in '.*', outside the model's folder")


def test_data_behind_links(tmp_path: Path, linear: onnx.ModelProto) -> None:
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    path = write_external(folder, linear, location="weights.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "secret")
    refuse(path, "tensor 'w' of .* outside the model's folder: copy the data file beside the model")
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").hardlink_to(tmp_path / "secret")
    refuse(path, "a file with several hard links: copy it beside the model")
    (tmp_path / "secret").unlink()
    (folder / "alias").symlink_to("weights.bin")
    assert load_model(write_external(folder, linear, location="alias")).size > 2048


def test_data_that_does_not_fit(external: Path, tmp_path: Path, linear: onnx.ModelProto) -> None:
    refuse(write_external(tmp_path, linear, location="none.bin"), "in '.*none.bin', which does not exist")
    refuse(
        write_external(tmp_path, linear, location="weights.bin", offset="65"),
        "tensor 'w' of .* needs bytes 65 to 2113 of '.*weights.bin', which has 2112",
    )
    refuse(
        write_external(tmp_path, linear, location="weights.bin", offset="-1"),
        "needs bytes -1 to 2047 of '.*weights.bin'",
    )
    refuse(
        write_external(tmp_path, linear, location="weights.bin", length="1000"),
        "tensor 'w' of .* has 1000 bytes in '.*weights.bin', but its shape and type take 2048",
    )
    refuse(write_external(tmp_path, linear, location="weights.bin", offset="x"), "offset or length that is no number")
    refuse(write_external(tmp_path, linear, offset="0"), "tensor 'w' of .* names no external data file")


def test_external_protobuf_in_memory(external: Path) -> None:
    refuse(onnx.load(external, load_external_data=False), "refers to external data files: give load_model the path")


def test_external_ir_model_in_memory(external: Path) -> None:
    model = ir.load(external)
    value = model.graph.initializers["w"]
    value.const_value = ir.ExternalTensor(
        "weights.bin", 64, 100, ir.DataType.FLOAT, shape=ir.Shape([16, 32]), name="w", base_dir=external.parent
    )
    refuse(model, "tensor 'w' of the model has 100 bytes in '.*weights.bin', but its shape and type take 2048")
    value.const_value = ir.ExternalTensor(
        "weights.bin", 65, None, ir.DataType.FLOAT, shape=ir.Shape([16, 32]), name="w", base_dir=external.parent
    )
    refuse(model, "tensor 'w' of the model needs bytes 65 to 2113")


def test_broken_tensors(linear: onnx.ModelProto) -> None:
    tensor = linear.graph.initializer[0]
    tensor.dims[0] = 17
    refuse(linear, r"tensor 'w' of the model has 2048 bytes, but its shape \[17, 32\] takes 2176")
    tensor.dims[0] = -1
    refuse(linear, r"tensor 'w' of the model has the shape \[-1, 32\]")
    tensor.dims[0] = 16
    tensor.data_type = 99
    refuse(linear, "tensor 'w' of the model has the unknown data type 99")
    tensor.data_type = onnx.TensorProto.FLOAT
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0] * 10)
    refuse(linear, "tensor 'w' of the model has 40 bytes")


def test_sparse_tensors(linear: onnx.ModelProto) -> None:
    constant = linear.graph.node.add(op_type="Constant", output=["c"], name="sparse")
    attribute = constant.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.dims.append(4)
    refuse(linear, "node 'sparse' of the model holds a sparse constant")
    del linear.graph.node[1]
    linear.graph.sparse_initializer.add().values.name = "s"
    refuse(linear, "the model stores 's' as a sparse initializer")


def test_broken_graphs(linear: onnx.ModelProto) -> None:
    linear.graph.node[0].input[0] = "nowhere"
    refuse(linear, "node 'MatMul' of the model reads 'nowhere', which nothing makes")
    linear.graph.node[0].input[0] = "x"
    linear.graph.output[0].name = "nothing"
    refuse(linear, "output 'nothing' of the model is made by nothing")
    linear.graph.output[0].name = "y"
    linear.graph.node.add(op_type="Relu", input=["x"], output=["y"])
    refuse(linear, "the model is not a valid ONNX model: .*'y'")


def test_values_made_twice(linear: onnx.ModelProto) -> None:
    model = ir.from_proto(linear)
    model.graph[0].outputs[0].name = "x"
    refuse(model, "value 'x' of the model is made twice")


def test_names_that_are_no_text(tmp_path: Path, linear: onnx.ModelProto) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(linear.SerializeToString().replace(b"MatMul", b"MatMu\xff"))
    refuse(path, "model.onnx holds a name that is not UTF-8 text")


def test_versions(linear: onnx.ModelProto) -> None:
    linear.ir_version = 2
    refuse(linear, "the model has IR version 2, older than 3")
    linear.ir_version = 8
    linear.opset_import[0].version = 6
    refuse(linear, "the model has opset 6, older than 7: export it again with a newer opset")
    del linear.opset_import[:]
    linear.opset_import.add(domain="my.domain", version=1)
    refuse(linear, "the model imports no opset of the default ONNX domain")
