"""Mixed-precision quantization of ONNX models: `quantkit.compress(model, calibration=..., budget=...)`.

The names below are loaded on first use, so that `import quantkit` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.budget import Budget
    from quantkit.errors import InputError, VerificationError
    from quantkit.options import Options
    from quantkit.pipeline import Result, apply, compress
    from quantkit.plan import load_plan, save_plan
    from quantkit.report.types import Report
    from quantkit.runtime.session import InferenceSession
    from quantkit.tuning.tune import Tuned, TuneSettings, tune
    from quantkit.types import LayerPlan, Plan, QuantSpec

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "InferenceSession",
    "InputError",
    "LayerPlan",
    "Options",
    "Plan",
    "QuantSpec",
    "Report",
    "Result",
    "TuneSettings",
    "Tuned",
    "VerificationError",
    "apply",
    "compress",
    "load_plan",
    "save_plan",
    "tune",
]

_HOMES = (
    ("quantkit.budget", ("Budget",)),
    ("quantkit.errors", ("InputError", "VerificationError")),
    ("quantkit.options", ("Options",)),
    ("quantkit.pipeline", ("Result", "apply", "compress")),
    ("quantkit.plan", ("load_plan", "save_plan")),
    ("quantkit.report.types", ("Report",)),
    ("quantkit.runtime.session", ("InferenceSession",)),
    ("quantkit.tuning.tune", ("TuneSettings", "Tuned", "tune")),
    ("quantkit.types", ("LayerPlan", "Plan", "QuantSpec")),
)


def __getattr__(name: str) -> object:
    from importlib import import_module

    for module, names in _HOMES:
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
