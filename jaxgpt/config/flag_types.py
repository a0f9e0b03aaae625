"""Types of fields as tyro shows them in `--help`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import FlagConversionOff, arg


def unless_none(default: str) -> str:
    # The field's comment says what happens if it is unset, so no "default: None" is shown.
    return "" if default == "None" else f"(default: {default})"


IntIfSet = Annotated[int | None, arg(metavar="INT", help_behavior_hint=unless_none)]
FloatIfSet = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint=unless_none)]
TextIfSet = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint=unless_none)]
PathIfSet = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint=unless_none)]


# nanoGPT's spelling: `--bias=True`, never a bare `--bias`.
TrueOrFalse = Annotated[bool, FlagConversionOff]
