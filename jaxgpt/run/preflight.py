"""Before the first step: compile everything, and compare it with the available memory.

A run that does not fit ends here, with its figures and with flags that would fit, and not after
hours of training.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxgpt.config.resolved import Resolved
from jaxgpt.errors import explain_out_of_memory
from jaxgpt.planning import fit, memory
from jaxgpt.planning.gpus import GIB
from jaxgpt.run.console import waiting
from jaxgpt.run.device import check_determinism
from jaxgpt.run.processes import SINGLE_PROCESS, Processes
from jaxgpt.training.build import Training, compile_eval_step, compile_train_step
from jaxgpt.training.layout import Layout


class Compiled(NamedTuple):
    """A run that fits its devices."""

    cfg: Resolved  # with the batch_size and remat that fit
    training: Training  # its steps compiled for the run's shapes
    need: memory.Need
    layout: Layout


@contextmanager
def compile_to_fit(
    cfg: Resolved,
    free: Collection[str],
    layout: Layout,
    processes: Processes = SINGLE_PROCESS,
) -> Iterator[Compiled]:
    """Compile the steps of `cfg` and check that they fit.

    An out-of-memory error inside the `with` block becomes a UserError with a remedy.

    Args:
        cfg: the run.
        free: which of batch_size and remat to choose by what fits.
        layout: its devices.
        processes: of the run; all make the same choice.

    Raises:
        UserError: with what is needed, what there is, and the flags that would fit.
    """
    running = cfg
    with explain_out_of_memory(lambda: fit.flags_after_out_of_memory(running)):
        with waiting("compiling the training step"):
            compiled = _compile_to_fit(cfg, free, layout, processes)
        running = compiled.cfg
        yield compiled


def _compile_to_fit(
    cfg: Resolved, free: Collection[str], layout: Layout, processes: Processes
) -> Compiled:
    device = layout.device
    check_determinism(cfg, device.platform)
    available = processes.min_over_processes(memory.device_limit(device))
    sharing = len(layout.local_devices) if device.platform == "cpu" else 1  # of one memory
    least = 4 * cfg.model.parameter_count() * sharing
    if available is not None and least > available * cfg.mesh.fsdp:  # XLA could abort
        raise memory.TooLargeError(fit.does_not_fit(cfg, device.device_kind, available))
    limit = processes.min_over_processes(_limit(cfg, layout.local_devices))
    tried: dict[Resolved, Compiled] = {}

    def need(candidate: Resolved) -> memory.Need:
        tried[candidate] = _compile(candidate, layout)
        return tried[candidate].need

    if not free:
        compiled = _compile(cfg, layout)
        _check_device(compiled, limit)
    elif limit is None:
        raise memory.TooLargeError(
            f"{device.device_kind} does not report its memory, so batch_size and remat cannot be "
            "auto; give --batch-size and --remat"
        )
    else:
        found = fit.best_fit(cfg, limit, need, free)
        if found is None:
            raise memory.TooLargeError(fit.does_not_fit(cfg, device.device_kind, limit))
        compiled = tried[found.cfg]
    if device.platform != "cpu":
        _check_host(compiled.need)
    return compiled


def _limit(cfg: Resolved, devices: Sequence[Any]) -> int | None:
    """Bytes that each device has for a step: the smallest; None if one does not report it."""
    known = [limit for d in devices if (limit := memory.device_limit(d)) is not None]
    if len(known) < len(devices):
        return None
    smallest = min(known)
    if devices[0].platform == "cpu":  # one memory for all, and for a checkpoint's copy
        smallest = max(0, smallest - memory.host_bytes(cfg)) // len(devices)
    return smallest


def _compile(cfg: Resolved, layout: Layout) -> Compiled:
    training = memory.build_for(cfg, layout.device, layout=layout)
    micro_batch = cfg.batch.global_micro_batch
    train_step = compile_train_step(training, cfg.batch.accumulation, micro_batch)
    eval_step = compile_eval_step(training, micro_batch)
    return Compiled(
        cfg,
        training._replace(train_step=train_step, eval_step=eval_step),
        memory.need_of(cfg, train_step, eval_step),
        layout,
    )


def _check_device(compiled: Compiled, limit: int | None) -> None:
    cfg, need = compiled.cfg, compiled.need
    if limit is None or need.peak_bytes <= limit:
        return
    raise memory.TooLargeError(
        f"a step needs {need.peak_bytes / GIB:.2f} GiB (batch_size {cfg.batch.batch_size}, remat "
        f"{cfg.remat}, compiled for this device), and there are {limit / GIB:.2f} GiB.\n"
        f"{fit.flags_that_fit(cfg, limit, need)}"
    )


def _check_host(need: memory.Need) -> None:
    available = memory.host_available()
    if available is not None and need.host_bytes > available:
        raise memory.TooLargeError(
            f"a checkpoint is copied to the host's memory while it is written, which needs "
            f"{need.host_bytes / GIB:.2f} GiB, and {available / GIB:.2f} GiB are free there; "
            "close other programs, use a smaller model, or --state-dtype bfloat16"
        )
