"""Answers about one card: what a run needs there, what fits it, and what is best in given hours.

Each answer is a dict of JSON values, compiled if XLA's compiler for the card is installed. Long
lists are estimated, and labelled so.
"""

import dataclasses
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

from jaxgpt.config.checks import as_flag
from jaxgpt.config.fields import Config, flat_values, with_fields
from jaxgpt.config.mesh_shape import MeshShape
from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import Resolved, choose_dtype
from jaxgpt.errors import UserError
from jaxgpt.model.attention import pick_attention
from jaxgpt.planning import fit, memory, speed, target
from jaxgpt.planning.gpus import Gpu, preset_of_card
from jaxgpt.planning.train_command import of_its_preset, resolve_new, train_command
from jaxgpt.training.sharding import make_layout

MODERN = "124m-modern"  # the preset whose recipe --hours sets beside GPT-2's


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
        self._found: dict[Resolved, fit.Fitting | None] = {}

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
            return memory.need_of(cfg, memory.compile_ahead(cfg, layout.device, layout))

    def one(self, cfg: Resolved, free: Collection[str]) -> dict[str, Any]:
        """One run, itemized; `free` names which of batch_size and remat to choose."""
        if not free:
            return self.record(fit.Fitting(cfg, self.need(cfg)))
        found = fit.best_fit(cfg, self.capacity, self.need, free)
        if found is None:
            raise UserError(fit.does_not_fit(cfg, self.gpu.name, self.capacity))
        return self.record(found)

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
        choices = self._choices(cfg, hours)
        if not choices:
            raise UserError(
                f"{hours:g} hours are too short for one step on this card: {self.gpu.name}"
                if any(self.fitting(speed.at_suggested_rates(shape)) for shape in fit.ladder(cfg))
                else fit.does_not_fit(cfg, self.gpu.name, self.capacity)
            )
        for choice in sorted(choices, key=fit.loss_of):
            found = fit.best_fit(of_its_preset(choice.cfg), self.capacity, self.need)
            # The compiler may find another batch_size and remat, and so another speed.
            best = self.trained_for(hours, found) if found else None
            if best:
                break
        else:
            raise UserError(fit.does_not_fit(cfg, self.gpu.name, self.capacity))
        return {
            **self.record(best),
            "hours_given": hours,
            "choices": [self._with_outlook(choice) for choice in reversed(choices)],
            "other_recipe": self._other_recipe(cfg, hours),
        }

    def _choices(self, cfg: Resolved, hours: float) -> list[fit.Fitting]:
        """Every shape that fits, trained for `hours`."""
        shapes = (self.fitting(speed.at_suggested_rates(shape)) for shape in fit.ladder(cfg))
        trained = [self.trained_for(hours, found) for found in shapes if found]
        return [choice for choice in trained if choice]

    def _other_recipe(self, cfg: Resolved, hours: float) -> dict[str, Any] | None:
        """The best choice with Qwen3's network and Muon or, if `cfg` has them, GPT-2 and AdamW.

        None if none fits, or `cfg` has another tokenizer: its losses would not compare.
        """
        modern = (cfg.model.arch, cfg.optimizer.optimizer) == ("qwen3", "muon")
        gpt2 = preset_of_card(self.gpu.memory_bytes, self.gpu.compute_capability)
        preset = load_preset(gpt2 if modern else MODERN)
        if preset.tokenizer != cfg.tokenizer:
            return None
        same = {"block_size": cfg.model.block_size, "dtype": cfg.asked.dtype}
        other = self.resolve(with_fields(preset, **same))
        best = min(self._choices(other, hours), key=fit.loss_of, default=None)
        usual = flat_values(preset)
        flags = [f" {as_flag(name)} {x}" for name, x in same.items() if x != usual[name]]
        asked = f"--preset {preset.preset}{''.join(flags)}"
        return best and {"flags": asked, **self._with_outlook(best)}

    def record(self, run: fit.Fitting) -> dict[str, Any]:
        """Everything known about one run on this card, as JSON values."""
        cfg, need = run.cfg, run.need
        shown = self._with_outlook(run)
        mfu = speed.mfu_of(self.gpu) if shown["tokens_per_second"] else None
        fits, command = need.fits(self.capacity), train_command(cfg)
        that_fits = None if fits else self.fitting(cfg)
        capability, head_width = self.gpu.compute_capability, cfg.model.head_width
        return {
            **shown,
            "gpu": self.gpu.key,
            "gpu_name": self.gpu.name,
            "capacity_bytes": self.capacity,
            "peak_bytes": need.peak_bytes,
            "headroom_bytes": self.capacity - need.peak_bytes,
            "host_bytes": need.host_bytes,
            "breakdown_bytes": need.breakdown_bytes,
            "fits": fits,
            "method": need.method,
            "why_estimated": self.why_estimated,
            "attention": pick_attention("gpu", capability, cfg.dtype, head_width)[1],
            "flops_per_token": speed.model_flops_per_token(cfg.model),
            "mfu": mfu and mfu.value,
            "mfu_source": mfu and mfu.source,
            "hours": mfu and cfg.total_tokens / shown["tokens_per_second"] / speed.HOUR,
            "learning_rate": cfg.optimizer.learning_rate,
            "suggested_learning_rate": speed.suggested_learning_rate(shown["parameters"]),
            "command": command,
            "command_that_fits": command if fits else that_fits and train_command(that_fits.cfg),
        }

    def _with_outlook(self, run: fit.Fitting) -> dict[str, Any]:
        """A run with its tokens, speed and loss, which are predicted without compiling."""
        cfg, tokens = run.cfg, run.cfg.total_tokens
        return {
            **cfg.summary(),
            "total_tokens": tokens,
            "tokens_per_parameter": tokens / cfg.model.parameter_count(),
            "tokens_per_second": speed.tokens_per_second(cfg, self.gpu),
            "predicted_loss": run.loss,
        }

    def trained_for(
        self, hours: float, run: fit.Fitting, gpu: Gpu | None = None
    ) -> fit.Fitting | None:
        """`run` with as many steps as the card makes in `hours`, and the loss it then reaches.

        At most a twentieth of them is warm-up. None if they are too short for a step, or no speed
        is known. `gpu`: another card.
        """
        cfg = run.cfg
        rate = speed.tokens_per_second(cfg, gpu or self.gpu)
        max_iters = int((rate or 0) * hours * speed.HOUR / cfg.tokens_per_step)
        if max_iters < 1:
            return None
        warmup = min(cfg.optimizer.warmup_iters, max(1, max_iters // 20))
        cfg = dataclasses.replace(
            cfg,
            asked=dataclasses.replace(cfg.asked, max_iters=max_iters),
            optimizer=dataclasses.replace(
                cfg.optimizer, warmup_iters=warmup, lr_decay_iters=max_iters
            ),
        )
        return fit.Fitting(cfg, run.need, speed.predicted_loss_of(cfg))

    def fitting(self, cfg: Resolved) -> fit.Fitting | None:
        """`cfg` with the batch_size and remat that fit by estimate; None if none do."""
        if cfg not in self._found:
            self._found[cfg] = fit.best_fit(cfg, self.capacity)
        return self._found[cfg]
