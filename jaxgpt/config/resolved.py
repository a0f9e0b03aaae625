"""The resolved configuration of a run, with every value decided. Made once, by `resolve`.

    asked for (`Config`)  ->  resolved (`Resolved`)  ->  running

The tokenizer decides the vocabulary, the devices the mesh and the dtype, and a resumed run keeps
some of its own values. If `batch_size` or `remat` is auto, it first gets the value that needs the
least memory; `planning/fit.py` then makes a copy with the fastest that fits.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jaxgpt.config.architecture import ModelConfig, first_axes, padded_vocab_size
from jaxgpt.config.batch import Batch, divide_batch, divisors
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import (
    Config,
    Dtype,
    Remat,
    flat_fields,
    flat_values,
    with_fields,
)
from jaxgpt.config.mesh_shape import MeshShape, parse_mesh
from jaxgpt.config.mixture import End
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.config.presets import config_from
from jaxgpt.files import FormatError, decode_json, read_file

# Keys of config.json that are not read: the first is derived, older versions wrote the second.
NOT_READ = {"gradient_accumulation_steps", "auto_batch_size"}
# Compute capabilities from which tensor cores multiply in these dtypes.
BFLOAT16_FROM, FLOAT16_FROM = (8, 0), (7, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """Everything about a run; each module gets the section that it needs."""

    asked: Config  # for the fields that nothing but the user decides
    model: ModelConfig  # vocab_size and n_vocab set
    optimizer: OptimizerConfig  # lr_decay_iters set
    init_from: str | None
    tokenizer: str
    batch: Batch
    mesh: MeshShape
    dtype: Dtype  # never auto
    remat: Remat  # none, light or full
    eval_windows: int
    end: End | None = None  # where a source ends, with --at-end stop

    @property
    def max_iters(self) -> int:
        """Steps of the whole run."""
        return last_step(self.asked, self.end)

    @property
    def out_dir(self) -> Path:
        """The run's folder."""
        assert self.asked.out_dir is not None, "set by the command line"
        return self.asked.out_dir

    @property
    def tokens_per_step(self) -> int:
        return self.batch.effective * self.model.block_size

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_per_step * self.max_iters

    @property
    def scan_layers(self) -> bool:
        """One block is compiled for all layers, as asked, or because determinism needs it.

        XLA cannot run a deterministic program that holds the backward pass of cuDNN's attention
        more than once: it fails at the first step (seen with jax 0.11.2; openxla/xla#46500).
        """
        return self.asked.scan_layers or (self.asked.deterministic and self.dtype == "bfloat16")

    def with_choice(self, batch_size: int, remat: Remat) -> "Resolved":
        """A copy with another micro-batch and remat; the training is the same."""
        batch = divide_batch(self.batch.effective, batch_size, self.batch.devices)
        return dataclasses.replace(self, batch=batch, remat=remat)

    def summary(self) -> dict[str, Any]:
        """The run's size, shape and way of computing as JSON values, for `plan` and `bench`."""
        m = self.model
        return {
            "preset": self.asked.preset,
            "arch": m.arch,
            "parameters": m.parameter_count(),
            "padding_parameters": m.padding_parameters,
            "n_layer": m.n_layer,
            "n_head": m.n_head,
            "n_embd": m.n_embd,
            "block_size": m.block_size,
            "vocab_size": m.vocab_size,
            "bias": m.bias,
            "dropout": m.dropout,
            "mesh": str(self.mesh) if self.mesh.devices > 1 else None,
            "devices": self.batch.devices,
            "batch": str(self.batch),
            "batch_size": self.batch.batch_size,
            "effective_batch_size": self.batch.effective,
            "gradient_accumulation_steps": self.batch.accumulation,
            "tokens_per_step": self.tokens_per_step,
            "dtype": self.dtype,
            "optimizer": self.optimizer.optimizer,
            "state_dtype": self.optimizer.state_dtype,
            "remat": self.remat,
            "scan_layers": self.scan_layers,
            "deterministic": self.asked.deterministic,
        }

    def flat(self) -> dict[str, Any]:
        """Every field by its flat name as a JSON value: what config.json and checkpoints hold."""
        return flat_values(
            with_fields(
                self.asked,
                **{f.name: getattr(self.model, f.name) for f in dataclasses.fields(self.model)},
                **dataclasses.asdict(self.optimizer),
                init_from=self.init_from,
                tokenizer=self.tokenizer,
                batch_size=self.batch.batch_size,
                mesh=str(self.mesh) if self.mesh.devices > 1 else None,
                dtype=self.dtype,
                remat=self.remat,
                eval_windows=self.eval_windows,
            )
        ) | {"gradient_accumulation_steps": self.batch.accumulation}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a run's model comes from: its preset, --init-from, or an earlier start of the run."""

    model: ModelConfig
    tokenizer: str
    init_from: str | None = None
    saved: Resolved | None = None  # the run that is resumed

    @classmethod
    def of(cls, asked: Config) -> "Origin":
        """The origin of a new run with random weights."""
        return cls(model=asked.model, tokenizer=asked.tokenizer)


def resolve(
    asked: Config,
    origin: Origin,
    *,
    n_vocab: int,
    mesh: MeshShape,
    dtype: Dtype,
    end: End | None = None,
) -> Resolved:
    """`asked`, resolved for a tokenizer and devices.

    Args:
        asked: what argv and TOML say.
        origin: where the model comes from, and the run that is resumed.
        n_vocab: ids of the tokenizer.
        mesh: the devices of the run.
        dtype: of the matrix products, on these devices.
        end: where a source ends, if the run stops there.

    Raises:
        ConfigError: if the vocabulary is too small for the tokenizer, the devices do not divide
            the effective batch, or fsdp does not divide the model.
    """
    saved = origin.saved
    rows = origin.model.vocab_size
    if rows is None:
        rows = saved.model.vocab_size if saved else padded_vocab_size(n_vocab)
    model = dataclasses.replace(origin.model, vocab_size=rows, n_vocab=n_vocab)
    if errors := [*model.errors(), *_undivided(model, mesh)]:
        raise ConfigError("\n".join(errors))
    batch = divide_batch(asked.effective_batch_size, asked.batch_size_or(1), mesh.devices)
    windows = asked.eval_windows or asked.windows_in(asked.eval_iters)
    return Resolved(
        asked=asked,
        model=model,
        optimizer=dataclasses.replace(asked.optimizer, lr_decay_iters=decay_end(asked, saved, end)),
        init_from=origin.init_from,
        tokenizer=origin.tokenizer,
        batch=batch,
        mesh=mesh,
        dtype=dtype,
        remat="full" if asked.remat == "auto" else asked.remat,
        eval_windows=windows if saved is None else saved.eval_windows,
        end=end,
    )


def last_step(asked: Config, end: End | None) -> int:
    """Steps of the whole run: as many as asked for, or fewer where a source ends."""
    return asked.max_iters if end is None else end.step


def decay_end(asked: Config, saved: Resolved | None, end: End | None = None) -> int:
    """The step at which the learning rate reaches min_lr: a resumed run keeps its own if unset."""
    inherited = saved.optimizer.lr_decay_iters if saved else None
    return asked.optimizer.lr_decay_iters or inherited or last_step(asked, end)


def choose_dtype(asked: Dtype, platform: str, compute_capability: tuple[int, int]) -> Dtype:
    """The dtype of the matrix products on a device, 'auto' resolved.

    Raises:
        ConfigError: if bfloat16 is asked for on a GPU without instructions for it; XLA would accept
            it and emulate them slowly.
    """
    has_bfloat16 = platform == "gpu" and compute_capability >= BFLOAT16_FROM
    if asked == "bfloat16" and platform == "gpu" and not has_bfloat16:
        raise ConfigError(
            "dtype bfloat16 needs a GPU of compute capability 8.0 (Ampere or newer), and this one "
            f"has {compute_capability[0]}.{compute_capability[1]}; leave it out, or use float16"
        )
    if asked != "auto":
        return asked
    has_float16 = platform == "gpu" and compute_capability >= FLOAT16_FROM
    return "bfloat16" if has_bfloat16 else "float16" if has_float16 else "float32"


def _undivided(model: ModelConfig, mesh: MeshShape) -> list[str]:
    """A sentence for each size that fsdp must divide but does not."""
    sizes = {name: size for name, size in first_axes(model).items() if size % mesh.fsdp}
    return [
        f"--mesh fsdp={mesh.fsdp} does not divide {name} {size}; the nearest that do: "
        + ", ".join(map(str, sorted(divisors(size), key=lambda d: abs(d - mesh.fsdp))[:3]))
        for name, size in sizes.items()
    ]


# ---------------------------------------------------------------- config.json


def load_config(path: Path) -> Resolved:
    """Read back the `config.json` of a run.

    Raises:
        ConfigError: if the file cannot be read, or a key or value in it is unknown.
    """
    try:
        values = decode_json(read_file(path), dict[str, Any])
    except (OSError, FormatError) as error:
        raise ConfigError(f"{path} cannot be read as a run's configuration: {error}") from None
    return resolved_from(values, str(path))


def resolved_from(values: dict[str, Any], source: str) -> Resolved:
    """A run's configuration from its flat values, as `Resolved.flat` and older versions wrote them.

    Raises:
        ConfigError: if a key or value is unknown; the message names `source`.
    """
    values = {name: value for name, value in values.items() if name not in NOT_READ}
    asked = config_from(values, source, flat_fields().keys())
    n_vocab, mesh = asked.model.n_vocab, parse_mesh(asked.mesh)
    origin = Origin(model=asked.model, tokenizer=asked.tokenizer, init_from=asked.init_from)
    missing = [name for name in ("vocab_size", "n_vocab", "eval_windows") if not values.get(name)]
    if n_vocab is None or missing:
        raise ConfigError(
            f"{source}: has no {' and no '.join(missing)}, so it is not a run's; name a run's "
            "folder"
        )
    return resolve(asked, origin, n_vocab=n_vocab, mesh=mesh, dtype=asked.dtype)
