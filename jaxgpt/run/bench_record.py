"""The record of a benchmark: its settings and its figures."""

import datetime
import statistics
from collections.abc import Sequence
from typing import Any

from jaxgpt.config.resolved import Resolved
from jaxgpt.planning.gpus import GIB, lookup_gpu
from jaxgpt.planning.speed import model_flops_per_token, peak_of, reached_mfu
from jaxgpt.run import device as hardware
from jaxgpt.run.console import print_table

MFU_FORMULA = "nanoGPT's: 6 N + 12 L D T FLOPs a token, on the card's dense half-precision peak"


def describe_run(cfg: Resolved, device: Any) -> dict[str, Any]:
    """The settings of a benchmark: the run, the device, the versions and the date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "versions": hardware.versions(),
        **cfg.summary(),
    }


def speeds(cfg: Resolved, device: Any, step_seconds: Sequence[float]) -> dict[str, Any]:
    """Step time (median over windows, and each window), tokens/s and MFU."""
    seconds = statistics.median(step_seconds)
    tokens_per_second = cfg.tokens_per_step / seconds
    peak_flops = peak_of(lookup_gpu(device.device_kind), cfg.dtype, cfg.batch.devices)
    mfu = None if peak_flops is None else reached_mfu(tokens_per_second, cfg.model, peak_flops)
    return {
        "step_ms": 1e3 * seconds,
        "step_ms_windows": [1e3 * s for s in step_seconds],
        "tokens_per_second": tokens_per_second,
        "flops_per_token": model_flops_per_token(cfg.model),
        "mfu": mfu,
        "mfu_peak_flops": peak_flops,
        "mfu_formula": None if mfu is None else MFU_FORMULA,
    }


def memory(device: Any, compiled: int) -> dict[str, Any]:
    """Peak bytes: of the whole process where the device reports it, and of the compiled step."""
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "peak_bytes": compiled if used is None else used,
        "peak_bytes_from": "compiled memory_analysis" if used is None else "memory_stats",
        "compiled_peak_bytes": compiled,
    }


def print_result(result: dict[str, Any]) -> None:
    """Print a record as a table."""
    r = result
    spread = (max(r["step_ms_windows"]) - min(r["step_ms_windows"])) / r["step_ms"]
    rows = {
        "device": f"{r['device']} ({r['platform']}), jax {r['versions']['jax']}",
        "model": f"{r['arch']}, {r['parameters']:,} parameters, {r['padding_parameters']:,} of "
        f"them padding, {r['dtype']}, remat {r['remat']}",
        "attention": r["attention"],
        "step": f"{r['batch']}; {r['tokens_per_step']:,} tokens of {r['data']}",
        "step time": f"{r['step_ms']:,.1f} ms, the median of {len(r['step_ms_windows'])} windows "
        f"of {r['steps_per_window']} steps, spread {spread:.1%}",
        "speed": f"{r['tokens_per_second']:,.0f} tokens/s",
        "MFU": "unknown: the card's half-precision peak is not known, or the dtype is float32"
        if r["mfu"] is None
        else f"{r['mfu']:.1%} of {r['mfu_peak_flops'] / 1e12:g} TFLOP/s, by {r['mfu_formula']}",
        "peak memory": f"{r['peak_bytes'] / GIB:.2f} GiB by {r['peak_bytes_from']}"
        f", {r['compiled_peak_bytes'] / GIB:.2f} GiB compiled",
        "start": f"{r['compile_seconds']:.1f} s compiling "
        f"({r['programs_from_cache']} programs from the cache), {r['first_step_seconds']:.1f} s to "
        "the end of the first step",
    }
    print_table(f"jaxgpt bench {r['preset']}", rows)
