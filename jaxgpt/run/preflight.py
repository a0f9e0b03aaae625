"""Before the first step: everything compiled, and held against the memory that is there.

What does not fit is said with its figures and with flags that would fit, before hours are spent.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgpt.config.fields import Config
from jaxgpt.planning import fit, memory
from jaxgpt.planning.gpus import GIB
from jaxgpt.run.processes import SINGLE_PROCESS, Processes
from jaxgpt.training.build import Training, compile_eval_step, compile_train_step
from jaxgpt.training.layout import OneDevice


class Ready(NamedTuple):
    """A run that fits its device."""

    cfg: Config  # with nothing left to the machine
    training: Training  # its steps compiled for the run's shapes
    need: memory.Need


def prepare_to_run(
    cfg: Config,
    device: Any,
    layout: OneDevice | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> Ready:
    """Choose what `cfg` leaves open, compile its steps for `device`, or all of `layout`'s, and
    check that they fit. Of several `processes` all choose the same.

    Raises:
        TooLargeError: with what is needed, what is there, and the flags that would fit.
    """
    limit = processes.min_over_processes(_limit(cfg, (layout or OneDevice(device)).local_devices))
    compiled: dict[Config, Ready] = {}

    def measure(cfg: Config) -> memory.Need:
        compiled[cfg] = _compile(cfg, device, layout)
        return compiled[cfg].need

    if not fit.is_open(cfg):
        ready = _compile(cfg, device, layout)
        _check_device(ready, limit)
    elif limit is None:
        raise memory.TooLargeError(
            f"{device.device_kind} does not tell its memory, so nothing can be chosen by it; give "
            "--batch-size and --remat"
        )
    else:
        found = fit.best_fit(cfg, limit, measure)
        if found is None:
            raise memory.TooLargeError(fit.too_small(cfg, device.device_kind, limit))
        ready = compiled[found.cfg]
    if device.platform != "cpu":
        _check_host(ready.need)
    return ready


def _limit(cfg: Config, devices: Sequence[Any]) -> int | None:
    """Bytes that each device has for a step, by the one with the least; None if nobody tells."""
    known = [limit for d in devices if (limit := memory.device_limit(d)) is not None]
    if len(known) < len(devices):
        return None
    least = min(known)
    if devices[0].platform == "cpu":  # the memory of all, where a checkpoint's copy lies as well
        least = max(0, least - memory.host_bytes(cfg)) // len(devices)
    return least


def _compile(cfg: Config, device: Any, layout: OneDevice | None) -> Ready:
    training = memory.build_for(cfg, device, layout=layout)
    train_step = compile_train_step(
        training, cfg.gradient_accumulation_steps or 1, cfg.held_at_once
    )
    eval_step = compile_eval_step(training, cfg.held_at_once)
    return Ready(
        cfg,
        training._replace(train_step=train_step, eval_step=eval_step),
        memory.need_of(cfg, train_step, eval_step),
    )


def _check_device(ready: Ready, limit: int | None) -> None:
    cfg, need = ready.cfg, ready.need
    if limit is None or need.peak_bytes <= limit:
        return
    raise memory.TooLargeError(
        f"a step needs {need.peak_bytes / GIB:.2f} GiB (batch_size {cfg.batch_size}, remat "
        f"{cfg.remat}, compiled for this device), and {limit / GIB:.2f} GiB are there.\n"
        f"{fit.advice(cfg, limit)}"
    )


def _check_host(need: memory.Need) -> None:
    available = memory.host_available()
    if available is not None and need.host_bytes > available:
        raise memory.TooLargeError(
            f"a checkpoint is copied to the host's memory while it is written, which takes "
            f"{need.host_bytes / GIB:.2f} GiB, and {available / GIB:.2f} GiB are free there; "
            "close other programs, take a smaller model, or --state-dtype bfloat16"
        )
