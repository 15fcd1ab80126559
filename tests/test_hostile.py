"""Files made to do harm: each is refused with one sentence, within seconds and little memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper
from PIL import Image

from quantkit.calibration.data import InputSpec, open_calibration, random_calibration
from quantkit.calibration.images import read_image
from quantkit.calibration.preprocess import Preprocess, load_preprocess
from quantkit.cli import main
from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets
from quantkit.plan import load_plan
from tests.helpers import hostile, models

SECONDS = 20
MEMORY = 1 << 30
EXTENT = 1 << 40
HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }"
Damage = Callable[[onnx.ModelProto], None]


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A hang ends in an alarm, and a gigabyte more than now cannot be had."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"no answer within {SECONDS} s"))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refuse(path: Path, *parts: str) -> None:
    told = hostile.refused(path)
    assert told is not None and len(told) < 1000
    for part in parts:
        assert part in told, told


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def external(folder: Path, **entries: str) -> Path:
    """A model whose weight lies in w.bin, unless the entries say otherwise."""
    model = models.matmul()
    tensor = model.graph.initializer[0]
    (folder / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return saved(model, folder)


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
    refuse(external(tmp_path, **entries), "tensor 'w' of", message)


def test_external_names_that_are_no_text(tmp_path: Path) -> None:
    path = external(tmp_path, location="QQQQ")
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"\xff\xfe\xfd\xfc"))
    refuse(path, r"has its data in b'\xff\xfe\xfd\xfc', which is not UTF-8 text")


def test_nothing_is_said_on_the_side(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Not of entries that nobody knows, nor of arithmetic with weights that are no numbers."""
    assert hostile.refused(external(tmp_path, unknown="1")) is None
    model = models.build(
        "g (float[1,64,8,8] x, float[64,64,1,1] w, float[64] v) => (float[1,64,8,8] y) "
        "{ z = Conv(x, w) y = BatchNormalization(z, v, v, v, v) }",
        {"w": models.random(64, 64).reshape(64, 64, 1, 1), "v": np.full(64, -1e38, np.float32)},
    )
    refuse(saved(model, tmp_path), "holds NaN or infinity")
    assert not recwarn.list


def test_tensors_that_overlap(tmp_path: Path) -> None:
    """A small file of a thousand gigabytes of weights."""
    path = external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    for number in range(40):
        copied = model.graph.initializer.add()
        copied.CopyFrom(model.graph.initializer[0])
        copied.name = f"w{number}"
    refuse(saved(model, tmp_path), "overlap in", "they read 671744 bytes of a file of 16384: export it again")


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
    refuse(saved(model, tmp_path), "tensor 'other' of", message)


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
    assert hostile.refused(saved(model, tmp_path)) is None


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
    refuse(saved(model, tmp_path), message)


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
    refuse(saved(models.matmul(NODES.format(body)), tmp_path), message)


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
    assert hostile.refused(saved(models.matmul(text), tmp_path)) is None


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
    refuse(saved(bomb, tmp_path), "stand for 1099511627777 nodes once inlined, more than 1048576")
    refuse(saved(_functions(1, "b = f.f0(a)"), tmp_path), "cannot be inlined: Cyclic dependency")
    assert hostile.refused(saved(_functions(40, "b = f.f{0}(a)"), tmp_path)) is None
    stray = _functions(1, "b = f.f{0}(a)")
    stray.functions[0].node[0].input[0] = "nothing"
    refuse(saved(stray, tmp_path), "reads 'nothing', which nothing makes")


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
    refuse(tmp_path / "m.onnx", "m.onnx is not")


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
    assert hostile.refused(saved(model, tmp_path)) is None


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_models(share: float, tmp_path: Path) -> None:
    content = models.cnn().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content[: int(len(content) * share)])
    refuse(tmp_path / "m.onnx", "m.onnx", "export")


def test_no_regular_files(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.onnx"
    with sparse.open("wb") as file:
        file.write(b"\x08\x08")
        file.truncate(20 << 30)
    refuse(sparse, "has 21474836480 bytes, but an ONNX file has at most 2147483647: keep its weights apart")
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
        refuse(folder / f"input_0{suffix}", told)
        (folder / f"input_0{suffix}").unlink()
        (folder / f"input_0{suffix}").symlink_to("/dev/zero")
        refuse(folder / f"input_0{suffix}", told)


def test_unreadable_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(models.matmul(), tmp_path)

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbid)
    refuse(path, "m.onnx cannot be read: Permission denied; check who may read it")


def test_external_tensors_of_models_in_memory(tmp_path: Path) -> None:
    model = ir.load(external(tmp_path))
    (tmp_path / "w.bin").unlink()
    os.mkfifo(tmp_path / "w.bin")
    with pytest.raises(InputError, match=r"w\.bin', which is no regular file"):
        load_model(model)


# Plans

RULE = '{"version": 1, "layers": [{"match": "a", %s}]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 1, "layers": [], "plan": 1}', "unknown key 'plan'; known keys: version"),
        (json.dumps({f"k{number}": 1 for number in range(50_000)}), "and 49995 more; known keys: version"),
        ('{"version": 1, "layers": {}}', '"layers" must be a list of rules, got an object'),
        (RULE % '"bits": NaN', "NaN is not a JSON number"),
        (RULE % '"bits": -Infinity', "-Infinity is not a JSON number"),
        (RULE % '"bits": 1e999', "'1e999' is larger than any number that a plan can hold"),
        (RULE % '"bits": 4, "bits": 8', "'bits' given twice in one object; keep one"),
        (RULE % f'"bits": {"9" * 4000}', "layers[0]: bits must be a whole number of fewer digits, got 999"),
        (RULE % f'"bits": "{"b" * 100_000}"', "layers[0]: bits must be a whole number, got 'bbb"),
        (RULE % '"bits": 8, "group_bits": "8x999999999"', "group_bits names 999999999 groups"),
        ("[" * 100_000, "its lists are too deep for Python's recursion"),
        ('{"a":' * 100_000, "its lists are too deep for Python's recursion"),
        ("1" * 5000, "Exceeds the limit (4300 digits)"),
        (f'{{"version": {"1" * 4000}}}', "... is not supported, only 1; make the plan again"),
        ("\0", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_plans(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    refuse(tmp_path / "p.json", "p.json", message)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a+)+$", "repeats a group, or more than 6 times, and could search for ever"),
        ("(a|a)*", "repeats a group"),
        ("a*" * 7, "repeats a group, or more than 6 times"),
        ("(" * 2000, "has 2003 characters, the most are 1000"),
        ("a{99999999999999999999}", "is not a valid regular expression: the repetition number is too large"),
        ("[", "is not a valid regular expression"),
    ],
)
def test_patterns(pattern: str, message: str, tmp_path: Path) -> None:
    rule = {"match": f"re:{pattern}", "bits": 4}
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "layers": [rule]}))
    refuse(tmp_path / "p.json", "layers[0]", message)


def test_patterns_that_people_write(tmp_path: Path) -> None:
    patterns = [r"re:/layers\.[0-9]+/(attention|mlp)?.*[+*(]*\(\)+", "re:.*", r"re:(a|b)\*", "re:()[)*]+"]
    rules = [{"match": pattern, "bits": 4} for pattern in patterns]
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "layers": rules}))
    assert list(load_plan(tmp_path / "p.json").layers) == patterns


def test_large_plans(tmp_path: Path) -> None:
    rules = [{"match": f"m{number}", "bits": 8, "group_bits": "8x6000000"} for number in range(3)]
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "layers": rules}))
    refuse(tmp_path / "p.json", "layers[2]: group_bits names 6000000 groups; no layer has more than 4777216 after")
    settings = {f"k{number}": number for number in range(60_000)}
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "layers": [], "settings": settings}))
    assert len(load_plan(tmp_path / "p.json").settings) == 60_000
    with (tmp_path / "p.json").open("wb") as file:
        file.truncate(20 << 30)
    refuse(tmp_path / "p.json", "is not a plan: it has 21474836480 bytes, a plan has at most 67108864")
    refuse(tmp_path / "p\0.json", "cannot read the plan", "embedded null byte")
    (tmp_path / "q.json").mkdir()
    refuse(tmp_path / "q.json", "it is a folder; give a .json file")


# Arrays


def npy(header: str, version: int = 1, size: int | None = None) -> bytes:
    content = header.encode()
    length = struct.pack("<H" if version == 1 else "<I", len(content) if size is None else size)
    return b"\x93NUMPY" + bytes([version, 0]) + length + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(HEADER % ("<f4", f"({EXTENT}, 4)")), "its header promises float32 [1099511627776, 4], more than the"),
        (npy(HEADER % ("<f4", f"({'9' * 4000}, 4)")), "its header promises"),
        (npy(HEADER % ("<f4", "(-1, 4)")), "there is no array of shape (-1, 4) and type"),
        (npy(HEADER % ("<f4", "(True, 4)")), "there is no array of shape (True, 4)"),
        (npy(HEADER % ("<U0", f"({EXTENT}, 4)")), "and type '<U0'"),
        (npy(HEADER % ("|O", "(4, 4)")) + b"x" * 100, "holds Python objects, not numbers"),
        (npy("(" * 5000), "is no readable .npy file (truncated or corrupt)"),
        (npy("{'shape': (4L, "), "is no readable .npy file (truncated or corrupt)"),
        (npy(HEADER % ("<f4", "(4, 4)"), 2, (1 << 32) - 1), "is no readable .npy file (truncated or corrupt)"),
        (npy(HEADER % ("<f4", "(4, 4)"))[:20], "is no readable .npy file (truncated or corrupt)"),
        (b"", "is no readable .npy file (truncated or corrupt)"),
    ],
)
def test_npy(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    refuse(tmp_path / "a.npy", "a.npy", message[:60])


def test_arrays_without_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy(HEADER % ("<f4", f"({EXTENT}, 0)")))
    with pytest.raises(InputError, match=r"input 'x' has the shape \[1099511627776, 0\], without a number"):
        open_calibration(tmp_path / "a.npy", [InputSpec("x", np.dtype(np.float32), ("n", None))])


def test_arrays_of_endless_samples(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(npy(HEADER % ("|i1", f"({1 << 33}, 1)")))
        file.truncate((1 << 33) + 100)
    inputs = [InputSpec("x", np.dtype(np.int8), ("n", 1))]
    # Mapped, so that it takes the address space of 8 GiB but no memory.
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with pytest.raises(InputError, match="holds 8589934592 samples, more than 16777216; take a part with @START"):
        open_calibration(tmp_path / "a.npy", inputs)
    assert open_calibration(f"{tmp_path}/a.npy@:16", inputs).samples == 16


def test_packed_archives(tmp_path: Path) -> None:
    """Two megabytes of zeros, packed, that claim to be more."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(HEADER % ("<f4", f"({EXTENT}, 4)")) + bytes(1 << 21))
    refuse(path, "array 'x.npy' needs 17592186044", "bytes and holds 20972")
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 24  # of the directory: the size once unpacked
    content[at : at + 4] = struct.pack("<I", (1 << 31) - 1)
    path.write_bytes(content)
    refuse(path, "holds 2147483647 bytes of compressed arrays, more than 1073741824; save it with numpy.savez")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(HEADER % ("<f4", "(4, 4)"), 2, (1 << 32) - 1) + b" " * (1 << 24))
    refuse(path, "is no readable .npz file (truncated or corrupt): ")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy(HEADER % ("|O", "(1,)")) + b"cos\nsystem\n(S'touch harm'\ntR.")
    refuse(path, "holds Python objects, not numbers")


def test_tensors_in_files(tmp_path: Path) -> None:
    path = tmp_path / "input_0.pb"
    path.write_bytes(TensorProto(name="x", data_type=1, dims=[-1, 4], float_data=[1] * 8).SerializeToString())
    refuse(path, "holds a tensor of shape [-1, 4]; save it again")
    path.write_bytes(TensorProto(name="x", data_type=1, dims=[EXTENT, 4]).SerializeToString())
    refuse(path, "is no readable ONNX tensor (truncated or corrupt)")
    with path.open("wb") as file:
        file.truncate(20 << 30)
    refuse(path, "has 21474836480 bytes, more than a tensor's 2147483647; save it as .npz")


@pytest.mark.parametrize("dim", [EXTENT, -5])
def test_made_up_inputs(dim: int) -> None:
    with pytest.raises(InputError, match=rf"a sample of \[{dim}\] cannot be made up, the most are 268435456 numbers"):
        next(iter(random_calibration([InputSpec("x", np.dtype(np.float32), ("n", dim))])))


def test_text_without_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n" + b"x" * (3 << 20))
    ids = [InputSpec("input_ids", np.dtype(np.int64), ("n", "length"))]
    with pytest.raises(InputError, match=r"a\.txt, line 2 is longer than 1048576 bytes; give one sentence per line"):
        open_calibration(tmp_path / "a.txt", ids, tokenizer="byte")


# Images and how they are prepared


def test_image_bombs(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"bomb\.png is too large to be a calibration image"):
        read_image(tmp_path / "bomb.png")


def test_other_decoders_open_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=r"a\.png is no readable image"):
        read_image(tmp_path / "a.png")


def test_images_that_grow() -> None:
    narrow = np.zeros((20_000, 1, 3), np.uint8)
    with pytest.raises(InputError, match=r"makes 4480000x224 pixels of an image of 20000x1, more than 67108864"):
        Preprocess(size=(224, 224)).apply(narrow)
    with pytest.raises(
        InputError, match=r"an image of 5000x5000 pixels has more than 16777216; give a preprocess file"
    ):
        Preprocess().apply(np.zeros((5000, 5000, 3), np.uint8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean: &a [1, 2]\nstd: [*a]", "it has aliases (*name), and few can stand for endless lists; write them out"),
        ("mean: " + "[" * 5000, "it has more than 1000 marks and words"),
        ("mean: " + "[" * 400, "cannot be read: "),
        ("mean: !!bool foo", "a value is not of the kind that its tag says"),
        ("mean: !!timestamp foo", "a value is not of the kind that its tag says"),
        ('mean: !!int ""', "a value is not of the kind that its tag says"),
        ("mean: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        (f"mean: {'1' * 400}", "mean must be a number or a list of numbers, got 111"),
        ("base: [1]", "unknown base [1]; presets: imagenet"),
        ("size: [1000000000, 1000000000]", "size must have at most 16777216 pixels"),
        (f"channels: {'b' * 50_000}", "channels must be one of rgb, bgr, gray, got 'bbb"),
        ("x" * 70_000, "has 70000 bytes, more than a preprocess file's 65536"),
    ],
)
def test_preprocess_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    refuse(tmp_path / "p.yaml", "p.yaml", message)


def test_deep_json_preprocess(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("[" * 50_000)
    with pytest.raises(InputError, match="cannot be read: its lists are nested too deeply"):
        load_preprocess(tmp_path / "p.json")


# The command


@pytest.mark.parametrize("name", ["m.onnx", "p.json", "a.npz"])
def test_the_command_refuses_pipes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if name != "m.onnx":
        saved(models.matmul(), tmp_path)
    os.mkfifo(name)
    extra = {"p.json": ["--plan", name], "a.npz": ["--calib", name]}.get(name, [])
    before = sorted(tmp_path.iterdir())
    assert main(["compress", "m.onnx", "-o", "out.onnx", *extra]) == 2
    told = capfd.readouterr()
    assert told.out == "" and told.err.startswith("quantkit: error: ") and told.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before and "internal" not in told.err
