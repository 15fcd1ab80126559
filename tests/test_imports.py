"""Importing quantkit, and showing its help, loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import quantkit

HEAVY = ("ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "scipy", "sklearn", "torch")


def loaded_by(code: str) -> set[str]:
    probe = f"import sys\n{code}\nsys.stderr.write(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import quantkit",
        "import quantkit; quantkit.Budget, quantkit.Options, quantkit.InputError, quantkit.Report",
        "import quantkit.cli; quantkit.cli.main(['--help'])",
        "import quantkit.cli; quantkit.cli.main(['compress', '--help'])",
        "import quantkit.cli; quantkit.cli.main(['--version'])",
    ],
)
def test_nothing_heavy(code: str) -> None:
    assert not loaded_by(code) & set(HEAVY)


def test_public_names() -> None:
    assert sorted(quantkit.__all__) == quantkit.__all__
    for name in quantkit.__all__:
        assert getattr(quantkit, name).__name__ == name
    assert set(dir(quantkit)) == {*quantkit.__all__, "__version__"}
    with pytest.raises(AttributeError, match="module 'quantkit' has no attribute 'Compress'; it has Budget, "):
        _ = quantkit.Compress  # type: ignore[attr-defined]


def test_torch_is_not_needed() -> None:
    code = "sys.modules['torch'] = None\nimport quantkit.pipeline, quantkit.demo, quantkit.verify"
    assert "onnxruntime" in loaded_by(code)
