"""The learning rate of each step."""

import optax

from jaxgpt.config.optimizer import OptimizerConfig


def make_schedule(cfg: OptimizerConfig, max_iters: int) -> optax.Schedule:
    """Learning rate of optimizer step 0, 1, ...: nanoGPT's warm-up, then `cfg.schedule`.

    Step i of the warm-up has (i + 1) / (warmup_iters + 1) of the peak. min_lr is reached at
    lr_decay_iters, or directly after the warm-up if that is later. `decay_lr` False keeps the peak.
    """
    peak, warmup_iters = cfg.learning_rate, cfg.warmup_iters
    first = peak / (warmup_iters + 1)
    decay_iters = cfg.lr_decay_iters or max_iters
    warmup = optax.linear_schedule(first, peak, warmup_iters)
    if not cfg.decay_lr:
        return optax.join_schedules([warmup, optax.constant_schedule(peak)], [warmup_iters])
    if decay_iters <= warmup_iters:
        return optax.join_schedules([warmup, optax.constant_schedule(cfg.min_lr)], [warmup_iters])
    if cfg.schedule == "wsd":
        start = cooldown_start(cfg, decay_iters)
        cooldown = optax.linear_schedule(peak, cfg.min_lr, decay_iters - start)
        stable = optax.constant_schedule(peak)
        return optax.join_schedules([warmup, stable, cooldown], [warmup_iters, start])
    return optax.warmup_cosine_decay_schedule(
        init_value=first,
        peak_value=peak,
        warmup_steps=warmup_iters,
        decay_steps=decay_iters,
        end_value=cfg.min_lr,
    )


def cooldown_start(cfg: OptimizerConfig, decay_iters: int) -> int:
    """The step at which `wsd` begins to decay: never before the end of the warm-up."""
    stable = decay_iters - round(cfg.cooldown_fraction * decay_iters)
    return min(max(stable, cfg.warmup_iters), decay_iters - 1)
