"""Functions that users name as `module:function`: metrics and losses of their own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit.errors import InputError
from quantkit.runtime.ort import first_line


def import_function(text: str, what: str) -> Callable[..., Any]:
    """The function that `module:function` names; modules of the working directory are found first.

    Args:
        what: it is, for messages: `metric`.

    Raises:
        InputError: it cannot be imported, or is no function.
    """
    module, _, name = text.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything
        raise InputError(f"the {what} {text!r} cannot be imported: {first_line(error)}") from error
    finally:
        sys.path.remove(folder)
    if not callable(found):
        raise InputError(f"the {what} {text!r} is no function but {type(found).__name__}")
    checked: Callable[..., Any] = found
    return checked
