"""What a run hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from quantkit.allocators._table import Allocation
from quantkit.cache import Scratch
from quantkit.errors import InputError
from quantkit.graph.emit import in_memory, save, without_notes
from quantkit.report.types import Report
from quantkit.runtime.ort import inline_bytes
from quantkit.types import Plan

PICKLED_LIMIT = (1 << 31) - (1 << 20)


@dataclass(frozen=True)
class Result:
    """A compressed, verified model.

    Attributes:
        model: the quantized graph, provenance included.
        plan: every decision; `quantkit.plan.save_plan` writes it, `apply` repeats it.
        report: what was measured.
        allocation: how bits were allocated: sensitivities, and the front of choices.
        files: where the weights of a large model lie until it is saved; None = in memory.
        weight_files: the float model's external data, which are not written over.
    """

    model: ir.Model
    plan: Plan
    report: Report
    allocation: Allocation = field(default_factory=lambda: Allocation({}))
    files: Scratch | None = None
    weight_files: tuple[Path, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write the model; the final name appears only when the file is whole.

        Raises:
            InputError: it would overwrite a file that holds the float model's weights.
            OSError: the folder cannot be written, or the disk is full.
        """
        written = {Path(path).resolve(), Path(f"{path}.data").resolve()}
        taken = written & {Path(file).resolve() for file in self.weight_files}
        if taken:
            raise InputError(f"{path} would overwrite {taken.pop()}, which holds weights of the float model; rename it")
        save(self.model, Path(path), None if self.files is None else self.files.folder)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the model as bytes, so that no file is needed any more.

        Raises:
            InputError: the model is larger than a protobuf can be.
        """
        size = inline_bytes(self.model)
        if size > PICKLED_LIMIT:
            raise InputError(f"a model of {size} bytes of weights cannot be pickled: save it, and pass on its path")
        content = ir.to_proto(in_memory(self.model)).SerializeToString(deterministic=True)
        return {**vars(self), "model": content, "files": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = without_notes(ir.from_proto(onnx.ModelProto.FromString(state["model"])))
        for name, content in {**state, "model": model}.items():
            object.__setattr__(self, name, content)
