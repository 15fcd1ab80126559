"""Where a model came from, as metadata: hashes of its origins and the versions that made it."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.candidate import Context

PACKAGES = ("quantkit", "onnx", "onnx-ir", "onnxruntime", "numpy")


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
        "versions": " ".join(f"{name}={version(name)}" for name in PACKAGES),
    }
    return {f"quantkit.{name}": value for name, value in stamps.items()}
