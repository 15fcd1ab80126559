"""Damage to files, seeded: single bytes, fields of a protobuf, values of a JSON text. Used by the fuzzers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, EncodeError, Message

from quantkit.calibration.data import InputSpec, open_calibration
from quantkit.calibration.preprocess import load_preprocess
from quantkit.errors import InputError
from quantkit.graph.load import load_model
from quantkit.graph.targets import find_targets, load_operand
from quantkit.plan import load_plan

CORPUS = Path(__file__).parents[1] / "corpus"
LARGEST = 1 << 16
"""Bytes of the largest mutant."""
INPUTS = (InputSpec("x", np.dtype(np.float32), ("n", 4)),)
BATCHES = 3
INTEGERS = (0, 1, -1, 2, 3, 7, 8, 13, 16, 127, 255, 256, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1)
NEGATIVE = (-2, -8, -(1 << 31), -(1 << 63))
NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, 1e300, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "x", "y", "w", "\0", "ü", "../x", "axis", "perm", "value", "ai.onnx", "com.microsoft", "Loop", "Identity")
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 4, 8, 9, 255, 256, 1 << 70, -(1 << 70), 0.5, -0.0, 1e308, "", "x", "re:", "re:("),
    *("op:Conv", "4x3 8", "8x999999999", "\ud800", [], {}, [[]], [4, 3], {"scale": 1}, float("inf"), float("nan")),
)
JSON_TEXTS = ("1e999", "-1e999", "NaN", "Infinity", "1" * 5000, "[" * 3000, '{"a":' * 3000, '"\\ud800"', "\ufeff")


def run_file(path: Path) -> None:
    """What the command does with a file before it starts to work; only InputError may come out."""
    if path.suffix == ".onnx":
        loaded = load_model(path)
        for target in find_targets(loaded.model)[0].values():
            load_operand(target)
    elif path.suffix == ".json":
        load_plan(path)
    elif path.suffix == ".yaml":
        load_preprocess(path)
    else:
        data = open_calibration(path.parent if path.suffix == ".pb" else path, INPUTS)
        for _ in zip(range(BATCHES), data, strict=False):
            pass


def refused(path: Path) -> str | None:
    """The sentence with which the file is refused, None when it is taken."""
    try:
        run_file(path)
    except InputError as error:
        return str(error)
    return None


def mutate(kind: str, content: bytes, seed: int) -> bytes:
    """A damaged copy: sometimes bytes, mostly what the format says; the same one for the same seed."""
    rng = random.Random(seed)
    damage = STRUCTURED.get(kind)
    if damage is None or rng.random() < 0.3:
        return _bytes(content, rng)[:LARGEST]
    return damage(content, rng)[:LARGEST]


def _bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four of: cut off, bit flipped, byte set, part doubled, part removed."""
    data = bytearray(content or b"\0")
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64))
        action = rng.randrange(5)
        if action == 0:
            del data[at:]
        elif action == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif action == 2 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif action == 3:
            data[at:at] = data[at : at + length]
        else:
            del data[at : at + length]
        data = data or bytearray(b"\0")
    return bytes(data)


def _protobuf(kind: type[Message]) -> Callable[[bytes, random.Random], bytes]:
    def damage(content: bytes, rng: random.Random) -> bytes:
        message = kind()
        try:
            message.ParseFromString(content)
            for _ in range(rng.randint(1, 3)):
                _edit(rng.choice(_messages(message)), rng, message)
            return message.SerializeToString()
        except (DecodeError, EncodeError, ValueError):
            return _bytes(content, rng)

    return damage


def _messages(message: Message) -> list[Message]:
    """The message and all that it holds."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in value if _repeated(field) else [value]:
                found += _messages(item)
    return found


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated)


def _edit(message: Message, rng: random.Random, whole: Message) -> None:
    """Change one field: one that is set, or any that the message could have."""
    present = [field for field, _ in message.ListFields()]
    field = rng.choice(present if present and rng.random() < 0.8 else list(message.DESCRIPTOR.fields))
    if not _repeated(field):
        if rng.random() < 0.15:
            message.ClearField(field.name)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            donor = _donor(whole, field.message_type.name, rng)
            getattr(message, field.name).CopyFrom(donor) if donor else getattr(message, field.name).SetInParent()
        else:
            setattr(message, field.name, _scalar(field, rng, whole))
        return
    items = getattr(message, field.name)
    action, place = rng.randrange(4), rng.randrange(len(items)) if items else 0
    if items and action == 0:
        del items[place]
    elif items and action == 1:
        kept = list(items)
        rng.shuffle(kept)
        copies = [_copy(item) if isinstance(item, Message) else item for item in kept]
        del items[:]
        items.extend(copies)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        donor = _donor(whole, field.message_type.name, rng)
        items.add().CopyFrom(donor) if donor else items.add()
    elif items and action == 2:
        items[place] = _scalar(field, rng, whole)
    else:
        items.append(_scalar(field, rng, whole))


def _donor(whole: Message, name: str, rng: random.Random) -> Message | None:
    """A copy of some other message of this type."""
    found = [item for item in _messages(whole) if item.DESCRIPTOR.name == name]
    if not found:
        return None
    return _copy(rng.choice(found))


def _copy(message: Message) -> Message:
    return type(message).FromString(message.SerializeToString())


def _scalar(field: Any, rng: random.Random, whole: Message) -> Any:
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice(list(field.enum_type.values)).number
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return rng.choice(NUMBERS)
    if field.type == FieldDescriptor.TYPE_STRING:
        names = [item.op_type for item in _messages(whole) if isinstance(item, onnx.NodeProto)]
        names += [name for item in _messages(whole) if isinstance(item, onnx.NodeProto) for name in item.input]
        names += [name for item in _messages(whole) if isinstance(item, onnx.NodeProto) for name in item.output]
        return rng.choice((*TEXTS, *names, *names))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice((b"", b"\0", b"\xff" * 4, rng.randbytes(rng.choice((1, 4, 8, 64, 1024)))))
    narrow = field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_SINT32)
    unsigned = field.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64)
    numbers = [*INTEGERS, *(() if unsigned else NEGATIVE)]
    return rng.choice([number for number in numbers if not narrow or -(1 << 31) <= number < 1 << 31])


def _json(content: bytes, rng: random.Random) -> bytes:
    """A value replaced, removed, or given twice; now and then text that no encoder writes."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(content, rng)
    for _ in range(rng.randint(1, 2)):
        holders = _holders(data)
        if not holders:
            break
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if rng.random() < 0.15:
            del holder[key]
        else:
            holder[key] = deepcopy(rng.choice(JSON_VALUES))
    text = json.dumps(data)
    if rng.random() < 0.3:
        at = rng.choice([place for place, letter in enumerate(text) if letter in ":[,"] or [0])
        text = text[: at + 1] + rng.choice(JSON_TEXTS) + text[at + 1 :]
    if rng.random() < 0.1:
        text = text.replace("{", '{"version": 1, ', 2)
    return text.encode("utf-8", "surrogatepass")


def _holders(data: Any) -> list[Any]:
    """Every object and list that holds something."""
    items = list(data.values()) if isinstance(data, dict) else data if isinstance(data, list) else []
    return ([data] if items else []) + [holder for item in items for holder in _holders(item)]


def _npy(content: bytes, rng: random.Random) -> bytes:
    """An .npy file with another header."""
    dims = ", ".join(str(rng.choice((*INTEGERS, *NEGATIVE, 4))) for _ in range(rng.randint(0, 3)))
    shape = rng.choice((f"({dims},)", f"({dims})", "()", "(4, 4)", "(True, 4)", "[4, 4]", "(" * 300, "4L"))
    kinds = ("<f4", "<f8", "|u1", "|O", "<U8", "|S0", "|V0", "<M8[ns]", ">f4", "<c8", "|b1", "<f99", "f4,f4")
    order = rng.choice(("True", "False", "None"))
    header = f"{{'descr': '{rng.choice(kinds)}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    version = rng.choice(((1, 0), (1, 0), (1, 0), (2, 0), (3, 0), (0, 9)))
    size = rng.choice((len(header), len(header), len(header), 0, 65535, len(header) - 1))
    packed = b"\x93NUMPY" + bytes(version) + size.to_bytes(2 if version[0] == 1 else 4, "little") + header
    return packed + content[128:]


STRUCTURED: Mapping[str, Callable[[bytes, random.Random], bytes]] = {
    ".onnx": _protobuf(onnx.ModelProto),
    ".pb": _protobuf(onnx.TensorProto),
    ".json": _json,
    ".npy": _npy,
}


def refuse(path: Path, *parts: str) -> None:
    told = refused(path)
    assert told is not None and len(told) < 1000
    for part in parts:
        assert part in told, told


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"
