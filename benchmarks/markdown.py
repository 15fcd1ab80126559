"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that are empty in every row are left out; all but the first two are right-aligned."""
    keep = [index for index in range(len(header)) if index < 2 or any(row[index] for row in rows)]
    lines = [[header[index] for index in keep], ["---" if index < 2 else "---:" for index in keep]]
    lines += [[row[index].replace("|", "\\|") for index in keep] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
