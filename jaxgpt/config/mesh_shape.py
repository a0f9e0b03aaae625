"""`--mesh data=2,fsdp=4` as two numbers; imports no JAX."""

import re
from typing import NamedTuple

from jaxgpt.config.checks import ConfigError

FORM = re.compile(r"(data|fsdp)=([1-9][0-9]{0,5})")


class MeshShape(NamedTuple):
    """`data` replicas of the state, each sharded over `fsdp` devices."""

    data: int = 1
    fsdp: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"data={self.data},fsdp={self.fsdp}"


ONE_DEVICE = MeshShape()


def parse_mesh(text: str | None) -> MeshShape:
    """The shape that `text` names, one device if it is None; ConfigError if it names none."""
    if text is None:
        return ONE_DEVICE
    parts = [FORM.fullmatch(part.strip()) for part in text.split(",")]
    sizes = {part[1]: int(part[2]) for part in parts if part}
    if not all(parts) or len(sizes) < len(parts):
        raise ConfigError(
            f"mesh {text!r} is not of the form data=2,fsdp=4 (or one of the two); data: "
            "replicas of the state, fsdp: devices that each replica is sharded over"
        )
    return MeshShape(**sizes)


def choose_mesh(asked: str | None, devices: int, processes: int = 1) -> MeshShape:
    """The mesh of a run: what --mesh says, or data-parallel over all devices.

    Args:
        asked: --mesh.
        devices: how many there are, those of all processes.
        processes: how many the run has; together they must use every device.

    Raises:
        ConfigError: if --mesh has more devices than there are or, with several processes, fewer.
    """
    shape = parse_mesh(asked) if asked else MeshShape(data=devices)
    if shape.devices > devices or (processes > 1 and shape.devices < devices):
        raise ConfigError(
            f"--mesh {shape} has {shape.devices} devices, and there are {devices}; leave it out "
            f"for data-parallel training on all, or give sizes whose product is {devices}"
        )
    return shape
