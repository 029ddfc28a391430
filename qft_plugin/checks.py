"""Checks of settings: each refuses a wrong value by the name of its field, with a `ConfigError`."""

import contextlib
import inspect
import math
from collections.abc import Mapping
from typing import Any

from qft_plugin.errors import ConfigError


def check_choice(owner: object, name: str, allowed: tuple[str, ...]) -> None:
    """Check that a setting is one of some words."""
    found = getattr(owner, name)
    if found not in allowed:
        raise ConfigError(f"{type(owner).__name__}.{name} should be one of {allowed}. Found {found!r}.")


def check_number(
    owner: object, name: str, *, at_least: float | None = None, at_most: float | None = None, whole: bool = False
) -> None:
    """Check that a setting is a finite number, or a whole one, inside some limits."""
    found = getattr(owner, name)
    kind = "a whole number" if whole else "a number"
    right_type = isinstance(found, int) if whole else isinstance(found, (int, float))
    if isinstance(found, bool) or not right_type or not math.isfinite(found):
        raise ConfigError(f"{type(owner).__name__}.{name} should be {kind}. Found {found!r}.")
    if at_least is not None and found < at_least:
        raise ConfigError(f"{type(owner).__name__}.{name} should be at least {at_least}. Found {found!r}.")
    if at_most is not None and found > at_most:
        raise ConfigError(f"{type(owner).__name__}.{name} should be at most {at_most}. Found {found!r}.")


def check_names(owner: object, name: str, *, empty: bool) -> None:
    """Check that a setting holds names, each once."""
    found = getattr(owner, name)
    if not isinstance(found, (list, tuple, Mapping)) or not all(isinstance(n, str) for n in found):
        raise ConfigError(f"{type(owner).__name__}.{name} should hold names of modules or operations. Found {found!r}.")
    if len(set(found)) != len(found) or (not found and not empty):
        least = "" if empty else "at least one name, and "
        raise ConfigError(f"{type(owner).__name__}.{name} should hold {least}each name once. Found {found!r}.")


def check_flag(owner: object, name: str) -> None:
    """Check that a setting is True or False."""
    found = getattr(owner, name)
    if not isinstance(found, bool):
        raise ConfigError(f"{type(owner).__name__}.{name} should be True or False. Found {found!r}.")


def check_callback(callback: object) -> None:
    """Check before a job that what it calls after each step can be called, with one argument."""
    if callback is None:
        return
    fits = callable(callback)
    if callable(callback):
        with contextlib.suppress(ValueError):  # some functions that are written in C do not say what they take
            signature = inspect.signature(callback)
            try:
                signature.bind(None)
            except TypeError:
                fits = False
    if not fits:
        raise ConfigError(f"callback should be a function of one Step, or None. Found {callback!r}.")


def check_instance(owner: object, name: str, kind: type[Any]) -> None:
    """Check that a setting is of a class."""
    found = getattr(owner, name)
    if not isinstance(found, kind):
        raise ConfigError(f"{type(owner).__name__}.{name} should be a {kind.__name__}. Found {found!r}.")
