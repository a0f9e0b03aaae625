"""Answers about one card: what a run needs there, what fits it, and what is best in given hours.

Each answer is a dict of JSON values. Where XLA's compiler for the card can be had, what an answer
rests on is compiled; long lists are estimated first, and say so.
"""

import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.config.fields import Config, flat_fields, flat_values, with_fields
from jaxgpt.config.presets import load_preset, preset_for_memory, preset_names
from jaxgpt.config.resolve import resolve
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.model.attention import pick_attention
from jaxgpt.planning import fit, memory, speed, target
from jaxgpt.planning.gpus import GIB, Gpu
from jaxgpt.run.device import compute_dtype
from jaxgpt.training.sharding import choose_layout

TRAIN = "python -m jaxgpt.train"
# What a command line need not say: it follows from other flags, or belongs to a machine or run.
NOT_SAID = {
    *("preset", "n_vocab", "eval_windows", "vram_gb", "auto_batch_size"),
    *("gradient_accumulation_steps", "out_dir", "data_dir", "device"),
}


class Planner:
    """Answers about one card."""

    def __init__(
        self,
        gpu: Gpu,
        why_estimated: str | None,
        on_compile: Callable[[str], AbstractContextManager[Any]],
        dtype: str = "auto",
        devices: int = 1,
    ):
        """Args:
        gpu: the card.
        why_estimated: why nothing is compiled for it, None to compile.
        on_compile: entered with a line of text while something compiles.
        dtype: what was asked for, to be said again in commands.
        devices: how many such cards.
        """
        self.gpu = gpu
        self.capacity = memory.capacity_of(gpu)
        self.why_estimated = why_estimated
        self._devices = None if why_estimated else target.card_devices(gpu, devices)
        self._on_compile, self.dtype = on_compile, dtype

    def for_card(self, cfg: Config) -> Config:
        """`cfg` with the dtype that the card computes in."""
        dtype = compute_dtype(cfg.dtype, "gpu", self.gpu.compute_capability)
        return with_fields(cfg, dtype=dtype)

    def need(self, cfg: Config) -> memory.Need:
        """What a step of `cfg` needs, compiled if possible."""
        if self._devices is None:
            return memory.estimate(cfg)
        cfg, layout = choose_layout(cfg, self._devices)
        what = f"{cfg.preset}, batch_size {cfg.batch_size}, remat {cfg.remat}"
        with self._on_compile(f"compiling {what} for {self.gpu.name}"):
            return memory.measure(cfg, layout.device, layout)

    def one(self, cfg: Config, free: set[str]) -> dict[str, Any]:
        """One run, itemized. Of batch_size and remat, those in `free` are chosen."""
        cfg = with_fields(
            cfg,
            auto_batch_size=cfg.auto_batch_size or "batch_size" in free,
            remat="auto" if "remat" in free else cfg.remat,
        )
        if not fit.is_open(cfg):
            return self.record(cfg, self.need(cfg))
        found = fit.best_fit(cfg, self.capacity, self.need)
        if found is None:
            raise UserError(fit.too_small(cfg, self.gpu.name, self.capacity))
        return self.record(found.cfg, found.need)

    def overview(self, cfg: Config) -> dict[str, Any]:
        """Which presets fit, the one for this card, and the largest model that trains on it.

        `cfg` gives what a shape leaves open: context, effective batch, steps.
        """
        presets = [self._preset(name) for name in preset_names()]
        tier = self._preset(preset_for_memory(self.gpu.memory_bytes / GIB))
        recommended = self.one(tier, set())
        largest = fit.largest_model(cfg, self.capacity, self.need)
        return {
            "gpu": self.gpu.key,
            "capacity_bytes": self.capacity,
            "presets": [self.record(p, memory.estimate(p)) for p in presets if p.vram_gb],
            "recommended": recommended,
            "largest_model": self.record(largest.cfg, largest.need) if largest else None,
            "command": recommended["command_that_fits"],
        }

    def best_for_hours(self, cfg: Config, hours: float) -> dict[str, Any]:
        """The shape and token count with the least predicted loss after `hours` on the card.

        Raises:
            UserError: if no speed is known for the card.
        """
        if speed.tokens_per_second(cfg, self.gpu) is None:
            raise UserError(
                f"no speed is published for this card, {self.gpu.name}, in {cfg.dtype}, so hours "
                "mean nothing for it; plan without --hours, and take tokens/s from a short run of "
                "train"
            )
        shapes = (fit.best_fit(shape, self.capacity) for shape in fit.ladder(cfg))
        fitting = [self._trained_for(hours, found) for found in shapes if found]
        choices = [choice for choice in fitting if choice]
        if not choices:
            raise UserError(
                f"{hours:g} hours are no time for one step on this card: {self.gpu.name}"
                if fitting
                else fit.too_small(cfg, self.gpu.name, self.capacity)
            )
        for choice in sorted(choices, key=lambda choice: choice.loss):
            found = fit.best_fit(fit.left_open(choice.fitting.cfg), self.capacity, self.need)
            # The compiler may think otherwise of batch_size and remat, and so of the speed.
            best = self._trained_for(hours, found) if found else None
            if best:
                break
        else:
            raise UserError(fit.too_small(cfg, self.gpu.name, self.capacity))
        return {
            **self.record(best.fitting.cfg, best.fitting.need),
            "hours_given": hours,
            "predicted_loss": best.loss,
            "choices": [self._choice_record(choice) for choice in reversed(choices)],
        }

    def record(self, cfg: Config, need: memory.Need) -> dict[str, Any]:
        """All that is known of one run on this card."""
        m = cfg.model
        rate = speed.tokens_per_second(cfg, self.gpu)
        mfu = speed.mfu_of(self.gpu)
        total = cfg.tokens_per_step * cfg.max_iters
        parameters = m.parameter_count()
        fits, command = need.fits(self.capacity), train_command(cfg, self.dtype)
        return {
            "preset": cfg.preset,
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
            "devices": cfg.device_count,
            "mesh": cfg.mesh,
            "batch_size": cfg.batch_size,
            "gradient_accumulation_steps": cfg.gradient_accumulation_steps,
            "remat": cfg.remat,
            "dtype": cfg.dtype,
            "optimizer": cfg.optimizer.optimizer,
            "state_dtype": cfg.optimizer.state_dtype,
            "attention": pick_attention(
                "gpu", self.gpu.compute_capability, cfg.dtype, m.n_embd // m.n_head
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

    def _preset(self, name: str) -> Config:
        cfg = load_preset(name)
        return self.for_card(resolve(cfg, load_tokenizer(cfg.tokenizer)))

    def _trained_for(self, hours: float, found: fit.Fitting) -> "_Choice | None":
        """What fits, with the steps and the learning rate of so many hours."""
        cfg = found.cfg
        rate = speed.tokens_per_second(cfg, self.gpu)
        assert rate is not None, "asked before"
        max_iters = int(rate * hours * speed.HOUR / cfg.tokens_per_step)
        if max_iters < 1:
            return None
        parameters = cfg.model.parameter_count()
        peak = speed.suggested_learning_rate(parameters)
        cfg = with_fields(
            cfg,
            max_iters=max_iters,
            lr_decay_iters=max_iters,
            learning_rate=peak,
            min_lr=peak / 10,
            warmup_iters=min(cfg.optimizer.warmup_iters, max(1, max_iters // 20)),
        )
        loss = speed.predicted_loss(parameters, max_iters * cfg.tokens_per_step)
        return _Choice(fit.Fitting(cfg, found.need), loss)

    def _choice_record(self, choice: "_Choice") -> dict[str, Any]:
        cfg = choice.fitting.cfg
        m, tokens = cfg.model, cfg.max_iters * cfg.tokens_per_step
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

    def _command_that_fits(self, cfg: Config) -> str | None:
        found = fit.best_fit(fit.left_open(cfg), self.capacity)
        return train_command(found.cfg, self.dtype) if found else None


class _Choice(NamedTuple):
    fitting: fit.Fitting
    loss: float


def train_command(cfg: Config, dtype: str = "auto") -> str:
    """The command line that trains `cfg`: its preset, and a flag for each field that differs.

    `dtype` is what was asked for; the one in `cfg` may be the card's.
    """
    preset = resolve(load_preset(cfg.preset), load_tokenizer(cfg.tokenizer))
    # Unless it is said, the decay ends with the run.
    old = {**flat_values(preset), "lr_decay_iters": cfg.max_iters}
    new = {**flat_values(cfg), "dtype": dtype}
    differing = [name for name in flat_fields() if name not in NOT_SAID and new[name] != old[name]]
    words = ["--preset", cfg.preset]
    for name in differing:
        words += [f"--{name.replace('_', '-')}", str(new[name])]
    if {"n_layer", "n_head", "n_embd"} & set(differing):  # not a run of the preset any more
        size = f"{cfg.model.parameter_count() / 1e6:.0f}m"
        words += ["--out-dir", f"runs/{Path(cfg.preset).stem}-{size}"]
    return f"{TRAIN} {shlex.join(words)}"
