"""Which devices a run uses: settings that JAX reads when it starts, then the devices themselves."""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config
from jaxgpt.config.mesh_shape import parse_mesh
from jaxgpt.config.resolved import Resolved
from jaxgpt.errors import UserError, first_line
from jaxgpt.files import read_file
from jaxgpt.planning.gpus import POOL_SHARE

MEMORY_SETTINGS = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",  # the older name; JAX refuses both at once
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
# No atomics, and no autotuning, which may choose other kernels in each run.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
GUARDS = [f"JAX_TRANSFER_GUARD_{way}" for way in ("HOST_TO_DEVICE", "DEVICE_TO_HOST")]
ON, OFF = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f")
# What JAX's settings must be, if they are set.
SETTINGS = {
    "JAX_ENABLE_X64": OFF,
    "JAX_DISABLE_JIT": OFF,
    "JAX_DEFAULT_PRNG_IMPL": ("threefry2x32",),
    "JAX_THREEFRY_PARTITIONABLE": ON,
    "JAX_NUMPY_DTYPE_PROMOTION": ("standard",),
    "JAX_NUMPY_RANK_PROMOTION": ("allow", "warn"),
    **dict.fromkeys(("JAX_TRANSFER_GUARD", *GUARDS), ("allow", "log", "log_explicit")),
}
MOST_CPU_DEVICES = 64  # XLA starts threads for each, and aborts where the system allows no more
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")


def prepare_environment(cfg: Config) -> None:
    """Set what JAX reads when it starts; call before JAX is imported. The user's settings win.

    Raises:
        ConfigError: if the run needs a GPU and no GPU version of JAX is installed, or a setting of
            JAX or XLA is refused (`check_settings`).
    """
    check_settings()
    if cfg.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        return
    if cfg.deterministic:
        os.environ["XLA_FLAGS"] = f"{_xla_flags()} {DETERMINISTIC}".strip()
    if _needs_gpu(cfg) and not any(importlib.util.find_spec(name) for name in PLUGINS):
        raise ConfigError(_no_gpu(cfg, "JAX is installed without GPU support"))
    # nvidia-smi's order, by which the preset was chosen; CUDA's own is by speed.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # XLA warns of every step that fills four fifths of the card, which presets are meant to do.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not any(name in os.environ for name in MEMORY_SETTINGS):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(POOL_SHARE)


def check_settings() -> None:
    """Raises ConfigError for settings of JAX or XLA that change the results or abort a command."""
    changed = [
        f"{name}={value}"
        for name, usual in SETTINGS.items()
        if (value := os.environ.get(name, "")) and value.lower() not in usual
    ]
    if changed:
        names = " ".join(setting.partition("=")[0] for setting in changed)
        raise ConfigError(
            f"{', '.join(changed)}: this JAX setting changes the results, so that a run resumed "
            f"without it would differ, or ends the run; unset it: unset {names}"
        )
    if flags := _xla_flags():
        _try_flags(flags)
    else:
        os.environ.pop("XLA_FLAGS", None)  # XLA would take blanks for a file's name


def check_determinism(cfg: Resolved, platform: str) -> None:
    """Raises ConfigError if XLA would fail at the first step, see `Resolved.scan_layers`."""
    flags = _xla_flags()
    asked = re.search(
        r"--xla_gpu_(deterministic|exclude_nondeterministic)_ops(?!=(false|0))", flags
    )
    if asked and platform == "gpu" and cfg.dtype == "bfloat16" and not cfg.scan_layers:
        raise ConfigError(
            f"XLA_FLAGS={flags}: needs --deterministic=True as well, without which cuDNN's "
            "attention fails in a deterministic program; add it, or unset XLA_FLAGS"
        )


@functools.cache
def _try_flags(flags: str) -> None:
    """Raises ConfigError for flags that XLA refuses, for which it would end this process."""
    code = "from jaxlib import xla_client as x; x.CompileOptions().executable_build_options"
    command = [sys.executable, "-c", f"{code}.debug_options"]
    tried = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    refused = re.search(r"Unknown flags? in XLA_FLAGS.*|Couldn't interpret .*", tried.stderr)
    if tried.returncode and refused:
        raise ConfigError(
            f"XLA_FLAGS={flags}: XLA refuses that ({refused[0].strip()}); correct it, or unset it"
        )


def _xla_flags() -> str:
    """The user's XLA_FLAGS, which may name a file with them."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if not flags or flags.startswith("-"):
        return flags
    try:
        return " ".join(read_file(Path(flags)).decode().split())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"XLA_FLAGS={flags}: is a file that cannot be read ({error}); name another, or flags"
        ) from None


def import_jax() -> Any:
    """The `jax` module.

    Raises:
        UserError: if the installed versions do not work together, which are listed; or for a
            setting that JAX refuses.
    """
    try:
        import jax
    except ValueError as error:
        raise UserError(
            f"JAX cannot be imported ({first_line(error)}); unset that setting, a variable that "
            "begins with JAX_"
        ) from None
    except (ImportError, RuntimeError, AttributeError) as error:  # RuntimeError: jaxlib is too old
        names = ("jax", "jaxlib", "numpy", *(name.replace("_", "-") for name in PLUGINS))
        found = ", ".join(f"{name} {has}" for name in names if (has := _installed(name)))
        raise UserError(
            f"JAX cannot be imported ({first_line(error)}); this is Python "
            f"{platform.python_version()} with {found or 'no JAX'}. Install versions that match: "
            "pip install -U -e '.[cuda]', or pip install -U -e . without a GPU"
        ) from None
    return jax


def choose_devices(cfg: Config) -> Any:
    """The `jax.Device`s to train on, those of all processes; --mesh divides a CPU into several.

    Raises:
        UserError: if JAX cannot be imported or finds no device; or if the run needs a GPU and JAX
            finds none: it never trains on the CPU instead.
    """
    jax = import_jax()
    _divide_cpu(jax, parse_mesh(cfg.mesh).devices)
    if cfg.device == "cpu":
        return jax.devices("cpu")
    try:
        return jax.devices("gpu")
    except (RuntimeError, AssertionError) as error:
        if _needs_gpu(cfg):
            raise ConfigError(_no_gpu(cfg, f"JAX finds none ({first_line(error)})")) from None
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"JAX finds no device with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} "
            f"({first_line(error)}); unset it, or use --device cpu"
        ) from None


def _divide_cpu(jax: Any, devices: int) -> None:
    """Make JAX treat the CPU as `devices` devices, unless the user has set their number.

    Not with several processes: --mesh counts the devices of all of them.
    """
    is_set = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in _xla_flags()
    if devices > 1 and not is_set and not jax.distributed.is_initialized():
        with suppress(RuntimeError):  # JAX has started already; `choose_mesh` refuses too few
            jax.config.update("jax_num_cpu_devices", min(devices, MOST_CPU_DEVICES))


def memory_in_use(device: Any) -> dict[str, float]:
    """Peak and limit of the device's memory in bytes; empty if the device does not report them."""
    stats = device.memory_stats() or {}
    names = {"peak_bytes_in_use": "memory/peak_bytes", "bytes_limit": "memory/limit_bytes"}
    return {name: float(stats[key]) for key, name in names.items() if key in stats}


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a step's speed depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
    names = (*packages, *(name.replace("_", "-") for name in PLUGINS))
    found = {name: has for name in names if (has := _installed(name))}
    return {"python": platform.python_version(), **found}


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _needs_gpu(cfg: Config) -> bool:
    return cfg.device == "gpu" or (cfg.device == "auto" and cfg.vram_gb is not None)


def _no_gpu(cfg: Config, reason: str) -> str:
    who = (
        f"preset {cfg.preset} is made for a {cfg.vram_gb} GB GPU" if cfg.vram_gb else "--device gpu"
    )
    return (
        f"{who}, but {reason}.\n"
        "  With an NVIDIA card:  pip install -e '.[cuda]'    ('.[cuda12]' for drivers before 580); "
        "nvidia-smi must list the card\n"
        "  Without one:          add --device cpu to train it on the CPU (days become "
        "months), or try --preset demo"
    )
