"""The one exception that means "your input": the command line prints its sentence and exits with 2."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, what was found, and what to do about it."""


class VerificationError(RuntimeError):
    """The written model does not do what the plan says; no file is left behind."""
