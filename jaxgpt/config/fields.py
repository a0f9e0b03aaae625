"""What a run is: frozen dataclasses and their checks.

A value comes from a default here, is overridden by `configs/<preset>.toml` (`presets.py`) and then
by the command line (`cli.py`), and is never changed after that. Field names are nanoGPT's.
`batch_size` is what one device holds at a time; `effective_batch_size` is what one step sees.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Suppress, arg

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import ConfigError, bad_amounts, bad_counts, nearest_multiple
from jaxgpt.config.flag_types import IntIfSet, PathIfSet, TextIfSet, TrueOrFalse
from jaxgpt.config.mesh_shape import parse_mesh

Device = Literal["auto", "gpu", "cpu"]
Dtype = Literal["auto", "bfloat16", "float32"]
Remat = Literal["auto", "none", "light", "full"]
StateDtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]
Resume = Literal["auto", "must", "never"]
# Fields of `Config` that hold a section of their own; TOML keys and flags are flat all the same.
SECTIONS = ("model", "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, the schedule and the clipping."""

    # muon: the blocks' matrices by orthogonalized momentum, the rest by AdamW, at one learning rate
    optimizer: Optimizer = "adamw"
    learning_rate: float = 6e-4  # peak, reached after the warm-up
    min_lr: float = 6e-5  # where the cosine ends
    decay_lr: TrueOrFalse = True  # False keeps the peak after the warm-up
    warmup_iters: int = 2000  # steps of linear warm-up; a run may be shorter
    lr_decay_iters: IntIfSet = None  # step at which min_lr is reached; if unset, max_iters
    weight_decay: float = 0.1  # on matrices and embeddings, never on biases and norms
    beta1: float = 0.9  # decay of AdamW's first moment
    beta2: float = 0.99  # decay of AdamW's second moment
    grad_clip: float = 1.0  # largest global norm of the averaged gradient; 0 switches it off
    # the optimizer's moments and the accumulator: bfloat16 makes 10 bytes of a parameter's 16
    state_dtype: StateDtype = "float32"

    def errors(self) -> list[str]:
        """What is wrong with it, a sentence for each error."""
        errors = [
            *bad_counts(self, "warmup_iters", least=0),
            *bad_amounts(self, "min_lr", "weight_decay", "grad_clip"),
        ]
        peak, end = self.learning_rate, self.min_lr
        if not 0 < peak < math.inf:
            errors.append(f"learning_rate {peak:g} must be finite and above 0")
        elif self.decay_lr and peak < end < math.inf:
            errors.append(
                f"min_lr {end:g} is above learning_rate {peak:g}; set it as well, usually to a "
                f"tenth: {peak / 10:g}"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                errors.append(f"{name} {getattr(self, name)} must be at least 0 and below 1")
        if self.lr_decay_iters is not None:
            errors += bad_counts(self, "lr_decay_iters")
        return errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. The sections go to the parts that need them; nobody is handed the whole."""

    # a name from configs/, or a TOML file of your own; if unset, the tier of the card found
    preset: Annotated[str, arg(help_behavior_hint="")] = "24gb"

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    # weights to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name on the Hugging Face
    # Hub, or a folder, a run's too (its newest checkpoint); they bring their architecture and
    # tokenizer, block_size may be shorter
    init_from: TextIfSet = None

    dataset: str = "fineweb"  # a folder under data/, or 'embedded' for the text in the package
    data_dir: PathIfSet = None  # folder with the token shards; if unset, data/<dataset>
    tokenizer: str = "gpt2"  # what made the tokens: gpt2, byte, or a tiktoken name

    batch_size: int = 32  # sequences one device holds at a time; halve it when memory runs out
    effective_batch_size: int = 512  # sequences in one optimizer step
    # micro-batches in one step, those of all devices together as in nanoGPT; sets
    # effective_batch_size when given in its place
    gradient_accumulation_steps: IntIfSet = None
    max_iters: int = 50000  # optimizer steps in all
    seed: int = 1337  # of the initialization, the data's order and dropout
    # skip a step whose loss or gradient norm lies this many standard deviations above those of the
    # 128 steps before it, 6 for instance; 0 skips only what is not finite
    skip_spikes: float = 0.0

    eval_interval: int = 1000  # steps between evaluations; each one also saves a checkpoint
    eval_iters: int = 200  # batches in one evaluation, of the preset's batch_size
    log_interval: int = 100  # steps between lines in the log
    checkpoint_minutes: float = 15.0  # the longest time between two checkpoints
    keep_checkpoints: int = 2  # newest checkpoints kept, besides the best
    hellaswag: TextIfSet = None  # hellaswag_val.jsonl, or 'datasets': scored at each evaluation
    lambada: TextIfSet = None  # lambada_test.jsonl, or 'datasets': scored at each evaluation
    sample_tokens: int = 200  # length of the text that an evaluation gives to TensorBoard; 0: none

    out_dir: PathIfSet = None  # everything of the run is written here; if unset, runs/<preset>
    # auto: go on from the newest checkpoint in out_dir, or start where there is none; must: go on
    # from the newest or not at all; never: start, and refuse a folder that has a run
    resume: Resume = "auto"
    # on a GPU, the same bits in every run: no autotuning, no atomics; costs speed (docs/faults.md)
    deterministic: TrueOrFalse = False
    # several GPUs: data=2,fsdp=4 has two groups of four that divide parameters, moments and
    # accumulator among them (docs/scaling.md); if unset, data-parallel on all there are
    mesh: TextIfSet = None
    device: Device = "auto"  # a preset made for a card's memory needs a GPU unless this says cpu
    dtype: Dtype = "auto"  # of the matrix products: bfloat16 on a GPU that has it, else float32
    # What the backward pass computes again to save memory: none; light: norms and GELU (some 5 %
    # more work, a third less memory); full: whole blocks (a fifth more work, the least memory);
    # auto: the first of these that fits.
    remat: Remat = "none"
    # one compiled block for all layers: many times quicker to compile, a little more memory
    scan_layers: TrueOrFalse = False
    # --batch-size auto: becomes a number when the run starts.
    auto_batch_size: Annotated[bool, Suppress] = False
    # Windows of the validation split in one evaluation: fixed when the run is created.
    eval_windows: Annotated[int | None, Suppress] = None
    # Memory in GB of the smallest card that the preset is made for; None runs anywhere.
    vram_gb: Annotated[int | None, Suppress] = None

    def __post_init__(self) -> None:
        """Check everything; raises ConfigError with every error at once."""
        errors = [
            *self.model.errors(),
            *self.optimizer.errors(),
            *bad_counts(self, "max_iters", "eval_interval", "eval_iters", "log_interval"),
            *bad_counts(self, "keep_checkpoints"),
            *bad_counts(self, "sample_tokens", "seed", least=0),
            *bad_amounts(self, "skip_spikes"),
            *self._batch_errors(),
        ]
        if self.vram_gb is not None:
            errors += bad_counts(self, "vram_gb")
        if not 0 < self.checkpoint_minutes < math.inf:
            errors.append(
                f"checkpoint_minutes {self.checkpoint_minutes:g} must be finite and above 0"
            )
        errors += [
            f"{name} {str(path)!r} has a zero byte in it, which no file system takes"
            for name, path in {"out_dir": self.out_dir, "data_dir": self.data_dir}.items()
            if "\0" in str(path)
        ]
        if self.dataset == "embedded" and self.data_dir is not None:
            errors.append(
                f"data_dir {self.data_dir} is not read with dataset 'embedded', the text in the "
                "package; give dataset another name as well"
            )
        if errors:
            raise ConfigError("\n".join(errors))

    def _batch_errors(self) -> list[str]:
        try:
            devices = self.device_count
        except ValueError as error:
            return [str(error)]
        B, effective = self.batch_size, self.effective_batch_size
        accumulation = self.gradient_accumulation_steps
        each = f"batch_size {B}" if devices == 1 else f"batch_size {B} x {devices} devices"
        errors = bad_counts(self, "batch_size")
        if accumulation is not None:
            errors += bad_counts(self, "gradient_accumulation_steps")
        errors = errors or bad_counts(self, "effective_batch_size")
        if errors:
            return errors
        held = self.held_at_once
        if accumulation is not None and accumulation * held != effective:
            return [
                f"gradient_accumulation_steps {accumulation} x {each} = "
                f"{accumulation * held} is not effective_batch_size {effective}; give one of the "
                "two"
            ]
        if effective % held:
            return [f"effective_batch_size {effective} is not a multiple of {each}; {self._near()}"]
        return []

    def _near(self) -> str:
        """What would do in place of batches that do not divide."""
        B, devices, effective = self.batch_size, self.device_count, self.effective_batch_size
        near = f"the nearest that is: {nearest_multiple(effective, self.held_at_once)}"
        if effective % devices == 0:
            return f"{near}, or take batch_size {largest_share(effective, devices, B)}"
        divided, fewer = nearest_multiple(effective, devices), _largest_divisor(effective, devices)
        share = largest_share(divided, devices, B)
        if share < B:
            near += f", {divided} with batch_size {share}"
        of_fewer = largest_share(effective, fewer, B)
        return f"{near}, or take {fewer} devices with --mesh and batch_size {of_fewer}"

    @property
    def device_count(self) -> int:
        """Devices of the mesh; 1 while that is left to the machine."""
        return parse_mesh(self.mesh).devices

    @property
    def held_at_once(self) -> int:
        """Sequences that all devices together hold at a time."""
        return self.batch_size * self.device_count

    @property
    def batch_in_words(self) -> str:
        """How the effective batch comes about."""
        over = "" if self.device_count == 1 else f"{self.device_count} devices x "
        return (
            f"batch_size {self.batch_size} x {over}{self.gradient_accumulation_steps} accumulated"
        )

    @property
    def tokens_per_step(self) -> int:
        return self.effective_batch_size * self.model.block_size


def _largest_divisor(value: int, limit: int) -> int:
    return max(d for d in divisors(value) if d <= limit)


def largest_share(effective: int, devices: int, limit: int) -> int:
    """The largest batch_size up to `limit` that makes up an effective batch on so many devices.

    1 if they do not divide it: what is said of it is then the least that is wrong.
    """
    share, rest = divmod(effective, devices)
    return 1 if rest else _largest_divisor(share, limit)


def divisors(value: int) -> list[int]:
    """Every divisor of a number, smallest first."""
    small = [k for k in range(1, math.isqrt(value) + 1) if value % k == 0]
    return sorted({d for k in small for d in (k, value // k)})


# ---------------------------------------------------------------- flat names <-> sections


def flat_fields() -> dict[str, dataclasses.Field]:
    """Every field by the flat name that TOML keys and flags use, sections opened up."""
    fields = {f.name: f for f in dataclasses.fields(Config) if f.name not in SECTIONS}
    for section in (ModelConfig, OptimizerConfig):
        fields |= {f.name: f for f in dataclasses.fields(section)}
    return fields


def with_fields(cfg: Config, **changes: Any) -> Config:
    """A copy of `cfg` with fields changed by flat name, checked again as one.

    Raises:
        ConfigError: with every error of every section.
    """
    sections = {}
    for section in SECTIONS:
        old = getattr(cfg, section)
        names = {f.name for f in dataclasses.fields(old)}
        picked = {name: changes.pop(name) for name in names & changes.keys()}
        sections[section] = dataclasses.replace(old, **picked)
    return dataclasses.replace(cfg, **sections, **changes)


def flat_values(cfg: Config) -> dict[str, Any]:
    """The configuration as one flat dict of JSON values, in the order of the fields."""
    values = dataclasses.asdict(cfg)
    for section in SECTIONS:
        values |= values.pop(section)
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
