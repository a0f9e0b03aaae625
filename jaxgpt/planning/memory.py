"""The memory that a training step needs on a card, and a run on the host.

`need_of` reads XLA's figure of a compiled step, the very one that `train` runs. `estimate` is
arithmetic, for machines without the compiler and for comparing a hundred shapes.
`benchmarks/measure_memory.py` compares the two, and a test keeps them within ESTIMATE_ERROR.

Neither includes memory outside JAX's pool (the CUDA context, the desktop); `capacity_of` leaves a
share of the card for it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from jaxgpt.config.architecture import ModelConfig, parameter_sizes
from jaxgpt.config.fields import Remat
from jaxgpt.config.resolved import BFLOAT16_FROM, Resolved
from jaxgpt.errors import UserError
from jaxgpt.model.attention import cudnn_attention, pick_attention
from jaxgpt.model.chunked_attention import CHUNK
from jaxgpt.model.loss import CHUNK_ROWS
from jaxgpt.model.remat import REMATS
from jaxgpt.planning import target
from jaxgpt.planning.gpus import GIB, POOL_SHARE, Gpu
from jaxgpt.training.build import Training, build_training, compile_train_step
from jaxgpt.training.groups import is_vector
from jaxgpt.training.layout import Layout
from jaxgpt.training.optimizer import OPTIMIZERS

# Left free in the pool, for cuBLAS's workspace and for fragmentation.
RESERVE_BYTES = GIB // 2
# Largest deviation of `estimate` from the compiler over benchmarks/results/memory.json.
ESTIMATE_ERROR = 0.10


class TooLargeError(UserError):
    """A step, an evaluation or a checkpoint does not fit; the message names settings that do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that a run needs, and how they were determined."""

    peak_bytes: int  # on the device, at the peak of a step
    host_bytes: int  # in the host's memory, while a checkpoint is written
    breakdown_bytes: dict[str, int]  # of the peak; 'workspace' is the remainder
    method: Literal["compiled", "estimated"]

    def fits(self, capacity: int) -> bool:
        """Whether a pool of `capacity` bytes suffices; an estimate leaves a margin."""
        margin = ESTIMATE_ERROR * self.peak_bytes if self.method == "estimated" else 0
        return self.peak_bytes + margin + RESERVE_BYTES <= capacity


def capacity_of(gpu: Gpu) -> int:
    """Bytes of JAX's pool on a card: the share that `train` takes of what the driver reports."""
    return int(gpu.memory_bytes * POOL_SHARE)


def host_bytes(cfg: Resolved) -> int:
    """Bytes of a checkpoint's copy on the host: all of the state but the empty accumulator."""
    kept = state_bytes(cfg, shares=1)
    return kept["parameters"] + kept["optimizer"]


def state_bytes(cfg: Resolved, shares: int | None = None) -> dict[str, int]:
    """Bytes of what each device keeps: parameters, the optimizer's moments, the accumulator.

    Matrices and embeddings are sharded over `shares` devices, by default those of the run's fsdp.
    """
    shares = shares or cfg.mesh.fsdp
    moments_of = OPTIMIZERS[cfg.optimizer.optimizer].moments
    N = moments = 0
    for path, size in parameter_sizes(cfg.model).items():
        on_each = size if is_vector(path) else size // shares
        N += on_each
        moments += on_each * moments_of(path)
    width = jnp.dtype(cfg.optimizer.state_dtype).itemsize
    return {"parameters": 4 * N, "optimizer": width * moments, "accumulator": width * N}


# ---------------------------------------------------------------- estimated


def estimate(cfg: Resolved) -> Need:
    """A step's memory by arithmetic."""
    parts = {**state_bytes(cfg), **_transient_bytes(cfg)}
    return Need(
        peak_bytes=sum(parts.values()),
        host_bytes=host_bytes(cfg),
        breakdown_bytes=parts,
        method="estimated",
    )


STACKED = 0.85  # share of the weights that a scan over layers copies
SCORES_AT_ONCE = 3  # float32 arrays as large as a chunk's scores, without flash attention
# Bytes per token, unit of width and layer that float16's float32 residual stream takes in addition.
STREAM: dict[Remat, int] = {"none": 4, "light": 4, "full": 2}


def _transient_bytes(cfg: Resolved) -> dict[str, int]:
    m, kept = cfg.model, REMATS[cfg.remat].kept
    assert m.vocab_size is not None
    width = jnp.dtype(cfg.dtype).itemsize
    rows = cfg.batch.batch_size * m.block_size
    attend, _ = pick_attention("gpu", BFLOAT16_FROM, cfg.dtype, m.head_width)
    chunk = 0 if attend is cudnn_attention else min(CHUNK, m.block_size)
    scores = 4 * cfg.batch.batch_size * m.n_head * chunk * m.block_size
    BTD = rows * m.n_embd * width / 2
    logits = 2 * width * min(rows, CHUNK_ROWS) * m.vocab_size
    copy = width if cfg.dtype != "float32" else 0  # of a weight, for the products
    VD = m.vocab_size * m.n_embd
    head = VD * (4 + copy)  # the head's gradient in float32, its copy for the products
    head += 0 if m.tied_head else 4 * VD  # the embedding's gradient
    N, fsdp = m.parameter_count(), cfg.mesh.fsdp
    copies = kept.copies * copy * N
    if cfg.scan_layers:  # shards are stacked as they are, in float32
        copies += STACKED * (copy * N if fsdp == 1 else 4 * N / fsdp)
    per_layer = kept.per_layer * BTD
    if cfg.dtype == "float16":  # the residual stream is float32
        per_layer += STREAM[cfg.remat] * BTD
    per_layer += rows * width * _kept_beyond_gpt2(m, cfg.remat)
    per_layer += kept.dropout * BTD if m.dropout else 0
    at_the_head = kept.at_the_head * BTD + logits
    in_a_block = kept.in_a_block * BTD + SCORES_AT_ONCE * scores
    return {
        "activations": int(m.n_layer * per_layer + max(in_a_block, at_the_head) - logits),
        "logits": int(logits),
        "workspace": int(head + copies),
    }


def _kept_beyond_gpt2(m: ModelConfig, remat: Remat) -> int:
    """Elements per token and layer that a network keeps beyond GPT-2's, which `Kept` counts."""
    if not m.has("rope_theta") or remat == "full":
        return 0
    D, H, F = m.n_embd, m.head_width, m.mlp_hidden
    both = (m.n_head + m.kv_heads) * H  # queries and keys
    products = 2 * both - 4 * D + 2 * F - 4 * D  # q, k, v, attention's output; gate, up
    # `none` also keeps the rotated queries and keys, and the MLP's activation.
    return products if remat == "light" else products + both + F - 4 * D


# ---------------------------------------------------------------- compiled


def build_for(
    cfg: Resolved,
    device: Any,
    compiler_options: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
) -> Training:
    """The training that `cfg` describes, on `device` or over `layout`: what `train` runs and `plan`
    measures."""
    return build_training(
        cfg.model,
        cfg.optimizer,
        max_iters=cfg.asked.max_iters,
        accumulation=cfg.batch.accumulation,
        dtype=cfg.dtype,
        seed=cfg.asked.seed,
        device=device,
        layout=layout,
        remat=cfg.remat,
        scan_layers=cfg.scan_layers,
        skip_spikes=cfg.asked.skip_spikes,
        compiler_options=compiler_options,
    )


def need_of(cfg: Resolved, train_step: Any, eval_step: Any = None) -> Need:
    """Memory of compiled steps. The whole state stays in memory during an evaluation."""
    kept = state_bytes(cfg)
    peak = _bytes_of(train_step)
    if eval_step is not None:
        peak = max(peak, _bytes_of(eval_step) + sum(kept.values()) - kept["parameters"])
    parts = {**kept, **_transient_bytes(cfg)}
    del parts["workspace"]
    # The compiler reports only the total: the estimated items share what the exact ones leave.
    left = peak - sum(kept.values())
    parts["logits"] = min(parts["logits"], left)
    parts["activations"] = min(parts["activations"], left - parts["logits"])
    parts["workspace"] = peak - sum(parts.values())
    return Need(
        peak_bytes=peak,
        host_bytes=host_bytes(cfg),
        breakdown_bytes=parts,
        method="compiled",
    )


def _bytes_of(compiled: Any) -> int:
    # XLA's own peak is a little less, but temporaries are allocated as one block.
    stats = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
    )


def compile_ahead(
    cfg: Resolved,
    device: Any,
    layout: Layout | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Any:
    """The step of `cfg`, compiled for cards that need not be present."""
    options = {**target.AHEAD_OF_TIME_OPTIONS, **(compiler_options or {})}
    training = build_for(cfg, device, options, layout)
    return compile_train_step(training, cfg.batch.accumulation, cfg.batch.global_micro_batch)


# ---------------------------------------------------------------- this machine


def device_limit(device: Any) -> int | None:
    """Bytes of JAX's pool on `device`; of the host's memory for a CPU; None if unknown."""
    if device.platform == "cpu":
        return host_available()
    return (device.memory_stats() or {}).get("bytes_limit")


def host_available() -> int | None:
    """Bytes of memory still available to this process: on the machine, or in its cgroup."""
    available = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available += [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            # The page cache counts as used, but is freed when memory is needed.
            stats = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stats["inactive_file"])
            available.append(int(limit) - used)
    except (OSError, ValueError, KeyError):
        pass
    return min(available, default=None)
