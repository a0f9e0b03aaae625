"""Compile for a card that is not in this machine.

XLA's GPU compiler comes with JAX's CUDA plugin and runs on the CPU. Given a description of a card,
it makes the program that card would run, cuDNN's flash attention included, and reports its memory.
Only autotuning, which needs the card, is missing.
"""

import importlib.util
import os
from typing import Any

from jaxgpt.errors import UserError, first_line
from jaxgpt.planning.gpus import Gpu

CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# Compiler options in addition to a training step's own: autotuning needs the card.
AHEAD_OF_TIME_OPTIONS = {"xla_gpu_autotune_level": 0}
OLDEST = (7, 5)  # compute capability that CUDA 13 still compiles for
# Per multiprocessor: bytes of shared memory, the most that one block may use, resident threads.
# CUDA C++ Programming Guide, table of technical specifications per compute capability.
CHIPS = {
    (7, 5): (65536, 65536, 1024),
    (8, 0): (167936, 166912, 2048),
    (8, 6): (102400, 101376, 1536),
    (8, 9): (102400, 101376, 1536),
    (9, 0): (233472, 232448, 2048),
    (10, 0): (233472, 232448, 2048),
    (10, 3): (233472, 232448, 2048),
    (12, 0): (102400, 101376, 1536),
}
# It may affect the compiled program's speed, but not its memory.
L2_CACHE_BYTES = 6 * 2**20
CUDNN = (9, 10, 0)
CARDS_PER_HOST = 8  # connected by NVLink


class NoCompilerError(UserError):
    """This machine cannot compile for a card; the message says why."""


def prepare_environment() -> None:
    """Keep JAX from looking for a card; call before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # Hides XLA's warnings about a step that nearly fills the card, and about slow compilation.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def obstacle(gpu: Gpu) -> str | None:
    """Why steps cannot be compiled for `gpu` on this machine, None if they can. Imports no JAX."""
    if not any(importlib.util.find_spec(name) for name in CUDA_PLUGINS):
        return "the CUDA compiler is not installed: pip install -e '.[plan]'"
    if gpu.compute_capability < OLDEST:
        return f"the CUDA compiler no longer targets this card, {gpu.name}"
    return None


def card_devices(gpu: Gpu, count: int = 1) -> Any:
    """`count` connected `jax.Device`s that programs can be lowered and compiled for, not run on.

    Raises:
        NoCompilerError: if the plugin is missing, does not start, or does not know the card.
    """
    reason = obstacle(gpu)
    if reason:
        raise NoCompilerError(reason)
    from jax.experimental import topologies

    hosts, remainder = divmod(count, CARDS_PER_HOST)
    shape = f"1x1x{count}" if remainder or not hosts else f"1x{hosts}x{CARDS_PER_HOST}"
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=target_config(gpu), topology=shape
        )
    except Exception as error:  # the plugin raises several types, all with XLA's message
        raise NoCompilerError(f"the CUDA compiler does not start ({first_line(error)})") from None
    return topology.devices


def target_config(gpu: Gpu) -> str:
    """The card as XLA's GpuTargetConfigProto in text format."""
    major, minor = gpu.compute_capability
    shared, shared_by_block, threads = CHIPS[gpu.compute_capability]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_by_block}
  core_count: {gpu.sms} fpus_per_core: 128 clock_rate_ghz: {gpu.boost_hz / 1e9}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {gpu.bandwidth_bytes_per_second:.0f} l2_cache_size: {L2_CACHE_BYTES}
  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
device_description_str: "{gpu.name}"
"""
