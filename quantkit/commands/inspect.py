"""quantkit inspect: what can be quantized in a model, what cannot and why, and where a quantized one came from."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from quantkit.commands import _common

if TYPE_CHECKING:
    import onnx_ir as ir
    from rich.console import Console

HELP = "list what can be quantized in a model, and what cannot and why"
USAGE = "quantkit inspect MODEL [options]"
PROVENANCE = "quantkit."


def add(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the .onnx file")
    parser.add_argument(
        "--ignore", metavar="PATTERN", action="append", help="layers to leave out: a name or re:PATTERN"
    )
    parser.add_argument("--all-layers", action="store_true", help="show every layer of a large model")
    _common.add_output(parser)


def run(args: Namespace) -> int:
    from quantkit.graph.load import load_model
    from quantkit.graph.targets import find_targets

    path = _common.existing_file(args.model)
    loaded = load_model(path)
    targets, untouched = find_targets(loaded.model, tuple(args.ignore or ()))
    data = {
        "model": path,
        "size": loaded.size,
        "digest": loaded.digest,
        "opset": {domain or "ai.onnx": version for domain, version in loaded.model.opset_imports.items()},
        "inputs": [_value(value) for value in loaded.model.graph.inputs],
        "outputs": [_value(value) for value in loaded.model.graph.outputs],
        "targets": [
            {
                "name": target.name,
                "op": target.op,
                "shape": list(target.shape),
                "groups": target.groups,
                "parameters": target.shape[0] * target.shape[1],
                "bytes": _bytes(target.weight),
            }
            for target in targets.values()
        ],
        "untouched": [{"name": item.name, "op": item.op, "reason": item.reason} for item in untouched],
        "provenance": {key: value for key, value in loaded.model.metadata_props.items() if key.startswith(PROVENANCE)},
        "notes": list(loaded.notes),
    }
    _show(data, _common.console_of(args), all_rows=args.all_layers)
    if args.json:
        _common.print_json(data)
    return 0


def _value(value: ir.Value) -> dict[str, Any]:
    dims = None if value.shape is None else [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return {"name": value.name, "type": None if value.dtype is None else value.dtype.name, "shape": dims}


def _bytes(weight: ir.Value) -> int:
    return 0 if weight.const_value is None else int(weight.const_value.nbytes)


def _show(data: dict[str, Any], console: Console, *, all_rows: bool) -> None:
    from rich.text import Text

    from quantkit.report.console import LAYER_LIMIT, NAME_WIDTH, plain_table, print_untouched, short_bytes, shorten

    rows = data["targets"]
    table = plain_table("can be quantized", ("layer", "op"))
    for heading in ("N x K", "parameters", "bytes"):
        table.add_column(heading, justify="right", overflow="fold")
    shown = rows if all_rows else rows[:LAYER_LIMIT]
    for row in shown:
        shape = "x".join(map(str, row["shape"]))
        size = short_bytes(row["bytes"])
        table.add_row(Text(shorten(row["name"], NAME_WIDTH + 8)), row["op"], shape, f"{row['parameters']:,}", size)
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} more are not shown (--all-layers)")
    untouched = [(item["name"], item["op"], item["reason"]) for item in data["untouched"]]
    print_untouched(untouched, console, all_rows=all_rows)
    total = sum(row["bytes"] for row in rows)
    opsets = ", ".join(f"{domain} {version}" for domain, version in data["opset"].items())
    console.print(Text(f"size {short_bytes(data['size'])}, {short_bytes(total)} of it in these layers; opset {opsets}"))
    for kind in ("inputs", "outputs"):
        console.print(Text(f"{kind}: {', '.join(_signature(item) for item in data[kind])}"))
    for key, value in data["provenance"].items():
        console.print(Text(f"{key}: {value}"))
    for note in data["notes"]:
        console.print(Text(f"note: {note}"))


def _signature(item: dict[str, Any]) -> str:
    dims = "?" if item["shape"] is None else ", ".join("?" if dim is None else str(dim) for dim in item["shape"])
    return f"{item['name']} {item['type'] or '?'} [{dims}]"
