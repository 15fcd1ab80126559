"""An executor behind the face of a session: checked inputs, numpy or tensors in and out, CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from quantkit.errors import InputError
from quantkit.runtime.executor._graphs import CudaCapture, GraphCache
from quantkit.runtime.executor.executor import Executor
from quantkit.runtime.torch_backend._dtypes import FLOATS, Carriers, to_numpy, to_torch_tensor
from quantkit.types import Array


class Runner:
    """Runs one batch at a time, from any thread.

    Attributes:
        executor: the model.
        graphs: its CUDA graphs; None on other devices.
    """

    def __init__(self, executor: Executor, graphs: int) -> None:
        """Nothing runs yet.

        Args:
            executor: the model on its device.
            graphs: most input shapes with a CUDA graph.
        """
        self.executor = executor
        self.graphs: GraphCache | None = None
        if executor.device.type == "cuda":
            with torch.cuda.device(executor.device):
                capture = CudaCapture(executor.run, executor.held, executor.device)
                self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.graphs = GraphCache(executor.run, capture, graphs)
        self._lock = threading.Lock()
        self._kinds = {str(value.name): value for value in executor.inputs}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """numpy in, numpy out.

        Raises:
            InputError: an input is missing or unknown, or has another type or shape than the model asks for.
        """
        tensors = {}
        for name, array in feeds.items():
            kind = self._kinds[name].dtype if name in self._kinds else None
            values = np.asarray(array)
            if kind is not None and values.dtype != kind.numpy():
                raise InputError(f"the input {name!r} has the type {values.dtype}, the model wants {kind.numpy()}")
            tensors[name] = to_torch_tensor(values, ir.DataType.from_numpy(values.dtype) if kind is None else kind)
        found = self.run_tensors(tensors)
        kinds = {str(value.name): value.dtype for value in self.executor.outputs}
        return {name: _array(value, kinds[name]) for name, value in found.items()}

    def run_tensors(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Tensors in, tensors on the device out; those on the device already are not copied through the host.

        Raises:
            InputError: as `run`; floats of any width are taken for floats.
        """
        self._check(feeds)
        if self.executor.device.type != "cuda":
            return dict(self.executor.run(self.executor.placed(feeds)))
        with self._lock, torch.cuda.device(self.executor.device), torch.no_grad():
            assert self.graphs is not None
            # Graphs and kernels keep what they work with in places of their own: runs on two streams take turns.
            torch.cuda.current_stream().wait_event(self._done)
            found = dict(self.graphs(self.executor.placed(feeds)))
            self._done.record()
            return found

    def _check(self, feeds: Mapping[str, torch.Tensor]) -> None:
        for name, value in self._kinds.items():
            if name not in feeds:
                raise InputError(f"the input {name!r} is missing; the model reads {', '.join(self._kinds)}")
            tensor = feeds[name]
            if value.dtype is not None and not _same_kind(tensor.dtype, value.dtype):
                raise InputError(f"the input {name!r} has the type {tensor.dtype}, the model wants {value.dtype.name}")
            wanted = None if value.shape is None else tuple(value.shape)
            if wanted is not None and not _fits(tuple(tensor.shape), wanted):
                sizes = ", ".join(str(dim) if isinstance(dim, int) else "any" for dim in wanted)
                raise InputError(f"the input {name!r} has the shape {list(tensor.shape)}, the model wants [{sizes}]")


def _same_kind(found: torch.dtype, wanted: ir.DataType) -> bool:
    return found.is_floating_point if wanted in FLOATS else found == Carriers()(wanted)


def _fits(shape: tuple[int, ...], wanted: Sequence[object]) -> bool:
    return len(shape) == len(wanted) and all(
        not isinstance(dim, int) or size == dim for size, dim in zip(shape, wanted, strict=True)
    )


def _array(value: Any, kind: ir.DataType | None) -> Any:
    if isinstance(value, (list, tuple)):
        return [_array(item, kind) for item in value]
    return None if value is None else to_numpy(value, kind)
