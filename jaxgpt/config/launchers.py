"""Launchers of several processes (Slurm, Open MPI, ...), known by their environment variables.

JAX finds the other processes of a training run itself (`jax.distributed.initialize`), but gives
each process only one card, even if its host has more cards than processes.
"""

import os
import re
from typing import NamedTuple


class Launcher(NamedTuple):
    """The environment variables that a launcher sets."""

    name: str
    mark: str  # a variable that identifies the launcher
    size: str | None  # the variable with the number of processes; None if it sets none
    remedy: str = ""  # what else JAX needs to connect them


# In the order in which JAX tries them. Slurm's variables are those of a job step, which srun starts
# (in array jobs, too): a batch script or an salloc shell has only the job's, and is one process.
LAUNCHERS = (
    Launcher(
        name="Open MPI",
        mark="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        remedy="; from Open MPI 5 on, JAX 0.12 finds the others after pip install mpi4py",
    ),
    Launcher("Slurm", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"),
    Launcher(
        name="Kubernetes",
        mark="JOB_COMPLETION_INDEX",
        size=None,
        remedy="; in an indexed Job, JAX finds the others after pip install kubernetes",
    ),
    Launcher(
        name="JAX_COORDINATOR_ADDRESS",
        mark="JAX_COORDINATOR_ADDRESS",
        size=None,
        remedy="; --num-processes and --process-id go with it",
    ),
)


def find_launcher() -> Launcher | None:
    """The launcher that started this process as one of several that JAX can connect."""
    for launcher in LAUNCHERS:
        several = launcher.size is None or _number(launcher.size, 1) > 1
        if launcher.mark in os.environ and several:
            return launcher
    return None


class HostRank(NamedTuple):
    """The local rank of this process, as launchers call it."""

    number: int
    processes: int
    cards: int  # of the host, for all of them together; 0 if the launcher does not say


def find_host_rank(launcher: Launcher | None) -> HostRank | None:
    """This process among those on its host; None if unknown or if JAX does not need it."""
    if launcher is None or launcher.name not in ("Open MPI", "Slurm"):
        return None
    if launcher.name == "Open MPI":
        size = _number("OMPI_COMM_WORLD_LOCAL_SIZE", 0)
        return HostRank(_number("OMPI_COMM_WORLD_LOCAL_RANK", 0), size, 0) if size else None
    node = _number("SLURM_NODEID", 0)
    # 8(x2),4: eight tasks on each of the first two hosts, four on the third
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(tasks) for tasks, hosts in found for _ in range(int(hosts or 1))]
    if node >= len(tasks):
        return None
    return HostRank(_number("SLURM_LOCALID", 0), tasks[node], _number("SLURM_GPUS_ON_NODE", 0))


def share_of_cards(here: HostRank, visible: int) -> tuple[int, ...]:
    """The indices of the cards that a process uses, among those it sees; () for all of them.

    Args:
        here: the process among those on its host.
        visible: how many cards it sees; if that is fewer than the host has, they are its own.
    """
    if here.processes == 1 or visible < max(here.processes, here.cards):
        return ()
    share = visible // here.processes
    return tuple(range(here.number * share, (here.number + 1) * share))


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
