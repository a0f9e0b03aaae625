"""Whose weights a command works with: a run's checkpoint, a Hugging Face folder, or GPT-2 itself.

Everything up to `Weights.load` happens before JAX is imported, so that a wrong folder is answered
at once.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, Device, Dtype
from jaxgpt.config.flag_types import PathIfSet, TextIfSet
from jaxgpt.config.resolved import Resolved, choose_dtype, load_config
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.errors import warn
from jaxgpt.run import device as hardware
from jaxgpt.run.compile_cache import prepare_compile_cache
from jaxgpt.run.folder import CONFIG_FILE
from jaxgpt.run.metrics_file import METRICS_FILE, read_metrics
from jaxgpt.run.retention import FOLDER, finished_steps
from jaxgpt.weights import huggingface
from jaxgpt.weights.hub_folder import find_folder, read_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsFlags:
    """Flags of every command that reads weights."""

    out_dir: PathIfSet = None  # the run whose weights are used
    # or weights from elsewhere: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name on the
    # Hugging Face Hub, or a folder: a run's, or one with config.json and model.safetensors
    init_from: TextIfSet = None
    checkpoint: str = "latest"  # which of the run's: latest, best (by validation loss), or a step
    device: Device = "auto"  # auto: a GPU if there is one
    dtype: Dtype = "auto"  # of the matrix products: bfloat16 on a GPU that has it, else float32

    def errors(self) -> list[str]:
        """What is wrong with them, a sentence for each error."""
        errors = []
        if (self.out_dir is None) == (self.init_from is None):
            errors.append(
                "whose weights? give one of --out-dir RUN and --init-from gpt2 (or a folder)"
            )
        if self.checkpoint not in ("latest", "best") and not self.checkpoint.isdecimal():
            errors.append(f"--checkpoint {self.checkpoint} is not latest, best or a step")
        return errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A model that can be loaded, and what is known of it."""

    name: str  # what messages call it
    model: ModelConfig
    tokenizer: Tokenizer
    load: Callable[[Any], Any]  # a jax.Device -> Params on it; imports JAX
    run: Resolved | None = None  # the run's configuration, if it is a run's
    step: int | None = None
    val_loss: float | None = None  # what the run logged at that step


def open_weights(flags: WeightsFlags) -> Weights:
    """What the flags name, with everything checked that can be without reading the weights.

    Raises:
        UserError: if it is not there, cannot be read, or is another kind of model.
    """
    if flags.out_dir is not None:
        return _open_run(Path(os.path.expanduser(flags.out_dir)), flags.checkpoint)
    assert flags.init_from is not None
    path = Path(os.path.expanduser(flags.init_from))
    if (path / FOLDER).is_dir() and (path / CONFIG_FILE).is_file():
        return _open_run(path, flags.checkpoint)
    if flags.checkpoint != "latest":
        raise ConfigError(
            f"--checkpoint {flags.checkpoint}: {flags.init_from} is no run, and has no checkpoints"
        )
    folder = find_folder(flags.init_from)
    model, tokenizer = read_folder(folder)
    return Weights(
        name=flags.init_from,
        model=model,
        tokenizer=tokenizer,
        load=lambda device: _on_device(huggingface.load_params(folder, model), device),
    )


def prepare_device(flags: WeightsFlags) -> tuple[Any, str]:
    """The device and the dtype to compute with; imports JAX.

    Raises:
        ConfigError: if there is no such device.
    """
    # A run may be training on the same card: take what is needed, not all there is.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cfg = Config(device=flags.device)
    hardware.prepare_environment(cfg)
    prepare_compile_cache(warn)
    device = hardware.choose_devices(cfg)[0]
    from jaxgpt.model.attention import compute_capability

    capability = compute_capability(device)
    return device, choose_dtype(flags.dtype, device.platform, capability)


def build_network(weights: Weights, device: Any, dtype: str) -> Any:
    """The network as an `nnx.GraphDef`, with the attention for `device`; imports JAX."""
    from jaxgpt.model.attention import compute_capability, pick_attention
    from jaxgpt.model.gpt import build_gpt

    model = weights.model
    capability = compute_capability(device)
    attend, _ = pick_attention(device.platform, capability, dtype, model.n_embd // model.n_head)
    return build_gpt(model, dtype, attend)


def _open_run(out_dir: Path, which: str) -> Weights:
    if not (out_dir / CONFIG_FILE).is_file():
        what = "holds no run" if out_dir.is_dir() else "no such folder"
        near = sorted(str(path.parent) for path in out_dir.parent.glob(f"*/{CONFIG_FILE}"))
        there = f"; there is: {', '.join(near[:8])}" if near else ""
        raise ConfigError(f"--out-dir {out_dir}: {what}{there}; train one: python -m jaxgpt.train")
    if not (out_dir / FOLDER).exists() and huggingface.has_weights(out_dir):
        raise ConfigError(
            f"--out-dir {out_dir} holds no run but a Hugging Face model; train, sample and "
            f"evaluate take it as --init-from {out_dir}"
        )
    cfg = load_config(out_dir / CONFIG_FILE)
    steps = finished_steps(out_dir / FOLDER)
    losses = {
        record["step"]: record["val/loss"]
        for record in read_metrics(out_dir / METRICS_FILE)
        if math.isfinite(record.get("val/loss", math.nan))
    }
    step = _choose_step(out_dir, which, steps, losses)

    def load(device: Any) -> Any:
        import jax

        from jaxgpt.model.gpt import init_params
        from jaxgpt.run.restore import load_params

        sharding = jax.sharding.SingleDeviceSharding(device)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(lambda: init_params(cfg.model, jax.random.key(0))),
        )
        return load_params(out_dir, step, like)

    return Weights(
        name=f"{out_dir}, step {step:,}",
        model=cfg.model,
        tokenizer=load_tokenizer(cfg.tokenizer),
        load=load,
        run=cfg,
        step=step,
        val_loss=losses.get(step),
    )


def _choose_step(out_dir: Path, which: str, steps: list[int], losses: dict[int, float]) -> int:
    if not steps:
        raise ConfigError(f"{out_dir} has no checkpoint yet; train it on: python -m jaxgpt.train")
    if which == "latest":
        return steps[-1]
    listed = f"there are checkpoints of steps {', '.join(map(str, steps))}"
    if which == "best":
        scored = [(losses[step], step) for step in steps if step in losses]
        if not scored:
            raise ConfigError(f"{out_dir} has logged no validation loss of a checkpoint; {listed}")
        return min(scored)[1]
    if int(which) not in steps:
        raise ConfigError(f"--checkpoint {which}: {out_dir} has none of that step; {listed}")
    return int(which)


def _on_device(params: Any, device: Any) -> Any:
    import jax

    # Copies, because a training step donates them.
    return jax.device_put(params, device, may_alias=False)
