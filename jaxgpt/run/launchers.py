"""Who has started this process as one of several, and what it says of the others on this host.

JAX reads the rest itself (`jax.distributed.initialize`), but for one thing: it gives each process
one card, that of its number on the host, whether or not there are as many processes as cards.
"""

import os
import re
from typing import NamedTuple


class Launcher(NamedTuple):
    """The variables by which a launcher is known."""

    name: str
    mark: str  # which of the processes this is, or where they are: there under this launcher alone
    size: str | None  # how many they are; None where only JAX finds out
    remedy: str = ""  # what JAX needs besides, to be said where they cannot meet


# In JAX's order. Of Slurm the step's number counts: a shell of salloc has the job's beside it.
LAUNCHERS = (
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "; from Open MPI 5 on JAX 0.12 finds the others, with pip install mpi4py",
    ),
    Launcher("Slurm", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"),
    Launcher(
        "Kubernetes",
        "JOB_COMPLETION_INDEX",
        None,
        "; in an indexed Job JAX finds the others, with pip install kubernetes",
    ),
    Launcher(
        "JAX_COORDINATOR_ADDRESS",
        "JAX_COORDINATOR_ADDRESS",
        None,
        "; --num-processes and --process-id go with it",
    ),
)


def find_launcher() -> Launcher | None:
    """What has started this process as one of several, by the environment."""
    for launcher in LAUNCHERS:
        several = launcher.size is None or _number(launcher.size, 1) > 1
        if launcher.mark in os.environ and several:
            return launcher
    return None


class OnHost(NamedTuple):
    """This process among those of its host."""

    number: int
    processes: int
    cards: int  # that the launcher has given to all of them, 0 if it does not say


def on_this_host(launcher: Launcher | None) -> OnHost | None:
    """Which of its host's processes this is, None where nobody says or JAX does not ask."""
    if launcher is None or launcher.name not in ("Open MPI", "Slurm"):
        return None
    if launcher.name == "Open MPI":
        size = _number("OMPI_COMM_WORLD_LOCAL_SIZE", 0)
        return OnHost(_number("OMPI_COMM_WORLD_LOCAL_RANK", 0), size, 0) if size else None
    node = _number("SLURM_NODEID", 0)
    # 8(x2),4: eight tasks on each of the first two hosts, four on the third
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(tasks) for tasks, hosts in found for _ in range(int(hosts or 1))]
    if node >= len(tasks):
        return None
    return OnHost(_number("SLURM_LOCALID", 0), tasks[node], _number("SLURM_GPUS_ON_NODE", 0))


def cards_of(here: OnHost, visible: int) -> tuple[int, ...]:
    """The numbers of the cards that a process takes of those it sees; none for all of them.

    Args:
        here: where it stands among its host's processes.
        visible: how many cards it sees. Fewer than the host has are its own.
    """
    if here.processes == 1 or visible < max(here.processes, here.cards):
        return ()
    share = visible // here.processes
    return tuple(range(here.number * share, (here.number + 1) * share))


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise
