"""Pages of the documentation that are made from the code, and so are never out of date.

mkdocs calls `on_files` while it builds the site; nothing is written into this folder.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
WIDTH = 100
KINDS = MappingProxyType(
    {
        "allocators": "`--allocator NAME`: which layer gets how many bits.",
        "quantizers": "`--quantizer NAME`: how the weights of one layer are rounded.",
        "transforms": "`--transform LIST`: rescale layers first, so that rounding costs less.",
        "emitters": "`form` in a plan: how a layer is written. Left at `auto`, measurement decides.",
        "tuners": "`quantkit tune --tuner NAME`: which configuration is tried next.",
    }
)
CODE = re.compile(r"(`[^`]*`)")
SPECIAL = re.compile(r"([\\*_\[\]#])")
ENTITIES = MappingProxyType({ord("<"): "&lt;", ord(">"): "&gt;", ord("|"): "&#124;"})
ARXIV = re.compile(r"(?<![\w/.])(\d{4}\.\d{5})(?!\d)")
ENTRY = re.compile(r"^ {4}(?P<names>[\w*]+(?:, [\w*]+)*): (?P<text>.*)$")
QUOTED = re.compile(r"""(: |-> )(['"])(.+?)\2(?=[,)= ]|$)""")
"""An annotation as text."""
SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:")


def methods_page() -> str:
    """Every method with its description, when to use it, and its settings."""
    from quantkit import methods

    advice = tomllib.loads((ROOT / "docs" / "advice.toml").read_text(encoding="utf-8"))
    parts = [
        "# Methods",
        "`quantkit methods NAME` shows the same on the command line. Settings are given with `--set`.",
    ]
    for kind in methods.KINDS:
        parts += [f"## {kind.capitalize()}", KINDS[kind]]
        for name in methods.find(kind):
            parts += [f"### {kind[:-1]} {name}", f"**When to use it:** {advice[kind][name]}"]
            parts += [prose(methods.describe(kind, name)), _settings(kind, name)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(kind: str, name: str) -> str:
    from quantkit import methods
    from quantkit.errors import InputError

    try:
        found = methods.settings_of(kind, name)
    except InputError as error:  # an extra is not installed
        return f"Settings: see `quantkit methods {name}` ({error})."
    rows = [[f"`{name}.{item.name}`", f"`{item.type}`", f"`{item.default}`"] for item in found]
    return table(["setting", "type", "default"], rows) if rows else ""


def cli_page() -> str:
    """`--help` of every command."""
    from quantkit.cli import VERBS, build_parser

    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Command line", _help(parser)]
    for name, module in VERBS:
        parts += [f"## quantkit {name}", f"{module.HELP[0].upper()}{module.HELP[1:]}.", _help(commands.choices[name])]
    return "\n\n".join(parts) + "\n"


def _help(parser: argparse.ArgumentParser) -> str:
    formatter: Any = parser.formatter_class
    parser.formatter_class = partial(formatter, width=WIDTH)
    return f"```text\n{parser.format_help().rstrip()}\n```"


def python_page() -> str:
    """The package's examples, then every public name."""
    import quantkit

    parts = ["# Python", examples(quantkit.__doc__ or "")]
    for name in quantkit.__all__:
        found = getattr(quantkit, name)
        parts += [f"## {name}", *_reference(name, found, "class" if inspect.isclass(found) else "def")]
        if inspect.isclass(found) and not issubclass(found, Exception):
            for key, value in vars(found).items():
                if not key.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod)):
                    parts += _reference(f"{name}.{key}", getattr(found, key), "def")
    return "\n\n".join(part for part in parts if part) + "\n"


def _reference(name: str, found: Any, kind: str) -> list[str]:
    """Signature and description."""
    text = inspect.getdoc(found) or ""
    own = vars(found).get("__init__") if inspect.isclass(found) else None
    if own is not None and own.__doc__:  # written by hand, not by a dataclass
        text += "\n\n" + inspect.getdoc(own).partition("\n\n")[2]
    return [f"```python\n{_signature(name, found, kind)}\n```", described(text)]


def _signature(name: str, found: Any, kind: str) -> str:
    if kind == "class" and (issubclass(found, Exception) or getattr(found, "_is_protocol", False)):
        return f"class {name}({found.__bases__[0].__name__})"
    items = QUOTED.sub(r"\1\3", str(inspect.signature(found)))
    inner, _, result = items.rpartition(")")
    arguments = [item for item in _split(inner[1:]) if item != "self"]
    result = "" if kind == "class" else result
    one = f"{kind} {name}({', '.join(arguments)}){result}"
    return one if len(one) <= WIDTH else f"{kind} {name}(\n    " + ",\n    ".join(arguments) + f",\n){result}"


def _split(arguments: str) -> Iterator[str]:
    """At the commas that no bracket or quote encloses."""
    depth, start = 0, 0
    for at, letter in enumerate(arguments):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            yield arguments[start:at].strip()
            start = at + 1
    yield arguments[start:].strip()


def examples(text: str) -> str:
    """Doctest text as Markdown: paragraphs, and fenced code with the prompts."""
    parts = []
    for block in text.strip().split("\n\n"):
        parts.append(f"```pycon\n{block}\n```" if block.startswith(">>>") else block)
    return "\n\n".join(parts)


def described(text: str) -> str:
    """A docstring as Markdown; entries of Args, Attributes and Raises become lists."""
    parts: list[str] = []
    for paragraph in text.split("\n\n"):
        head, _, rest = paragraph.partition("\n")
        if head.startswith(">>>"):
            parts.append(f"```pycon\n{paragraph}\n```")
            continue
        parts.append("\n".join([f"**{head}**", "", *_entries(rest)]) if head in SECTIONS else prose(paragraph))
    return "\n\n".join(parts)


def _entries(text: str) -> Iterator[str]:
    for line in text.splitlines():
        entry = ENTRY.match(line)
        yield f"- `{entry['names']}`: {inline(entry['text'])}" if entry else f"  {inline(line.strip())}"


def benchmarks_page() -> str:
    """Tables of all recorded results."""
    from benchmarks.harness import read_records
    from benchmarks.report import render

    files = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    records = [record for path in files if not path.name.startswith("recipes-") for record in read_records(path)]
    note = (
        "Every row is a line of `benchmarks/results/*.jsonl`, by `python -m benchmarks.NAME`; speed is float time "
        "over the file's time, both alternating in one process. Under each table stands what it was measured with."
    )
    return f"# Benchmarks\n\n{note}\n\n{render(records).replace('### ', '## ')}\n"


def schemas_page() -> str:
    """Every JSON schema, its keys explained; the file itself lies beside the page."""
    from quantkit.schemas import load_schema, schema_names

    parts = [
        "# JSON schemas",
        "JSON Schema, draft 2020-12. `quantkit schema NAME` prints one; they are in the package as "
        "`quantkit/schemas/NAME.schema.json`. Figures that JSON does not have (infinite, undefined) are null.",
    ]
    for name in schema_names():
        schema = load_schema(name)
        whole = schema if "properties" in schema else schema["items"]
        link = f"[{name}.schema.json](schemas/{name}.schema.json)"
        parts += [f"## {name}", f"{schema['title']}. {link}", schema.get("description", ""), _keys(whole)]
        for inner, part in schema.get("$defs", {}).items():
            parts += [f"### {name}: {inner}", part.get("description", ""), _keys(part)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _keys(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        [f"`{key}`" + ("" if key in required else " (optional)"), _type(part), inline(part.get("description", ""))]
        for key, part in schema["properties"].items()
    ]
    return table(["key", "type", ""], rows)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join("null" if value is None else f"`{value}`" for value in values)
    if "anyOf" in schema and "type" not in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    names = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", ["anything"])
    inner = schema.get("items") or next(iter(schema.get("prefixItems", [])), None)
    if "array" in names and isinstance(inner, dict):
        names = [f"list of {_type(inner)}" if name == "array" else name for name in names]
    return " or ".join(names)


def prose(text: str) -> str:
    """Plain text as Markdown: nothing but code in backquotes is special; arXiv numbers become links."""
    blocks = []
    for block in text.split("\n\n"):
        blocks.append(block if all(line.startswith("    ") for line in block.splitlines()) else inline(block))
    return "\n\n".join(blocks)


def inline(text: str) -> str:
    pieces = CODE.split(text)
    return "".join(piece if piece.startswith("`") else _plain(piece) for piece in pieces)


def _plain(text: str) -> str:
    escaped = SPECIAL.sub(r"\\\1", text).translate(ENTITIES)
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", escaped)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Cells are Markdown; a bar inside of code does not end a cell."""
    lines = [header, ["---"] * len(header), *([cell.replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PAGES: MappingProxyType[str, Callable[[], str]] = MappingProxyType(
    {
        "methods.md": methods_page,
        "cli.md": cli_page,
        "python.md": python_page,
        "schemas.md": schemas_page,
        "benchmarks.md": benchmarks_page,
    }
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs: adds the pages above, the schemas, and the sources of the examples."""
    from mkdocs.structure.files import File

    if str(ROOT) not in sys.path:  # `benchmarks` is not installed
        sys.path.insert(0, str(ROOT))
    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    for path in sorted((ROOT / "quantkit" / "schemas").glob("*.schema.json")):
        files.append(File.generated(config, f"schemas/{path.name}", abs_src_path=str(path)))
    for path in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    return files
