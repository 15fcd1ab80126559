"""`quantkit.InferenceSession`: a quantized file, run by onnxruntime on CPUs, by torch and Triton kernels on CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quantkit.errors import InputError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import torch

    from quantkit.runtime.executor import Layer
    from quantkit.runtime.executor.runner import Runner
    from quantkit.runtime.ort import Session
    from quantkit.types import Array

DTYPES = ("float16", "bfloat16", "float32")
LEAST_CAPABILITY = (8, 0)
GRAPHS = 16


@dataclass(frozen=True)
class Argument:
    """An input or output, as onnxruntime describes it.

    Attributes:
        type: `tensor(float)` and the like.
        shape: numbers, names of dynamic sizes, or None; None when the model does not tell.
    """

    name: str
    type: str
    shape: Sequence[int | str | None] | None


class InferenceSession:
    """Runs an ONNX model, as onnxruntime's class of this name does.

    Attributes:
        device: `cpu`, where onnxruntime runs the file, or the CUDA device that torch does.
        layers: on CUDA how each layer with weights runs; empty on the CPU.
    """

    def __init__(
        self,
        model: str | Path | onnx.ModelProto | ir.Model,
        device: str = "auto",
        *,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        activations: Literal["float", "file", "int8"] = "float",
        graphs: int = GRAPHS,
        threads: int = 0,
    ) -> None:
        """Load a model.

        Args:
            model: file, protobuf or graph; never changed.
            device: `cpu`, `cuda` (or `cuda:1` ...), or `auto`: a GPU when there is one that the kernels run on.
            dtype: on CUDA, what floats are computed in; weights of codes stay packed in float16 and bfloat16. Values
                beyond 65504 are infinite in float16: bfloat16 holds them.
            activations: on CUDA, what becomes of inputs that the file rounds to 8 bits at run time (form `dynamic`):
                `float` leaves them as they are and multiplies with the codes that the file holds; `file` rounds them
                like the file; `int8` multiplies in integers with one scale per row.
            graphs: on CUDA, for how many input shapes a CUDA graph is kept; 0 = none.
            threads: on the CPU, of one operator; 0 = onnxruntime's choice.

        Raises:
            InputError: there is no such device here, an option is unknown, or the model cannot be loaded or run.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if graphs < 0:
            raise InputError(f"graphs must be 0 (none) or the number of shapes to keep, got {graphs}")
        self.device = choose_device(device)
        self.layers: tuple[Layer, ...] = ()
        self._runner: Runner | None = None
        self._session: Session | None = None
        if self.device == "cpu":
            self._session = _ort_session(model, threads)
            self._inputs, self._outputs = _ort_arguments(self._session)
            return
        import torch

        from quantkit.runtime.executor import Executor
        from quantkit.runtime.executor.runner import Runner

        executor = Executor(model, torch.device(self.device), getattr(torch, dtype), activations)
        self._runner = Runner(executor, graphs)
        self.layers = executor.layers
        self._inputs = [_argument(value) for value in executor.inputs]
        self._outputs = [_argument(value) for value in executor.outputs]

    def get_inputs(self) -> list[Argument]:
        """In the model's order."""
        return list(self._inputs)

    def get_outputs(self) -> list[Argument]:
        """In the model's order."""
        return list(self._outputs)

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array]) -> list[Any]:
        """numpy arrays in and out.

        Args:
            output_names: which outputs, in which order; None = all.
            input_feed: input name -> array.

        Raises:
            InputError: an input is missing, unknown or of another type or shape; there is no such output.
        """
        names = self._names(output_names)
        if self._runner is not None:
            found = self._runner.run(input_feed)
        else:
            assert self._session is not None
            found = self._session.run(input_feed)
        return [found[name] for name in names]

    def run_torch(
        self, input_feed: Mapping[str, Any], output_names: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors in, tensors on the session's device out; nothing passes through the host on CUDA.

        Args:
            input_feed: input name -> torch.Tensor, or anything with `__dlpack__` (cupy, jax, numpy).
            output_names: None = all.

        Raises:
            InputError: as `run`; torch is not installed.
        """
        if find_spec("torch") is None:
            raise InputError("run_torch needs PyTorch: pip install 'quantkit[torch]'")
        import torch
        import torch.utils.dlpack

        names = self._names(output_names)
        tensors = {
            name: item if isinstance(item, torch.Tensor) else torch.utils.dlpack.from_dlpack(item)
            for name, item in input_feed.items()
        }
        if self._runner is not None:
            found = self._runner.run_tensors(tensors)
            return {name: found[name] for name in names}
        assert self._session is not None
        arrays = self._session.run({name: item.detach().cpu().numpy() for name, item in tensors.items()})
        return {name: torch.from_numpy(arrays[name]) for name in names}

    def _names(self, wanted: Sequence[str] | None) -> Sequence[str]:
        known = [item.name for item in self._outputs]
        for name in wanted or ():
            if name not in known:
                raise InputError(f"the model has no output {name!r}; it has {', '.join(known)}")
        return known if wanted is None else list(wanted)


def choose_device(device: str) -> str:
    """`cpu`, or the CUDA device that was asked for.

    Raises:
        InputError: the device is unknown, or CUDA was asked for and is not there.
    """
    if device == "cpu":
        return "cpu"
    if device == "auto":
        return "cpu" if _missing() is not None or _capability() < LEAST_CAPABILITY else "cuda"
    if device != "cuda" and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    missing = _missing()
    if missing is not None:
        raise InputError(f"device={device!r} cannot be used: {missing}; device='cpu' runs the model with onnxruntime")
    import torch

    if device != "cuda" and int(device[5:]) >= torch.cuda.device_count():
        raise InputError(f"device={device!r} cannot be used: there are {torch.cuda.device_count()} CUDA devices")
    return device


def _missing() -> str | None:
    """What a CUDA session lacks here."""
    for name in ("torch", "triton"):
        if find_spec(name) is None:
            return f"{name} is not installed (pip install 'quantkit[gpu]')"
    import torch

    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


def _capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability()


def _ort_session(model: str | Path | onnx.ModelProto | ir.Model, threads: int) -> Session:
    from quantkit.graph.load import open_model
    from quantkit.runtime.ort import make_session

    if isinstance(model, (str, Path)):
        if not Path(model).is_file():
            raise InputError(f"there is no model file {str(model)!r}")
        return make_session(Path(model), threads=threads)
    return make_session(open_model(model)[0], threads=threads)


def _ort_arguments(session: Session) -> tuple[list[Argument], list[Argument]]:
    from quantkit.runtime.ort import input_specs, output_specs

    inputs, outputs = (
        [Argument(name, kind, list(shape)) for name, (kind, shape) in specs(session).items()]
        for specs in (input_specs, output_specs)
    )
    return inputs, outputs


def _argument(value: ir.Value) -> Argument:
    """In onnxruntime's words."""
    shape = None if value.shape is None else [_size(dim) for dim in value.shape]
    kind = "" if value.dtype is None else ORT_NAMES.get(value.dtype.name, value.dtype.name.lower())
    return Argument(str(value.name), f"tensor({kind})", shape)


def _size(dim: Any) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


ORT_NAMES = {"FLOAT": "float"}
"""Element types whose ONNX names are not onnxruntime's in lower case."""
