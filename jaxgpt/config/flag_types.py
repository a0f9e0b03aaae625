"""Types of fields as tyro shows them in `--help`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import FlagConversionOff, arg
from tyro.constructors import PrimitiveConstructorSpec

from jaxgpt.files import named_path


def unless_none(default: str) -> str:
    # The field's comment says what happens if it is unset, so no "default: None" is shown.
    return "" if default == "None" else f"(default: {default})"


IntIfSet = Annotated[int | None, arg(metavar="INT", help_behavior_hint=unless_none)]
FloatIfSet = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint=unless_none)]
TextIfSet = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint=unless_none)]
PATH = PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH",
    instance_from_str=lambda words: named_path(words[0]),
    is_instance=lambda value: value is None or isinstance(value, Path),
    str_from_instance=lambda path: [str(path)],
)
PathIfSet = Annotated[Path | None, PATH, arg(help_behavior_hint=unless_none)]


# nanoGPT's spelling: `--bias=True`, never a bare `--bias`.
TrueOrFalse = Annotated[bool, FlagConversionOff]
