"""Which of several processes this is: from flags, or from what a launcher says."""

import os
from collections.abc import Mapping

from jaxgpt.errors import UserError

# The variables of each launcher for rank and world size. Slurm's of a step (srun) come first: an
# array's tasks may each run one. SLURM_NTASKS is left alone: a batch script has it too, which is
# one process and not the first of many.
LAUNCHERS = {
    "Slurm's step": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "Slurm's array": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    "torchrun": ("RANK", "WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
}


def find_rank(
    rank: int | None, world_size: int | None, environ: Mapping[str, str] = os.environ
) -> tuple[int, int, str]:
    """(rank, world size, who says so); (0, 1, "") for a process on its own. Raises UserError."""
    if (rank is None) != (world_size is None):
        raise UserError("--rank and --world-size belong together; give both, or neither")
    if rank is not None and world_size is not None:
        return _checked(rank, world_size, "--rank and --world-size")
    for launcher, (rank_name, size_name) in LAUNCHERS.items():
        found = environ.get(rank_name, ""), environ.get(size_name, "")
        if all(value.isdigit() for value in found) and int(found[1]) > 1:
            first = int(environ.get("SLURM_ARRAY_TASK_MIN", "0")) if "array" in launcher else 0
            return _checked(int(found[0]) - first, int(found[1]), launcher)
    return 0, 1, ""


def _checked(rank: int, world_size: int, who: str) -> tuple[int, int, str]:
    if not 0 <= rank < world_size <= 999:
        raise UserError(
            f"rank {rank} of {world_size} ({who}): ranks go from 0 to the world size less one, "
            "which is at most 999"
        )
    return rank, world_size, who
