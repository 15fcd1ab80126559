"""Mixed-precision quantization of ONNX models.

>>> import numpy as np
>>> import onnx.parser
>>> import quantkit

A model: a file, an `onnx.ModelProto` or an `onnx_ir.Model`; here 64 inputs, a hidden layer, 10 scores.

>>> rng = np.random.default_rng(0)
>>> model = onnx.parser.parse_model('''<ir_version: 10, opset_import: ["": 21]>
...     net (float[N,64] x) => (float[N,10] scores) <float[64,96] w1, float[96,10] w2> {
...         [hidden] h = MatMul(x, w1)
...         r = Relu(h)
...         [last] scores = MatMul(r, w2)
...     }''')
>>> weights = {"w1": rng.standard_normal((64, 96)) / 8, "w2": rng.standard_normal((96, 10)) / 8}
>>> model.graph.initializer.extend(
...     onnx.numpy_helper.from_array(weight.astype(np.float32), name) for name, weight in weights.items()
... )

Calibration data: one array for each input, samples along the first axis; or batches, a file, a function.

>>> samples = {"x": rng.standard_normal((40, 64)).astype(np.float32)}

`compress` finds the best plan within a budget, and measures the file that it makes.

>>> budget = quantkit.Budget(avg_bits=4)
>>> result = quantkit.compress(model, calibration=samples, budget=budget, seed=0)
>>> result.report.average_bits <= 4, result.report.budget_met
(True, True)
>>> sorted(result.plan.layers)
['hidden', 'last']
>>> import tempfile, pathlib
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> result.save(folder / "small.onnx")

A plan is a value: change a decision, `apply` it, and see what is different.

>>> eight = quantkit.LayerPlan(quantkit.QuantSpec(bits=8, group_size=-1), form=None, reason="by hand")
>>> layers = {**result.plan.layers, "last": eight}
>>> edited = quantkit.Plan(layers, result.plan.activations, result.plan.settings)
>>> [row.name for row in quantkit.diff_plans(result.plan, edited).layers]
['last']
>>> again = quantkit.apply(model, edited, calibration=samples)
>>> again.plan.layers["last"].spec.bits
8

`sensitivity` tells which layer loses most at which width.

>>> found = quantkit.sensitivity(model, calibration=samples, bits=(2, 4, 8))
>>> [row.bits for row in found.rows]
[(2, 4, 8), (2, 4, 8)]
>>> loss = found.rows[0].losses["measured"]
>>> bool(loss[0] > loss[1] > loss[2])
True

`InferenceSession` runs any of the files: on a GPU that the kernels run on, else with onnxruntime on the CPU.

>>> session = quantkit.InferenceSession(folder / "small.onnx", device="cpu")
>>> scores, = session.run(None, {"x": samples["x"][:2]})
>>> scores.shape
(2, 10)

The names below are loaded on first use, so that `import quantkit` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.budget import Budget
    from quantkit.calibration.request import CalibrationRequest, EvaluationRequest
    from quantkit.errors import InputError, VerificationError
    from quantkit.options import Options
    from quantkit.pipeline import apply, compress
    from quantkit.plan import load_plan, save_plan
    from quantkit.plandiff import PlanDiff, diff_plans
    from quantkit.ranking import Sensitivity, sensitivity
    from quantkit.report.progress import Progress
    from quantkit.report.types import Report
    from quantkit.result import Result
    from quantkit.runtime.session import InferenceSession
    from quantkit.tuning.tune import Tuned, TuneSettings, tune
    from quantkit.types import LayerPlan, Plan, QuantSpec

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CalibrationRequest",
    "EvaluationRequest",
    "InferenceSession",
    "InputError",
    "LayerPlan",
    "Options",
    "Plan",
    "PlanDiff",
    "Progress",
    "QuantSpec",
    "Report",
    "Result",
    "Sensitivity",
    "TuneSettings",
    "Tuned",
    "VerificationError",
    "apply",
    "compress",
    "diff_plans",
    "load_plan",
    "save_plan",
    "sensitivity",
    "tune",
]

_HOMES = (
    ("quantkit.budget", ("Budget",)),
    ("quantkit.calibration.request", ("CalibrationRequest", "EvaluationRequest")),
    ("quantkit.errors", ("InputError", "VerificationError")),
    ("quantkit.options", ("Options",)),
    ("quantkit.pipeline", ("apply", "compress")),
    ("quantkit.result", ("Result",)),
    ("quantkit.plan", ("load_plan", "save_plan")),
    ("quantkit.plandiff", ("PlanDiff", "diff_plans")),
    ("quantkit.ranking", ("Sensitivity", "sensitivity")),
    ("quantkit.report.progress", ("Progress",)),
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
