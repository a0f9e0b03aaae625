"""The configuration of a run: frozen dataclasses, the roles of each field, and their checks.

A value comes from a default here, is overridden by `configs/<preset>.toml` (`presets.py`) and then
by the command line (`command_line.py`), and never changes after that: values that depend on the
tokenizer, the machine or an earlier start are in another object (`resolved.py`). Field names are
nanoGPT's.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Suppress, UseAppendAction, arg

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.batch import divide_batch
from jaxgpt.config.checks import ConfigError, bad_amounts, bad_counts, bad_floats
from jaxgpt.config.flag_types import IntIfSet, PathIfSet, TextIfSet, TrueOrFalse
from jaxgpt.config.mesh_shape import parse_mesh
from jaxgpt.config.mixture import EMBEDDED, Mixture, make_mixture
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.config.roles import Role, roles_of
from jaxgpt.config.task_sources import TaskSources

Device = Literal["auto", "gpu", "cpu"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Remat = Literal["auto", "none", "light", "full"]
Resume = Literal["auto", "must", "never"]
# Fields of `Config` that are sections of their own; TOML keys and flags are flat all the same.
SECTIONS = ("model", "optimizer", "tasks")
DEFAULT_BATCH_SIZE = 32
CHOICES = frozenset({"batch_size", "remat"})  # fields that may be "auto": chosen by what fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run as the user asked for it."""

    # a name from configs/, a TOML file of your own or a nanoGPT config file; if unset, the preset
    # for this machine's card
    preset: Annotated[
        str, Role.TUNABLE, Role.DERIVED, Role.SILENT, Role.IMPLIED, arg(help_behavior_hint="")
    ] = "24gb"

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    tasks: TaskSources = dataclasses.field(default_factory=TaskSources)

    # weights to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name on the Hugging Face
    # Hub, a run's folder (its newest checkpoint) or one with config.json and model.safetensors;
    # architecture and tokenizer come from them, but block_size may be shorter
    init_from: Annotated[TextIfSet, Role.FIXED, Role.INHERITED] = None

    # tokens to train on: a folder under data/, a path, 'embedded' for the text in the package, or a
    # mixture: fineweb:0.7,mine:0.3
    dataset: Annotated[str, Role.FIXED] = "fineweb"
    # another mixture from this step on; may be repeated, and a resumed run may change stages that
    # it has not reached
    mixture_at: Annotated[
        tuple[tuple[int, str], ...],
        Role.TUNABLE,
        UseAppendAction,
        arg(metavar="STEP MIXTURE", help_behavior_hint=""),
    ] = ()
    # when a source has been read to its end: read it again in another order, or stop the run
    at_end: Annotated[Literal["repeat", "stop"], Role.TUNABLE] = "repeat"
    # folder with the token shards; if unset, data/<dataset>
    data_dir: Annotated[PathIfSet, Role.TUNABLE, Role.LOCAL, Role.SILENT, Role.IMPLIED] = None
    # tokenizer of the data: gpt2, byte, a folder with tokenizer.json, owner/name on the Hub, or a
    # tiktoken encoding; if not given, the one in the data's manifest
    tokenizer: Annotated[str, Role.FIXED] = "gpt2"

    batch_size: Annotated[
        int | Literal["auto"],
        Role.TUNABLE,
        Role.PLANNED,
        arg(
            help="sequences one device processes at a time; halve it when memory runs out; auto: "
            "as many as fit, with the cheapest remat that fits unless --remat is given",
            metavar="INT|auto",
        ),
    ] = DEFAULT_BATCH_SIZE
    # sequences in one optimizer step
    effective_batch_size: Annotated[int, Role.FIXED] = 512
    # micro-batches in one step, summed over all devices as in nanoGPT; an alternative to
    # effective_batch_size, which it sets
    gradient_accumulation_steps: Annotated[
        IntIfSet, Role.TUNABLE, Role.SILENT, Role.IMPLIED, Role.PLANNED
    ] = None
    max_iters: Annotated[int, Role.TUNABLE, Role.PLANNED] = 50000  # optimizer steps in all
    # seed of the initialization, the data's order and dropout
    seed: Annotated[int, Role.FIXED] = 1337
    # skip a step whose loss or gradient norm is more than this many standard deviations, say 6,
    # above the mean of the last 128 steps; 0 skips only steps that are not finite
    skip_spikes: Annotated[float, Role.TUNABLE] = 0.0

    # steps between evaluations; each one also saves a checkpoint
    eval_interval: Annotated[int, Role.TUNABLE] = 1000
    # batches in one evaluation, each of the preset's batch_size
    eval_iters: Annotated[int, Role.FIXED] = 200
    log_interval: Annotated[int, Role.TUNABLE] = 100  # steps between lines in the log
    # longest time between two checkpoints
    checkpoint_minutes: Annotated[float, Role.TUNABLE, Role.LOCAL] = 15.0
    # how many of the newest checkpoints to keep, besides the best
    keep_checkpoints: Annotated[int, Role.TUNABLE, Role.LOCAL] = 2
    # length of the text sampled for TensorBoard at each evaluation; 0: none
    sample_tokens: Annotated[int, Role.TUNABLE] = 200

    # log to this project of Weights & Biases too; needs the extra '.[wandb]'
    wandb_project: Annotated[TextIfSet, Role.TUNABLE, Role.LOCAL, Role.SILENT] = None

    # folder for everything the run writes; if unset, runs/<preset>
    out_dir: Annotated[PathIfSet, Role.TUNABLE, Role.LOCAL, Role.SILENT, Role.IMPLIED] = None
    # auto: resume from the newest checkpoint in out_dir, or start if there is none; must: resume
    # from the newest or fail; never: start, or fail if out_dir has a run
    resume: Annotated[Resume, Role.TUNABLE, Role.LOCAL, Role.SILENT] = "auto"
    # bit-identical runs on a GPU: no autotuning, no atomics, and in bfloat16 scan_layers, so slower
    # (docs/faults.md)
    deterministic: Annotated[TrueOrFalse, Role.TUNABLE] = False
    # several GPUs: data=2,fsdp=4 is two replicas of the state, each sharded over four devices; if
    # unset, data-parallel on all of them (docs/scaling.md)
    mesh: Annotated[TextIfSet, Role.TUNABLE] = None
    # auto: a GPU if there is one, which presets made for a card require; cpu: train on the CPU
    device: Annotated[Device, Role.TUNABLE, Role.LOCAL, Role.IMPLIED] = "auto"
    # dtype of the matrix products; auto: bfloat16 on a GPU that has it (compute capability 8.0),
    # float16 with loss scaling on 7.0 and 7.5, else float32
    dtype: Annotated[Dtype, Role.TUNABLE] = "auto"
    # what the backward pass recomputes to save memory: none; light: norms and activations of the
    # MLP (about 5 % more work, a third less memory); full: whole blocks (a fifth more work, the
    # least memory); auto: the first of these that fits
    remat: Annotated[Remat, Role.TUNABLE, Role.PLANNED] = "none"
    # compile one block for all layers: many times faster to compile, a little more memory
    scan_layers: Annotated[TrueOrFalse, Role.TUNABLE] = False
    # Windows of the validation split in one evaluation: eval_iters of the preset's batch_size, so
    # that a smaller --batch-size evaluates the same windows.
    eval_windows: Annotated[int | None, Role.PINNED, Role.DERIVED, Role.IMPLIED, Suppress] = None
    # Memory in GB of the smallest card that the preset is made for; None runs anywhere.
    vram_gb: Annotated[int | None, Role.TUNABLE, Role.SILENT, Role.IMPLIED, Suppress] = None

    def __post_init__(self) -> None:
        """Check everything; raises ConfigError with every error at once."""
        errors = [
            *self.model.errors(),
            *self.optimizer.errors(),
            *(error for part in (self.model, self.optimizer, self) for error in bad_floats(part)),
            *bad_counts(self, "max_iters", "eval_interval", "eval_iters", "log_interval"),
            *bad_counts(self, "keep_checkpoints", "vram_gb"),
            *bad_counts(self, "sample_tokens", "seed", least=0),
            *bad_amounts(self, "skip_spikes"),
            *bad_amounts(self, "checkpoint_minutes", zero=False),
            *self._batch_errors(),
        ]
        errors += [
            f"{name} {str(path)!r} contains a NUL byte, which no file system allows"
            for name, path in {"out_dir": self.out_dir, "data_dir": self.data_dir}.items()
            if "\0" in str(path)
        ]
        if self.dataset == EMBEDDED and self.data_dir is not None:
            errors.append(
                f"data_dir {self.data_dir} is not read with dataset 'embedded', the text in the "
                "package; set another dataset as well"
            )
        try:
            _ = self.mixture
        except ConfigError as error:
            errors.append(str(error))
        if errors:
            raise ConfigError("\n".join(errors))

    def _batch_errors(self) -> list[str]:
        counts = ["gradient_accumulation_steps", "batch_size", "effective_batch_size"]
        if self.batch_size == "auto":
            counts.remove("batch_size")
        try:
            devices = parse_mesh(self.mesh).devices
            if errors := bad_counts(self, *counts):
                return errors
            if (accumulation := self.gradient_accumulation_steps) is not None:
                if self.batch_size == "auto":
                    return [
                        f"gradient_accumulation_steps {accumulation} needs a batch_size that is a "
                        "number; with auto, give effective_batch_size"
                    ]
                product = accumulation * self.batch_size
                if product != self.effective_batch_size:
                    return [
                        f"gradient_accumulation_steps {accumulation} x batch_size "
                        f"{self.batch_size} = {product} is not effective_batch_size "
                        f"{self.effective_batch_size}; give one of the two"
                    ]
            divide_batch(self.effective_batch_size, self.batch_size_or(1), devices)
        except ValueError as error:
            return [str(error)]
        return []

    def batch_size_or(self, otherwise: int) -> int:
        """batch_size, or `otherwise` where it is 'auto'."""
        return otherwise if self.batch_size == "auto" else self.batch_size

    def windows_in(self, eval_iters: int) -> int:
        """Windows of one evaluation: `eval_iters` batches of this preset's batch_size."""
        return eval_iters * self.batch_size_or(DEFAULT_BATCH_SIZE)

    @property
    def mixture(self) -> Mixture:
        """The datasets to train on, and their shares."""
        return make_mixture(self.dataset, self.data_dir, self.mixture_at)

    @property
    def open_choices(self) -> frozenset[str]:
        """Which of CHOICES are left to the available memory."""
        return frozenset(name for name in CHOICES if getattr(self, name) == "auto")

    @property
    def tokens_per_step(self) -> int:
        return self.effective_batch_size * self.model.block_size


# ---------------------------------------------------------------- flat names <-> sections


@functools.cache
def flat_fields() -> dict[str, dataclasses.Field]:
    """Every field by the flat name that TOML keys and flags use."""
    fields = {f.name: f for f in dataclasses.fields(Config) if f.name not in SECTIONS}
    for section in (ModelConfig, OptimizerConfig, TaskSources):
        fields |= {f.name: f for f in dataclasses.fields(section)}
    return fields


def names_with(*roles: Role) -> frozenset[str]:
    """The flat names of the fields that have all of `roles`."""
    fields = flat_fields().items()
    return frozenset(name for name, field in fields if {*roles} <= roles_of(field.type))


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
    values["mixture_at"] = [list(stage) for stage in values["mixture_at"]]
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
