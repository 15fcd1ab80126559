"""The float model and the samples on which allocators try changed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.errors import InputError
from quantkit.runtime.probe import Probe
from quantkit.types import LayerStats


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


def network_of(network: Network | None, stats: Mapping[str, LayerStats], who: str) -> Network:
    """The network, which is there.

    Args:
        stats: what calibration saw; empty = there was none.
        who: asks for it, for the message.

    Raises:
        InputError: it is not there.
    """
    if network is not None:
        return network
    if stats:
        raise InputError(
            f"{who} runs the float model again and again, which is not done with more than 1 GiB of weights; "
            "allocate with salience, slim or uniform"
        )
    raise InputError(f"{who} needs calibration data: give --calib")
