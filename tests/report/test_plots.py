"""Pictures: right kind of file, the same bytes each time, one sentence for a wrong name."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.errors import InputError
from quantkit.ranking import EstimatorRow, Sensitivity, UnitRow
from quantkit.report.plots import new_figure, plot_curves, plot_sensitivity, write_figure


def found() -> Sensitivity:
    rows = tuple(
        UnitRow((f"layer{place}",), "MatMul", 100, (2, 4), {"measured": (0.1 * (place + 1), 0.0)}) for place in range(5)
    )
    return Sensitivity("m", 8, rows, (EstimatorRow("measured", "nats", True, None, None, None, ()),))


def test_pictures_are_repeatable(tmp_path: Path) -> None:
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        paths = [tmp_path / f"{number}{suffix}" for number in range(2)]
        for path in paths:
            plot_sensitivity(found(), 2, path)
        assert paths[0].read_bytes().startswith(start)
        if suffix == ".png":
            assert paths[0].read_bytes() == paths[1].read_bytes()


def test_curves(tmp_path: Path) -> None:
    curves = {"uniform": [(4.0, 0.1), (3.0, 0.2)], "auto": [(3.0, 0.1), (4.0, 0.05)]}
    plot_curves(curves, x="bits", y="nats", title="t", path=tmp_path / "c.png")
    plot_curves(curves, x="bits", y="nats", title="t", path=tmp_path / "d.png", log=False)
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "d.png").read_bytes()


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a picture must end in \.png or \.svg, got .*out\.jpg"):
        write_figure(new_figure(1, 1), tmp_path / "out.jpg")
