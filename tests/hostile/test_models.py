"""Models made to do harm: each is refused with one sentence, within seconds and little memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from tests.helpers import hostile, models

EXTENT = 1 << 40
HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }"
Damage = Callable[[onnx.ModelProto], None]


def external(folder: Path, **entries: str) -> Path:
    """A model whose weight lies in w.bin, unless the entries say otherwise."""
    model = models.matmul()
    tensor = model.graph.initializer[0]
    (folder / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return hostile.saved(model, folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../w.bin"}, "has its data in '../w.bin', outside the model's folder"),
        ({"location": "/etc/passwd"}, "has its data in '/etc/passwd', outside the model's folder"),
        ({"location": "link"}, "outside the model's folder: copy the data file beside the model"),
        ({"location": "circle"}, "which cannot be opened (Symlink loop"),
        ({"location": "w\0.bin"}, "which cannot be opened (embedded null byte): export it again"),
        ({"location": "w" * 5000}, "...', which cannot be opened (File name too long): export it again"),
        ({"location": "."}, "which is no regular file: copy the data file beside the model"),
        ({"location": "pipe"}, "which is no regular file"),
        ({"offset": "-4"}, "needs bytes -4 to 16380 of "),
        ({"offset": "1"}, "needs bytes 1 to 16385 of "),
        ({"offset": str(1 << 70)}, "which has 16384: export or download it again"),
        ({"offset": "9" * 6000}, "has an offset or length that is no number"),
        ({"length": "0"}, "has 0 bytes in "),
        ({"length": "-16384"}, "has -16384 bytes in "),
    ],
)
def test_external_data(entries: dict[str, str], message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "circle").symlink_to("circle")
    hostile.refuse(external(tmp_path, **entries), "tensor 'w' of", message)


def test_external_names_that_are_no_text(tmp_path: Path) -> None:
    path = external(tmp_path, location="QQQQ")
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"\xff\xfe\xfd\xfc"))
    hostile.refuse(path, r"has its data in b'\xff\xfe\xfd\xfc', which is not UTF-8 text")


def test_nothing_is_said_on_the_side(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Not of entries that nobody knows, nor of arithmetic with weights that are no numbers."""
    assert hostile.refused(external(tmp_path, unknown="1")) is None
    model = models.build(
        "g (float[1,64,8,8] x, float[64,64,1,1] w, float[64] v) => (float[1,64,8,8] y) "
        "{ z = Conv(x, w) y = BatchNormalization(z, v, v, v, v) }",
        {"w": models.random(64, 64).reshape(64, 64, 1, 1), "v": np.full(64, -1e38, np.float32)},
    )
    hostile.refuse(hostile.saved(model, tmp_path), "holds NaN or infinity")
    assert not recwarn.list


def test_tensors_that_overlap(tmp_path: Path) -> None:
    """A small file of a thousand gigabytes of weights."""
    path = external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    for number in range(40):
        copied = model.graph.initializer.add()
        copied.CopyFrom(model.graph.initializer[0])
        copied.name = f"w{number}"
    hostile.refuse(
        hostile.saved(model, tmp_path), "overlap in", "they read 671744 bytes of a file of 16384: export it again"
    )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorProto(data_type=1, dims=[EXTENT, EXTENT]), "has 0 bytes, but its shape"),
        (TensorProto(data_type=7, dims=[EXTENT]), "has 0 bytes, but its shape [1099511627776] takes 8796093022208"),
        (TensorProto(data_type=10, dims=[EXTENT], int32_data=[1]), "has 2 bytes, but"),
        (TensorProto(data_type=22, dims=[EXTENT], int32_data=[1]), "has 1 bytes, but its shape [1099511627776] takes"),
        (TensorProto(data_type=12, dims=[2], uint64_data=[1]), "has 4 bytes, but its shape [2] takes 8"),
        (TensorProto(data_type=14, dims=[1], float_data=[1]), "has 4 bytes, but its shape [1] takes 8"),
        (TensorProto(data_type=8, dims=[EXTENT], string_data=[b"a"]), "has 1 elements, but its shape"),
        (TensorProto(data_type=8, dims=[-1, -1], string_data=[b"a"]), "has the shape [-1, -1]"),
        (TensorProto(data_type=1, dims=[1], int32_data=[1]), "in int32_data, which is not for the type float"),
        (TensorProto(data_type=8, dims=[1], raw_data=b"a"), "in raw_data, which is not for the type string"),
        (TensorProto(data_type=0, dims=[1]), "has the unknown data type 0"),
    ],
)
def test_tensors_that_are_not_what_they_say(tensor: TensorProto, message: str, tmp_path: Path) -> None:
    model = models.matmul()
    tensor.name = "other"
    model.graph.initializer.append(tensor)
    hostile.refuse(hostile.saved(model, tmp_path), "tensor 'other' of", message)


def test_types_of_every_field_are_counted_right(tmp_path: Path) -> None:
    model = models.matmul()
    fields: list[dict[str, Any]] = [
        {"data_type": 1, "float_data": [1, 2, 3]},
        {"data_type": 14, "float_data": [1] * 6},
        {"data_type": 11, "double_data": [1] * 3},
        {"data_type": 15, "double_data": [1] * 6},
        {"data_type": 7, "int64_data": [1] * 3},
        {"data_type": 12, "uint64_data": [1] * 3},
        {"data_type": 13, "uint64_data": [1] * 3},
        {"data_type": 8, "string_data": [b"a"] * 3},
        {"data_type": 22, "int32_data": [1, 2]},
        *({"data_type": kind, "int32_data": [1] * 3} for kind in (2, 3, 4, 5, 6, 9, 10, 16, 17)),
    ]
    for number, values in enumerate(fields):
        model.graph.initializer.append(TensorProto(name=f"t{number}", dims=[3], **values))
    assert hostile.refused(hostile.saved(model, tmp_path)) is None


def _attribute(name: str, **values: Any) -> Damage:
    def damage(model: onnx.ModelProto) -> None:
        model.graph.node[0].attribute.add(name=name, **values)

    return damage


def _twice(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Relu", input=["x"], output=["y"])


def _overwritten(model: onnx.ModelProto) -> None:
    model.graph.node[0].output[0] = "x"


def _two_weights(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "z"
    model.graph.node.add(op_type="Relu", input=["y"], output=["z"])


def _sparse(model: onnx.ModelProto) -> None:
    model.graph.node[0].output[:] = []
    model.graph.node[0].attribute.add(name="s", type=11).sparse_tensor.SetInParent()


def _opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 1 << 31


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_twice, "is not a valid ONNX model: Output 'y' is redeclared"),
        (_overwritten, "'x'"),
        (_two_weights, "initializer 'w' of"),
        (_two_inputs, "value 'x' of"),
        (_cycle, "form a cycle"),
        (_sparse, "node 'MatMul' of"),
        (_opset, "has opset 2147483648, but the installed onnx knows none after"),
        (_attribute("g", type=5, ref_attr_name="g"), "node 'y' of"),
    ],
)
def test_broken_graphs(damage: Damage, message: str, tmp_path: Path) -> None:
    model = models.matmul()
    damage(model)
    hostile.refuse(hostile.saved(model, tmp_path), message)


NODES = "g (float[N,64] x, float[64,64] w) => (float[N,64] y) {{ {} }}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("t = Transpose<perm=1.0>(w) y = MatMul(x, t)", "attribute 'perm' of type FLOAT, but the operator takes INTS"),
        ("t = Cast(w) y = MatMul(x, t)", "(Cast) has no attribute 'to': export it again"),
        ("t = Cast<to=99>(w) y = MatMul(x, t)", "Cast "),
        ("t = Transpose<perm=[0,7]>(w) y = MatMul(x, t)", "cannot re-arrange a weight of shape [64, 64] (axis 7"),
        ("y = Conv<group=7>(x, w)", "cannot read the weight 'w' of shape [64, 64] in 7 groups"),
        ("y = Conv<group=0>(x, w)", "cannot read the weight 'w' of shape [64, 64] in 0 groups"),
        ("y, h = GRU(x, w, w)", "cannot read the weight 'w' of shape [64, 64]: export the model again"),
    ],
)
def test_broken_nodes(body: str, message: str, tmp_path: Path) -> None:
    hostile.refuse(hostile.saved(models.matmul(NODES.format(body)), tmp_path), message)


@pytest.mark.parametrize(
    "body",
    [
        "s = Constant<value_ints=[1099511627776]>() z = ConstantOfShape(s)",
        "s = Constant<value_ints=[65536,65536]>() o = Constant<value_float=1.0>() z = Expand(o, s)",
        "s = Constant<value_ints=[4294967296]>() o = Constant<value_floats=[1.0]>() z = Tile(o, s)",
        "s = Constant<value_ints=[0,2147483648]>() o = Constant<value_floats=[1.0]>() z = Pad(o, s)",
        "s = Constant<value_ints=[2147483648]>() o = Constant<value_floats=[1.0,2.0]>() z = Resize(o, , , s)",
        "a = Constant<value_int=0>() b = Constant<value_int=4294967296>() c = Constant<value_int=1>() "
        "r = Range(a, b, c) z = Cast<to=1>(r)",
    ],
)
def test_constants_that_grow_are_not_computed(body: str, tmp_path: Path) -> None:
    """The declared output is a number, so that what the file says of shapes is wrong."""
    text = f"g (float[N,64] x, float[64,64] w) => (float[N,64] y, float z) {{ y = MatMul(x, w) {body} }}"
    assert hostile.refused(hostile.saved(models.matmul(text), tmp_path)) is None


def _functions(count: int, body: str) -> onnx.ModelProto:
    domains = '"": 17, "f": 1'
    text = f"<ir_version: 8, opset_import: [{domains}]> g (float[N,64] x, float[64,64] w) => (float[N,64] y) "
    text += "{ z = MatMul(x, w) y = f.f0(z) }\n"
    for number in range(count):
        text += f'<opset_import: [{domains}], domain: "f"> f{number} (a) => (b) {{ {body.format(number + 1)} }}\n'
    text += f'<opset_import: [{domains}], domain: "f"> f{count} (a) => (b) {{ b = Relu(a) }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(models.random(64, 64), "w"))
    del model.graph.input[1]
    return model


def test_functions(tmp_path: Path) -> None:
    bomb = _functions(40, "c = f.f{0}(a) b = f.f{0}(c)")
    hostile.refuse(hostile.saved(bomb, tmp_path), "stand for 1099511627777 nodes once inlined, more than 1048576")
    hostile.refuse(hostile.saved(_functions(1, "b = f.f0(a)"), tmp_path), "cannot be inlined: Cyclic dependency")
    assert hostile.refused(hostile.saved(_functions(40, "b = f.f{0}(a)"), tmp_path)) is None
    stray = _functions(1, "b = f.f{0}(a)")
    stray.functions[0].node[0].input[0] = "nothing"
    hostile.refuse(hostile.saved(stray, tmp_path), "reads 'nothing', which nothing makes")


def _nested(depth: int) -> onnx.ModelProto:
    """If in If in If."""
    model = models.matmul(
        "g (bool c, float[N,64] x, float[64,64] w) => (float[N,64] y) { y = If(c) <then_branch = t () => "
        "(float[N,64] p) { p = MatMul(x, w) }, else_branch = e () => (float[N,64] q) { q = Identity(x) }> }"
    )
    for number in range(depth):
        inner, outer = model.graph.node[0], onnx.NodeProto(op_type="If", input=["c"], output=["y"])
        outer.attribute.append(next(item for item in inner.attribute if item.name == "else_branch"))
        body = outer.attribute.add(name="then_branch", type=5).g
        body.name = f"t{number}"
        body.node.add().CopyFrom(inner)
        body.node[0].output[0] = f"n{number}"
        body.output.add(name=f"n{number}").type.tensor_type.elem_type = 1
        inner.CopyFrom(outer)
    return model


def test_deep_nesting(tmp_path: Path) -> None:
    """Protobuf itself reads a hundred levels, three for each If."""
    loaded = load_model(_nested(20))
    assert len(find_targets(loaded.model)[0]) == 1
    deep = _length(10, b"")
    for number in range(2000):
        deep = _length(1 if number % 2 else 5, deep)
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08" + _length(7, deep))
    hostile.refuse(tmp_path / "m.onnx", "m.onnx is not")


def _length(field: int, content: bytes) -> bytes:
    """A protobuf field with bytes."""
    size, left = bytearray(), len(content)
    while left >= 128:
        size.append(left & 127 | 128)
        left >>= 7
    return bytes([field << 3 | 2]) + bytes(size) + bytes([left]) + content


def test_deep_protobuf_in_memory() -> None:
    model = models.matmul()
    graph = model.graph
    for _ in range(1500):
        graph = graph.node.add(op_type="If").attribute.add(name="g", type=5).g
    with pytest.raises(InputError, match="the model nests its subgraphs too deeply: export it again"):
        load_model(model)


def test_models_of_many_equal_names(tmp_path: Path) -> None:
    model = models.matmul()
    for number in range(4000):
        model.graph.node.add(op_type="Relu", name="n", input=["x"], output=[f"o{number}"])
        model.graph.output.add(name=f"o{number}").type.tensor_type.elem_type = 1
    assert hostile.refused(hostile.saved(model, tmp_path)) is None


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_models(share: float, tmp_path: Path) -> None:
    content = models.cnn().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content[: int(len(content) * share)])
    hostile.refuse(tmp_path / "m.onnx", "m.onnx", "export")


def test_no_regular_files(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.onnx"
    with sparse.open("wb") as file:
        file.write(b"\x08\x08")
        file.truncate(20 << 30)
    hostile.refuse(sparse, "has 21474836480 bytes, but an ONNX file has at most 2147483647: keep its weights apart")
    for suffix, told in (
        (".onnx", "is not a regular file: give an .onnx file"),
        (".json", "it is a device or a pipe; give a .json file"),
        (".yaml", "is no regular file"),
        (".npy", "is a device or a pipe; give .npz, .npy, .txt"),
        (".npz", "is a device or a pipe"),
        (".txt", "is a device or a pipe"),
        (".pb", "input_0.pb is no regular file; give ONNX tensors"),
    ):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        os.mkfifo(folder / f"input_0{suffix}")
        hostile.refuse(folder / f"input_0{suffix}", told)
        (folder / f"input_0{suffix}").unlink()
        (folder / f"input_0{suffix}").symlink_to("/dev/zero")
        hostile.refuse(folder / f"input_0{suffix}", told)


def test_unreadable_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hostile.saved(models.matmul(), tmp_path)

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbid)
    hostile.refuse(path, "m.onnx cannot be read: Permission denied; check who may read it")


def test_external_tensors_of_models_in_memory(tmp_path: Path) -> None:
    model = ir.load(external(tmp_path))
    (tmp_path / "w.bin").unlink()
    os.mkfifo(tmp_path / "w.bin")
    with pytest.raises(InputError, match=r"w\.bin', which is no regular file"):
        load_model(model)
