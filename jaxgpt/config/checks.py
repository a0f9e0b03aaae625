"""Checks that several sections of the configuration share, and their error messages."""

import dataclasses
import difflib
import math
from collections.abc import Collection
from typing import Any

from jaxgpt.errors import UserError

# JAX counts steps in 32 bits, and truncates seeds to them.
LARGEST = 2**31 - 1
FLOAT32 = (2.0**-126, 2.0**128)  # the smallest normal number, and the first too large one


class ConfigError(UserError):
    """An invalid configuration; the message names the field, the reason and the remedy."""


def bad_counts(section: Any, *names: str, least: int = 1, as_flags: bool = False) -> list[str]:
    """A sentence for each integer that is out of range; one that is None is unset."""
    values = {as_flag(name) if as_flags else name: getattr(section, name) for name in names}
    return [
        f"{name} {value} must be at least {least}"
        if value < least
        else f"{name} {value} must be at most {LARGEST}"
        for name, value in values.items()
        if value is not None and not least <= value <= LARGEST
    ]


def bad_amounts(section: Any, *names: str, zero: bool = True) -> list[str]:
    """A sentence for each number that is negative or not finite, or 0 unless `zero` is allowed."""
    values = {name: getattr(section, name) for name in names}
    return [
        f"{name} {value:g} must be finite and {'at least' if zero else 'above'} 0"
        for name, value in values.items()
        if value is not None and not (0 <= value < math.inf and (zero or value))
    ]


def bad_shares(section: Any, *names: str) -> list[str]:
    """A sentence for each number that is not from 0 to below 1 in float32."""
    values = {name: getattr(section, name) for name in names}
    return [
        f"{name} {value} must be at least 0 and below 1"
        for name, value in values.items()
        if not 0 <= value <= 1 - 2**-24
    ]


def bad_floats(section: Any) -> list[str]:
    """A sentence for each finite number that is zero or infinite to float32."""
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return [
        f"{name} {value:g} is beyond float32, which reaches from 1.2e-38 to 3.4e+38; choose a "
        "usual value"
        for name, value in values.items()
        if isinstance(value, float)
        and value
        and math.isfinite(value)
        and not FLOAT32[0] <= abs(value) < FLOAT32[1]
    ]


def as_flag(name: str) -> str:
    """The flag of a field: '--batch-size' of 'batch_size'."""
    return f"--{name.replace('_', '-')}"


def did_you_mean(word: str, known: Collection[str], prefix: str = "") -> str:
    """The end of a message about an unknown word: the nearest known one, if one is near."""
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean '{prefix}{near[0]}'?" if near else ""
