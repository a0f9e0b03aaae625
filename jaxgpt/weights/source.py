"""Which weights a command uses: a run's checkpoint, a Hugging Face folder, or GPT-2 from the Hub.

`open_weights` checks everything it can without JAX, so that a wrong folder is reported at once;
`Weights.load` imports JAX and reads the parameters.
"""

import dataclasses
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
from jaxgpt.files import user_path
from jaxgpt.run import device as hardware
from jaxgpt.run.compile_cache import prepare_compile_cache
from jaxgpt.run.folder import CONFIG_FILE
from jaxgpt.run.integrity import DamagedError, Manifest, read_manifest, verify
from jaxgpt.run.retention import FOLDER, best_step, finished_steps, newest_intact
from jaxgpt.weights import huggingface
from jaxgpt.weights.hub import find_folder, read_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsFlags:
    """Flags of every command that loads weights."""

    out_dir: PathIfSet = None  # the run to load the weights from
    # or other weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name on the
    # Hugging Face Hub, or a folder: a run's, or one with config.json and model.safetensors
    init_from: TextIfSet = None
    # checkpoint of the run: latest (the newest intact), best (by validation loss), or a step
    checkpoint: str = "latest"
    device: Device = "auto"  # auto: a GPU if there is one
    # dtype of the matrix products; auto: bfloat16 on a GPU that has it, float16 on one of compute
    # capability 7.0 or 7.5, else float32
    dtype: Dtype = "auto"

    def errors(self) -> list[str]:
        """Every error in the flags, one sentence each."""
        errors = []
        if self.out_dir is None and self.init_from is None:
            errors.append("specify --out-dir RUN or --init-from MODEL, for example gpt2")
        if self.out_dir is not None and self.init_from is not None:
            errors.append("specify --out-dir or --init-from, not both")
        if self.checkpoint not in ("latest", "best") and not self.checkpoint.isdecimal():
            errors.append(f"--checkpoint {self.checkpoint} must be latest, best or a step")
        return errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A model whose parameters can be loaded, and what is known about it."""

    name: str  # for messages
    model: ModelConfig
    tokenizer: Tokenizer
    load: Callable[[Any], Any]  # jax.Device -> Params on that device; imports JAX
    run: Resolved | None = None  # the configuration, if the model is a run's
    step: int | None = None  # of the checkpoint, if the model is a run's
    val_loss: float | None = None  # at that step, if the run evaluated there

    def with_context(self, block_size: int) -> "Weights":
        """The same weights with a shorter context.

        Raises:
            ConfigError: if it is longer than the model's.
        """
        if block_size > self.model.block_size:
            raise ConfigError(
                f"--block-size {block_size} is above the model's context of "
                f"{self.model.block_size}; choose at most that"
            )
        model = dataclasses.replace(self.model, block_size=block_size)
        return dataclasses.replace(self, model=model)


def open_weights(flags: WeightsFlags) -> Weights:
    """The weights that the flags name; their parameters are not read yet.

    Raises:
        UserError: if they do not exist, cannot be read, or are of another kind of model.
    """
    if flags.out_dir is not None:
        return _open_run(user_path(flags.out_dir, "--out-dir"), flags.checkpoint)
    assert flags.init_from is not None
    path = user_path(flags.init_from, "--init-from")
    if (path / FOLDER).is_dir() and (path / CONFIG_FILE).is_file():
        return _open_run(path, flags.checkpoint)
    if flags.checkpoint != "latest":
        raise ConfigError(
            f"--checkpoint {flags.checkpoint}: {flags.init_from} is not a run and has no "
            "checkpoints; drop --checkpoint"
        )
    # owner/name may be on the Hub; but if there are runs in owner/, it is one of them, mistyped.
    if "/" in flags.init_from and not path.exists() and (runs := _runs_beside(path)):
        raise ConfigError(f"--init-from {flags.init_from}: no such folder{runs}")
    folder = find_folder(flags.init_from)
    model, tokenizer = read_folder(folder, flags.init_from)

    def load(device: Any) -> Any:
        import jax

        # A copy, never an alias of host memory, because a training step donates its parameters.
        return jax.device_put(huggingface.load_params(folder, model), device, may_alias=False)

    return Weights(
        name=flags.init_from,
        model=model,
        tokenizer=tokenizer,
        load=load,
    )


def prepare_device(device: Device, dtype: Dtype) -> tuple[Any, Dtype]:
    """(jax.Device, dtype of the matrix products), 'auto' resolved; imports JAX.

    Raises:
        ConfigError: if there is no such device, or it cannot compute in that dtype.
    """
    # Allocate as needed, not most of the card up front: a run may be training on it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cfg = Config(device=device)
    hardware.prepare_environment(cfg)
    prepare_compile_cache(warn)
    chosen = hardware.choose_devices(cfg)[0]
    from jaxgpt.model.attention import compute_capability

    return chosen, choose_dtype(dtype, chosen.platform, compute_capability(chosen))


def build_network(weights: Weights, device: Any, dtype: str) -> Any:
    """The network as an `nnx.GraphDef`, with the fastest attention on `device`; imports JAX."""
    from jaxgpt.model.attention import attention_on
    from jaxgpt.model.network import build_model

    model = weights.model
    attend, _ = attention_on(device, dtype, model.head_width)
    return build_model(model, dtype, attend)


def _open_run(out_dir: Path, which: str) -> Weights:
    if not (out_dir / CONFIG_FILE).is_file():
        what = "not a run" if out_dir.is_dir() else "no such folder"
        runs = _runs_beside(out_dir)
        raise ConfigError(f"--out-dir {out_dir}: {what}{runs}; train one: python -m jaxgpt.train")
    if not (out_dir / FOLDER).exists() and huggingface.has_weights(out_dir):
        raise ConfigError(
            f"--out-dir {out_dir} is a Hugging Face model, not a run; load it in train, sample "
            f"and evaluate with --init-from {out_dir}"
        )
    cfg = load_config(out_dir / CONFIG_FILE)
    step, val_loss = _choose_step(out_dir, which)

    def load(device: Any) -> Any:
        import jax

        from jaxgpt.model.network import init_params
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
        tokenizer=load_tokenizer(cfg.tokenizer, out_dir),
        load=load,
        run=cfg,
        step=step,
        val_loss=val_loss,
    )


def _runs_beside(folder: Path) -> str:
    """The end of a message about a run that is not there: the runs beside it, if there are any."""
    near = sorted(str(path.parent) for path in folder.parent.glob(f"*/{CONFIG_FILE}"))
    return f"; runs beside it: {', '.join(near[:8])}" if near else ""


def _choose_step(out_dir: Path, which: str) -> tuple[int, float | None]:
    """(step, validation loss) of the checkpoint to use, verified.

    Only for `latest` may it be an older one.
    """
    folder = out_dir / FOLDER
    step = newest_intact(folder, verify, warn, rename=False) if which == "latest" else None
    if step is not None:
        return step, _check(folder / str(step), read_manifest).val_loss
    if which == "best":  # a checkpoint with a damaged manifest might be the best one
        for other in finished_steps(folder):
            _check(folder / str(other), read_manifest)
    step = _named_step(out_dir, which)
    return step, _check(folder / str(step), verify).val_loss


def _check(checkpoint: Path, check: Callable[[Path], Manifest]) -> Manifest:
    try:
        return check(checkpoint)
    except DamagedError as error:
        raise ConfigError(
            f"checkpoint {checkpoint.name} is damaged: {error}; choose another with --checkpoint"
        ) from None


def _named_step(out_dir: Path, which: str) -> int:
    saved = {str(step): step for step in finished_steps(out_dir / FOLDER)}
    if not saved:
        raise ConfigError(
            f"{out_dir} has no checkpoint yet; run its python -m jaxgpt.train command again"
        )
    listed = f"it has checkpoints of steps {', '.join(saved)}"
    if which == "best":
        best = best_step(out_dir / FOLDER)
        if best is None:
            raise ConfigError(
                f"--checkpoint best: {out_dir} has no checkpoint with a validation loss; {listed}"
            )
        return best[0]
    if which not in saved:
        raise ConfigError(f"--checkpoint {which}: {out_dir} has no such checkpoint; {listed}")
    return saved[which]
