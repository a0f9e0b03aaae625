"""Which of several processes this is."""

import pytest

from jaxgpt.errors import UserError
from jaxgpt.preparation.ranks import find_rank


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script without srun
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
            },
            (2, 4),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "4", "OMPI_COMM_WORLD_SIZE": "5"}, (4, 5)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "x", "WORLD_SIZE": "2"}, (0, 1)),
    ],
)
def test_launchers_say_which_process_this_is(
    environ: dict[str, str], expected: tuple[int, int]
) -> None:
    assert find_rank(None, None, environ)[:2] == expected


def test_flags_come_before_launchers() -> None:
    assert find_rank(1, 3, {"RANK": "0", "WORLD_SIZE": "8"})[:2] == (1, 3)


@pytest.mark.parametrize("flags", [(3, 3), (-1, 2), (0, 5000), (None, 2), (1, None)])
def test_a_rank_that_cannot_be_is_refused(flags: tuple[int | None, int | None]) -> None:
    with pytest.raises(UserError, match="rank"):
        find_rank(*flags, environ={})
