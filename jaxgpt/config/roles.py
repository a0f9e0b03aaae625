"""The roles of a configuration field, given with its type.

    learning_rate: Annotated[float, Role.TUNABLE, Role.PLANNED] = 6e-4

Every rule about fields (which ones a resumed run keeps, a preset may set, a model card shows) is
computed from these; no other module lists field names. Each field has exactly one of FIXED,
PINNED and TUNABLE, and any of the others.
"""

import enum
import typing
from typing import Any


class Role(enum.Enum):
    """One property of a field."""

    FIXED = "part of a run's identity: another value on resume is an error"
    PINNED = "a resumed run keeps its own value and ignores another"
    TUNABLE = "a resumed run may change it"

    INHERITED = "a resumed run keeps its own value unless one is asked for"
    DERIVED = "found by the program: no preset may set it"
    LOCAL = "about this machine: not on a model card"
    SILENT = "a change on resume is not announced"
    IMPLIED = "left out of printed commands: it follows from other flags, or is local"
    PLANNED = "chosen by `plan --hours`, so it cannot be given with it"


def roles_of(annotation: Any) -> frozenset[Role]:
    """The roles in a field's annotation."""
    return frozenset(x for x in typing.get_args(annotation) if isinstance(x, Role))
