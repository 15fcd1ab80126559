"""The Python API: its examples run, it prints nothing, tells its progress, and its results can be pickled."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pickle
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest

import quantkit
from quantkit.errors import InputError
from tests.helpers import models

PACKAGE = Path(quantkit.__file__).parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.mark.parametrize(("name", "least"), [("quantkit", 15), ("quantkit.plandiff", 4), ("quantkit.schemas", 1)])
def test_examples(name: str, least: int) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried >= least and failed == 0


def test_every_public_function_is_annotated_and_described() -> None:
    for name in quantkit.__all__:
        found = getattr(quantkit, name)
        assert inspect.getdoc(found), name
        if inspect.isfunction(found):
            signature = inspect.signature(found)
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(item.annotation is not item.empty for item in signature.parameters.values()), name
            assert typing.get_type_hints(found, vars(inspect.getmodule(found)))["return"] is not object


def test_the_library_never_prints() -> None:
    """Outside of the command line, whose streams are its interface."""
    talkers = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        lines = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        if lines and path.parent.name != "commands" and path.name != "cli.py":
            talkers[str(path)] = lines
    assert talkers == {}


def test_nothing_is_written_to_the_streams(capfd: pytest.CaptureFixture[str]) -> None:
    quantkit.compress(models.cnn(), calibration=models.images(24), workers=1)
    assert capfd.readouterr() == ("", "")


def test_progress_is_told() -> None:
    class Steps:
        def __init__(self) -> None:
            self.done: dict[str, int] = {}

        @contextmanager
        def task(self, name: str, total: int | None = None) -> Iterator[typing.Callable[[int], None]]:
            def advance(count: int) -> None:
                self.done[name] = self.done.get(name, 0) + count

            self.done.setdefault(name, 0)
            yield advance

    steps = Steps()
    progress: quantkit.Progress = steps
    budget = quantkit.Budget(avg_bits=4)
    quantkit.compress(models.cnn(), calibration=models.images(24), budget=budget, progress=progress, workers=1)
    assert steps.done["calibrating"] > 0 and "verifying" in steps.done
    steps.done.clear()
    quantkit.sensitivity(models.cnn(), calibration=models.images(24), progress=progress, workers=1)
    assert steps.done["calibrating"] > 0


def test_results_can_be_pickled(tmp_path: Path) -> None:
    onnx.save(models.cnn(), tmp_path / "m.onnx")
    budget = quantkit.Budget(avg_bits=4)
    result = quantkit.compress(tmp_path / "m.onnx", calibration=models.images(24), budget=budget, workers=1)
    (tmp_path / "m.onnx").unlink()
    back = pickle.loads(pickle.dumps(result))
    assert (back.plan, back.report, back.allocation) == (result.plan, result.report, result.allocation)
    result.save(tmp_path / "a.onnx")
    back.save(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    lazy = quantkit.compress(models.matmul(), bits=(4,))  # weights that are made when they are read
    pickle.loads(pickle.dumps(lazy)).save(tmp_path / "c.onnx")
    lazy.save(tmp_path / "d.onnx")
    assert (tmp_path / "c.onnx").read_bytes() == (tmp_path / "d.onnx").read_bytes()
    found = quantkit.sensitivity(models.cnn(), calibration=models.images(24), workers=1)
    assert pickle.loads(pickle.dumps(found)) == found
    difference = quantkit.diff_plans(result.plan, quantkit.Plan({}, {}, {}))
    assert pickle.loads(pickle.dumps(difference)) == difference and not difference.same


def test_a_result_beyond_a_protobuf_is_not_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    result = quantkit.compress(models.matmul(), bits=(4,))
    monkeypatch.setattr("quantkit.result.PICKLED_LIMIT", 1000)
    with pytest.raises(InputError, match="of weights cannot be pickled: save it, and pass on its path"):
        pickle.dumps(result)


def test_sensitivity_is_a_function_whatever_was_imported_before() -> None:
    import quantkit.ranking

    assert quantkit.sensitivity is quantkit.ranking.sensitivity and callable(quantkit.sensitivity)
