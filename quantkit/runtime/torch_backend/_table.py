"""All converters: operator type -> the versions at which its meaning changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantkit.runtime.torch_backend import (
    activations,
    attention,
    attention_microsoft,
    casting,
    control_flow,
    convolution,
    elementwise,
    indexing,
    linear_algebra,
    logic,
    microsoft,
    nbits,
    normalization,
    padding,
    pooling,
    qlinear,
    quantization,
    recurrent,
    reduction,
    regions,
    resize,
    scattering,
    selection,
    sequence,
    shape,
    signal,
    spatial,
)
from quantkit.runtime.torch_backend._types import Op, Table

Versions = Mapping[str, Sequence[tuple[int, Op]]]


def merged(tables: Sequence[Table]) -> Versions:
    """Operator type -> (first version, converter), newest first."""
    rows: dict[str, dict[int, Op]] = {}
    for table in tables:
        for (name, version), op in table.items():
            if version in rows.setdefault(name, {}):
                raise ValueError(f"two converters for {name} since version {version}")
            rows[name][version] = op
    return {name: sorted(found.items(), key=lambda row: row[0], reverse=True) for name, found in rows.items()}


ONNX = merged(
    [
        activations.TABLE,
        attention.TABLE,
        casting.TABLE,
        control_flow.TABLE,
        convolution.TABLE,
        elementwise.TABLE,
        indexing.TABLE,
        linear_algebra.TABLE,
        logic.TABLE,
        microsoft.STANDARD,
        normalization.TABLE,
        padding.TABLE,
        pooling.TABLE,
        qlinear.TABLE,
        quantization.TABLE,
        recurrent.TABLE,
        reduction.TABLE,
        regions.TABLE,
        resize.TABLE,
        scattering.TABLE,
        selection.TABLE,
        sequence.TABLE,
        shape.TABLE,
        signal.TABLE,
        spatial.TABLE,
    ]
)
MICROSOFT = merged(
    [attention_microsoft.TABLE, microsoft.TABLE, nbits.MICROSOFT, qlinear.MICROSOFT, quantization.MICROSOFT]
)
DOMAINS: Mapping[str, Versions] = {"": ONNX, "com.microsoft": MICROSOFT}


def find(domain: str, op_type: str, version: int) -> Op | None:
    """The converter whose meaning holds at this version of the domain, or None."""
    for since, op in DOMAINS.get(domain, {}).get(op_type, ()):
        if since <= version:
            return op
    return None
