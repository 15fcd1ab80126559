"""--loss: a function of the user's own in the place of the divergence, for the methods that differentiate it."""

from __future__ import annotations

from argparse import ArgumentParser, _ArgumentGroup
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit import methods
from quantkit.errors import InputError

SETTING = "loss"


def add_loss(group: ArgumentParser | _ArgumentGroup, option: str) -> None:
    """Args: option: that names the methods, for the help."""
    group.add_argument(
        "--loss",
        metavar="MODULE:FUNCTION",
        help=f"what hawq, quadratic and fisher differentiate, with one of them in {option}: a function of the outputs "
        "and the float model's outputs, torch tensors by name (default: divergence from the float model)",
    )


def with_loss(settings: Mapping[str, Any], loss: str | None, allocators: Sequence[str], option: str) -> dict[str, Any]:
    """The settings, with the loss for each of these allocators that has one.

    Args:
        option: that named the allocators, for messages.

    Raises:
        InputError: none of them differentiates a loss, it is set twice, or a loss cannot be imported.
    """
    merged = dict(settings)
    if loss is not None:
        takers = [name for name in allocators if takes_loss(name)]
        if not takers:
            known = ", ".join(name for name in methods.find("allocators") if takes_loss(name))
            raise InputError(f"--loss is for methods that differentiate; give {option} one of {known}")
        for name in takers:
            key = f"{name}.{SETTING}"
            if key in merged:
                raise InputError(f"--loss and --set {key} are the same setting; give one of them")
            merged[key] = loss
    methods.check_settings(merged)
    for key, value in merged.items():
        if key.partition(".")[2] == SETTING and isinstance(value, str):
            import_loss(value)  # now, not after calibration
    return merged


def takes_loss(name: str) -> bool:
    if name == "auto":
        return False  # it judges by the divergence
    return any(setting.name == SETTING for setting in methods.settings_of("allocators", name))


def import_loss(text: str) -> None:
    """Raises: InputError when there is no such function."""
    from quantkit.userfunction import import_function

    import_function(text, "loss")
