"""`--mesh data=2,fsdp=4` as two numbers; imports no JAX."""

import re
from typing import NamedTuple

FORM = re.compile(r"(data|fsdp)=([1-9][0-9]{0,5})")


class MeshShape(NamedTuple):
    """How many devices hold the same, and over how many the state is divided."""

    data: int = 1
    fsdp: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"data={self.data},fsdp={self.fsdp}"


def parse_mesh(text: str | None) -> MeshShape:
    """The shape that `text` names, one device if it is None; ValueError with what is wrong."""
    if text is None:
        return MeshShape()
    parts = [FORM.fullmatch(part.strip()) for part in text.split(",")]
    sizes = {part[1]: int(part[2]) for part in parts if part}
    if not all(parts) or len(sizes) < len(parts):
        raise ValueError(
            f"mesh {text!r} is not of the form data=2,fsdp=4 (or one of the two); data: devices "
            "that hold the same, fsdp: devices that divide the state among them"
        )
    return MeshShape(**sizes)
