"""Where a model came from, as metadata: hashes of its origins and the versions that made it."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.candidate import Context

PACKAGES = ("quantkit", "onnx", "onnx-ir", "onnxruntime", "numpy")


def provenance_bytes(context: Context) -> int:
    """Bytes that the stamps add to a file: known before any of them is."""
    stamps = provenance(context, "", "0" * 64)
    # key and value each have a tag and a length, and so has the entry; entries stay below 128 bytes or near it
    return sum(len(key) + len(value) + 6 + (len(value) > 100) for key, value in stamps.items())


def provenance(context: Context, plan: str, calibration_digest: str) -> dict[str, str]:
    """metadata_props of the emitted model; nothing in it changes from one run to the next.

    Args:
        plan: its decisions as JSON.
    """
    stamps = {
        "model": context.loaded.digest,
        "calibration": calibration_digest,
        "plan": hashlib.sha256(plan.encode()).hexdigest(),
        "seed": str(context.options.seed),
        "target": context.options.target,
        "versions": versions(),
    }
    return {f"quantkit.{name}": value for name, value in stamps.items()}


def versions() -> str:
    """`quantkit=0.1 onnx=...`: what may change a result."""
    return " ".join(f"{name}={version(name)}" for name in PACKAGES)
