"""Which of several processes this is: from flags, or from what a launcher says."""

import os
from collections.abc import Mapping

from jaxgpt.errors import UserError
from jaxgpt.run.launchers import find_launched_rank


def find_rank(
    rank: int | None, world_size: int | None, environ: Mapping[str, str] = os.environ
) -> tuple[int, int, str]:
    """(rank, world size, who says so); (0, 1, "") for a process on its own. Raises UserError."""
    if (rank is None) != (world_size is None):
        raise UserError("--rank and --world-size belong together; give both, or neither")
    if rank is not None and world_size is not None:
        return _checked(rank, world_size, "--rank and --world-size")
    if (launched := find_launched_rank(environ)) is not None:
        return _checked(*launched)
    return 0, 1, ""


def _checked(rank: int, world_size: int, who: str) -> tuple[int, int, str]:
    if not 0 <= rank < world_size <= 999:
        raise UserError(
            f"rank {rank} of {world_size} ({who}): ranks go from 0 to the world size less one, "
            "which is at most 999"
        )
    return rank, world_size, who
