"""Answers about one card: what a run needs there, what fits it, and what is best in given hours.

Each answer is a dict of JSON values, compiled if XLA's compiler for the card is installed. Long
lists are estimated, and labelled so.
"""

import dataclasses
import shlex
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.config.fields import Config, flat_fields, names_with
from jaxgpt.config.mesh_shape import MeshShape
from jaxgpt.config.presets import load_preset, preset_for_memory, preset_names
from jaxgpt.config.resolved import Resolved, choose_dtype
from jaxgpt.config.roles import Role
from jaxgpt.errors import UserError
from jaxgpt.model.attention import pick_attention
from jaxgpt.planning import fit, memory, speed, target
from jaxgpt.planning.gpus import GIB, Gpu
from jaxgpt.planning.new_run import resolve_new
from jaxgpt.training.sharding import make_layout

TRAIN = "python -m jaxgpt.train"


class Planner:
    """Answers about one card."""

    def __init__(
        self,
        gpu: Gpu,
        why_estimated: str | None,
        on_compile: Callable[[str], AbstractContextManager[Any]],
        mesh: MeshShape,
    ):
        """Args:
        gpu: the card.
        why_estimated: why nothing can be compiled for it; None to compile.
        on_compile: makes a context manager that shows a line of text during a compilation.
        mesh: how many such cards, and how the state is sharded over them.
        """
        self.gpu, self.mesh = gpu, mesh
        self.capacity = memory.capacity_of(gpu)
        self.why_estimated = why_estimated
        self._devices = None if why_estimated else target.card_devices(gpu, mesh.devices)
        self._on_compile = on_compile

    def resolve(self, asked: Config) -> Resolved:
        """`asked` on this card. Raises ConfigError if the card cannot compute in its dtype."""
        dtype = choose_dtype(asked.dtype, "gpu", self.gpu.compute_capability)
        return resolve_new(asked, dtype, self.mesh)

    def need(self, cfg: Resolved) -> memory.Need:
        """What a step of `cfg` needs, compiled if possible."""
        if self._devices is None:
            return memory.estimate(cfg)
        layout = make_layout(self._devices, cfg.mesh)
        what = f"{cfg.asked.preset}, batch_size {cfg.batch.batch_size}, remat {cfg.remat}"
        with self._on_compile(f"compiling {what} for {self.gpu.name}"):
            return memory.compiled_need(cfg, layout.device, layout)

    def one(self, cfg: Resolved, free: Collection[str]) -> dict[str, Any]:
        """One run, itemized; `free` names which of batch_size and remat to choose."""
        if not free:
            return self.record(cfg, self.need(cfg))
        found = fit.best_fit(cfg, self.capacity, self.need, free)
        if found is None:
            raise UserError(fit.does_not_fit(cfg, self.gpu.name, self.capacity))
        return self.record(found.cfg, found.need)

    def overview(self, cfg: Resolved) -> dict[str, Any]:
        """Which presets fit, the one for this card, and the largest model that trains on it.

        `cfg` gives the context, effective batch and steps of the largest model.
        """
        presets = [self.resolve(load_preset(name)) for name in preset_names()]
        tier = self.resolve(load_preset(preset_for_memory(self.gpu.memory_bytes / GIB)))
        recommended = self.one(tier, ())
        largest = fit.largest_model(cfg, self.capacity, self.need)
        return {
            "gpu": self.gpu.key,
            "capacity_bytes": self.capacity,
            "presets": [self.record(p, memory.estimate(p)) for p in presets if p.asked.vram_gb],
            "recommended": recommended,
            "largest_model": self.record(largest.cfg, largest.need) if largest else None,
            "command": recommended["command_that_fits"],
        }

    def best_for_hours(self, cfg: Resolved, hours: float) -> dict[str, Any]:
        """The shape and token count with the least predicted loss after `hours` on the card.

        Raises:
            UserError: if no speed is known for the card.
        """
        if speed.tokens_per_second(cfg, self.gpu) is None:
            raise UserError(
                f"no speed is published for this card, {self.gpu.name}, in {cfg.dtype}, so nothing "
                "can be planned by --hours; leave it out, and measure tokens/s with "
                "python -m jaxgpt.bench"
            )
        shapes = (fit.best_fit(shape, self.capacity) for shape in fit.ladder(cfg))
        fitting = [self._trained_for(hours, found) for found in shapes if found]
        choices = [choice for choice in fitting if choice]
        if not choices:
            raise UserError(
                f"{hours:g} hours are too short for one step on this card: {self.gpu.name}"
                if fitting
                else fit.does_not_fit(cfg, self.gpu.name, self.capacity)
            )
        for choice in sorted(choices, key=lambda choice: choice.loss):
            found = fit.best_fit(choice.fitting.cfg, self.capacity, self.need)
            # The compiler may find another batch_size and remat, and so another speed.
            best = self._trained_for(hours, found) if found else None
            if best:
                break
        else:
            raise UserError(fit.does_not_fit(cfg, self.gpu.name, self.capacity))
        return {
            **self.record(best.fitting.cfg, best.fitting.need),
            "hours_given": hours,
            "predicted_loss": best.loss,
            "choices": [self._choice_record(choice) for choice in reversed(choices)],
        }

    def record(self, cfg: Resolved, need: memory.Need) -> dict[str, Any]:
        """Everything known about one run on this card, as JSON values."""
        m = cfg.model
        rate = speed.tokens_per_second(cfg, self.gpu)
        mfu = speed.mfu_of(self.gpu)
        total = cfg.total_tokens
        parameters = m.parameter_count()
        fits, command = need.fits(self.capacity), train_command(cfg)
        return {
            "preset": cfg.asked.preset,
            "gpu": self.gpu.key,
            "gpu_name": self.gpu.name,
            "capacity_bytes": self.capacity,
            "parameters": parameters,
            "n_layer": m.n_layer,
            "n_head": m.n_head,
            "n_embd": m.n_embd,
            "block_size": m.block_size,
            "peak_bytes": need.peak_bytes,
            "headroom_bytes": self.capacity - need.peak_bytes,
            "host_bytes": need.host_bytes,
            "breakdown_bytes": need.breakdown_bytes,
            "fits": fits,
            "method": need.method,
            "why_estimated": self.why_estimated,
            "devices": cfg.batch.devices,
            "mesh": str(cfg.mesh) if cfg.mesh.devices > 1 else None,
            "batch": str(cfg.batch),
            "batch_size": cfg.batch.batch_size,
            "effective_batch_size": cfg.batch.effective,
            "gradient_accumulation_steps": cfg.batch.accumulation,
            "remat": cfg.remat,
            "dtype": cfg.dtype,
            "optimizer": cfg.optimizer.optimizer,
            "state_dtype": cfg.optimizer.state_dtype,
            "attention": pick_attention(
                "gpu", self.gpu.compute_capability, cfg.dtype, m.head_width
            )[1],
            "flops_per_token": speed.model_flops_per_token(m),
            "tokens_per_step": cfg.tokens_per_step,
            "total_tokens": total,
            "tokens_per_parameter": total / parameters,
            "tokens_per_second": rate,
            "mfu": mfu.value if mfu and rate else None,
            "mfu_source": mfu.source if mfu and rate else None,
            "hours": total / rate / speed.HOUR if rate else None,
            "learning_rate": cfg.optimizer.learning_rate,
            "suggested_learning_rate": speed.suggested_learning_rate(parameters),
            "command": command,
            "command_that_fits": command if fits else self._command_that_fits(cfg),
        }

    def _trained_for(self, hours: float, found: fit.Fitting) -> "_Choice | None":
        """`found` with the steps and the learning rate for `hours`; None if they are too short."""
        cfg = found.cfg
        rate = speed.tokens_per_second(cfg, self.gpu)
        assert rate is not None, "checked by best_for_hours"
        max_iters = int(rate * hours * speed.HOUR / cfg.tokens_per_step)
        if max_iters < 1:
            return None
        parameters = cfg.model.parameter_count()
        peak = speed.suggested_learning_rate(parameters)
        warmup = min(cfg.optimizer.warmup_iters, max(1, max_iters // 20))
        optimizer = dataclasses.replace(
            cfg.optimizer,
            learning_rate=peak,
            min_lr=peak / 10,
            warmup_iters=warmup,
            lr_decay_iters=max_iters,
        )
        cfg = dataclasses.replace(
            cfg,
            asked=dataclasses.replace(cfg.asked, max_iters=max_iters),
            optimizer=optimizer,
        )
        loss = speed.predicted_loss(parameters, cfg.total_tokens)
        return _Choice(fit.Fitting(cfg, found.need), loss)

    def _choice_record(self, choice: "_Choice") -> dict[str, Any]:
        cfg = choice.fitting.cfg
        m, tokens = cfg.model, cfg.total_tokens
        return {
            "parameters": m.parameter_count(),
            "n_layer": m.n_layer,
            "n_head": m.n_head,
            "n_embd": m.n_embd,
            "total_tokens": tokens,
            "tokens_per_parameter": tokens / m.parameter_count(),
            "tokens_per_second": speed.tokens_per_second(cfg, self.gpu),
            "predicted_loss": choice.loss,
        }

    def _command_that_fits(self, cfg: Resolved) -> str | None:
        found = fit.best_fit(cfg, self.capacity)
        return train_command(found.cfg) if found else None


class _Choice(NamedTuple):
    fitting: fit.Fitting
    loss: float


def train_command(cfg: Resolved) -> str:
    """The command line that trains `cfg`: its preset, and a flag for each field that differs."""
    preset = load_preset(cfg.asked.preset)
    base = resolve_new(preset, cfg.dtype)
    # Neither is printed: the dtype is the card's own, and the decay ends with the run.
    old = {**base.flat(), "dtype": preset.dtype, "lr_decay_iters": cfg.asked.max_iters}
    new = {**cfg.flat(), "dtype": cfg.asked.dtype}
    names = [name for name in flat_fields() if name not in names_with(Role.IMPLIED)]
    differing = [name for name in names if new[name] != old[name]]
    words = ["--preset", cfg.asked.preset]
    for name in differing:
        words += [f"--{name.replace('_', '-')}", str(new[name])]
    if {"n_layer", "n_head", "n_embd"} & set(differing):  # no longer a run of the preset
        size = f"{cfg.model.parameter_count() / 1e6:.0f}m"
        words += ["--out-dir", f"runs/{Path(cfg.asked.preset).stem}-{size}"]
    return f"{TRAIN} {shlex.join(words)}"
