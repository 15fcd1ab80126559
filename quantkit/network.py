"""The float model and the samples on which allocators try changed weights."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.runtime.probe import Probe


@dataclass(frozen=True)
class Network:
    """Two sets of samples that have nothing in common.

    Attributes:
        calibration: samples that quantizers saw: sensitivities are measured on these.
        held_out: samples that nothing was fitted to: estimators are judged on these.
        macs: multiplications of one sample through all targets; what trying costs, in a figure that is the same on
            every machine.
    """

    calibration: Probe
    held_out: Probe
    macs: int
