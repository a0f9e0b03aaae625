"""What launchers tell the processes that they start."""

import os

import pytest

from jaxgpt.config.launchers import HostRank, find_host_rank, find_launcher, share_of_cards

SRUN = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_NTASKS": "20", "SLURM_STEP_NUM_TASKS": "20"}


@pytest.fixture
def variables(monkeypatch):
    """Sets the environment to what a launcher makes of it."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "JOB_COMPLETION", "JAX_COORD")):
            monkeypatch.delenv(name)

    def are(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return are


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, None),
        (SRUN, "Slurm"),
        # one task: all its cards are one run's
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        # a shell that salloc has opened on the first host, with the job's variables beside its own
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, None),  # sbatch without srun
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "many"}, None),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        # mpirun, whose daemons srun has started
        ({**SRUN, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "h"}, None),  # a pod of its own
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_COORDINATOR_ADDRESS"),
        # JAX connects neither the tasks of an array nor what torchrun starts
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}, None),
        ({"RANK": "1", "WORLD_SIZE": "4"}, None),
    ],
)
def test_a_launcher_is_known_by_what_it_tells_each_process(variables, values, name) -> None:
    variables(values)
    found = find_launcher()
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("values", "here"),
    [
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "2",
          "SLURM_LOCALID": "3", "SLURM_GPUS_ON_NODE": "4"}, HostRank(3, 4, 4)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "1",
          "SLURM_LOCALID": "7"}, HostRank(7, 8, 0)),
        (SRUN, None),  # nothing is said of hosts
        ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8",
          "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, HostRank(1, 4, 0)),
        ({"JOB_COMPLETION_INDEX": "0"}, None),  # a pod has its own cards
    ],
)  # fmt: skip
def test_a_process_knows_its_place_on_its_host(variables, values, here) -> None:
    variables(values)
    assert find_host_rank(find_launcher()) == here


@pytest.mark.parametrize(
    ("here", "visible", "cards"),
    [
        (HostRank(5, 8, 8), 8, (5,)),  # a process for each card
        (HostRank(0, 1, 8), 8, ()),  # one for all of them
        (HostRank(1, 2, 8), 8, (4, 5, 6, 7)),
        (HostRank(1, 2, 8), 4, ()),  # --gpus-per-task 4: it sees its own alone
        (HostRank(5, 8, 8), 1, ()),
        (HostRank(5, 8, 0), 1, ()),
        (HostRank(1, 2, 0), 0, ()),  # no card at all
    ],
)
def test_processes_of_a_host_share_the_cards_that_all_of_them_see(here, visible, cards) -> None:
    assert share_of_cards(here, visible) == cards
