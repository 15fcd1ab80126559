"""Which input shapes run from a captured graph; the capturing itself needs a GPU."""

from __future__ import annotations

import torch

from quantkit.runtime.executor import Executor
from quantkit.runtime.executor._graphs import GraphCache, Run, Tensors
from tests.helpers.models import build


class Counted:
    """x -> 2 x, step by step or captured, with a list of what was done."""

    def __init__(self, refuses: int = -1) -> None:
        self.refuses = refuses
        self.calls: list[str] = []

    def run(self, feeds: Tensors) -> dict[str, torch.Tensor]:
        self.calls.append(f"run {len(feeds['x'])}")
        return {"y": 2 * feeds["x"]}

    def capture(self, feeds: Tensors) -> Run | None:
        size = len(feeds["x"])
        self.calls.append(f"capture {size}")
        if size == self.refuses:
            return None

        def replay(given: Tensors) -> dict[str, torch.Tensor]:
            self.calls.append(f"replay {size}")
            return {"y": 2 * given["x"]}

        return replay


def use(cache: GraphCache, *sizes: int, dtype: torch.dtype = torch.float32) -> None:
    for size in sizes:
        x = torch.arange(size).to(dtype)
        assert torch.equal(cache({"x": x})["y"], 2 * x)


def test_shapes_are_captured_when_they_come_again() -> None:
    counted = Counted()
    cache = GraphCache(counted.run, counted.capture, 4)
    use(cache, 3, 5, 3, 3)
    assert counted.calls == ["run 3", "run 5", "capture 3", "replay 3", "replay 3"]
    assert cache.counts() == {"captured": 1, "seen": 1, "refused": 0}
    use(cache, 3, dtype=torch.float16)  # another graph
    assert counted.calls[-1] == "run 3"


def test_the_least_recently_used_shape_is_forgotten() -> None:
    counted = Counted()
    cache = GraphCache(counted.run, counted.capture, 2)
    use(cache, 1, 1, 2, 2, 1, 3)
    counted.calls.clear()
    use(cache, 1, 2)
    assert counted.calls == ["replay 1", "run 2"]
    assert cache.counts() == {"captured": 1, "seen": 1, "refused": 0}


def test_what_cannot_be_captured_is_not_tried_again() -> None:
    counted = Counted(refuses=2)
    cache = GraphCache(counted.run, counted.capture, 2)
    use(cache, 2, 2, 2)
    assert counted.calls == ["run 2", "capture 2", "run 2", "run 2"]
    assert cache.counts() == {"captured": 0, "seen": 0, "refused": 1}


def test_no_graphs() -> None:
    counted = Counted()
    use(GraphCache(counted.run, counted.capture, 0), 1, 1, 1)
    assert counted.calls == ["run 1"] * 3


def test_small_host_tensors_are_held() -> None:
    """A captured graph reads the copies that were made of shapes: whoever keeps the graph keeps them."""
    model = build("g (float[N,2] x) => (float[N,2] y) { s = Shape(x) c = Cast<to=1>(s) y = Mul(x, c) }", {})
    executor = Executor(model, torch.device("meta"), torch.float32)
    assert executor.held() == ()
    executor.run(executor.placed({"x": torch.zeros(3, 2)}))
    (held,) = executor.held()
    assert (held.device.type, held.shape) == ("meta", (2,))
