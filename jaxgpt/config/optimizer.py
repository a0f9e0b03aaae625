"""The optimizer's part of the configuration, with its checks."""

import dataclasses
import math
from typing import Annotated, Any, Literal

from jaxgpt.config.checks import bad_amounts, bad_counts, bad_shares
from jaxgpt.config.flag_types import FloatIfSet, IntIfSet, TrueOrFalse
from jaxgpt.config.roles import Role

StateDtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd"]
WeightDecaySchedule = Literal["constant", "lr"]
GROUP_RATES = ("embedding_lr", "head_lr", "vector_lr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, the schedule and the clipping."""

    # muon: orthogonalized momentum for the blocks' matrices, AdamW for the rest
    optimizer: Annotated[Optimizer, Role.FIXED] = "adamw"
    # peak learning rate, after the warm-up
    learning_rate: Annotated[float, Role.TUNABLE, Role.PLANNED] = 6e-4
    # peak learning rate of token and position embeddings; if unset, learning_rate
    embedding_lr: Annotated[FloatIfSet, Role.TUNABLE, Role.PLANNED] = None
    # peak learning rate of an untied head; if unset, learning_rate
    head_lr: Annotated[FloatIfSet, Role.TUNABLE, Role.PLANNED] = None
    # peak learning rate of norms and biases; if unset, learning_rate
    vector_lr: Annotated[FloatIfSet, Role.TUNABLE, Role.PLANNED] = None
    # learning rate at the end of the decay; the other groups' rates fall in proportion
    min_lr: Annotated[float, Role.TUNABLE, Role.PLANNED] = 6e-5
    # decay the learning rate by `schedule`; False keeps the peak
    decay_lr: Annotated[TrueOrFalse, Role.TUNABLE] = True
    # cosine: decay from the end of the warm-up; wsd (warm-up, stable, decay): constant, then linear
    schedule: Annotated[Schedule, Role.TUNABLE] = "cosine"
    # share of lr_decay_iters in which wsd decays the learning rate
    cooldown_fraction: Annotated[float, Role.TUNABLE] = 0.7
    # steps of linear warm-up; may exceed max_iters
    warmup_iters: Annotated[int, Role.TUNABLE] = 2000
    # step at which min_lr is reached; if unset, max_iters
    lr_decay_iters: Annotated[IntIfSet, Role.TUNABLE, Role.INHERITED, Role.PLANNED] = None
    # weight decay of matrices and embeddings; biases and norms have none
    weight_decay: Annotated[float, Role.TUNABLE] = 0.1
    # lr: weight_decay is scaled with the learning rate, so their product, the decay, falls faster
    weight_decay_schedule: Annotated[WeightDecaySchedule, Role.TUNABLE] = "constant"
    # decay only weights that the update moves towards zero
    cautious_weight_decay: Annotated[TrueOrFalse, Role.TUNABLE] = False
    beta1: Annotated[float, Role.TUNABLE] = 0.9  # decay of AdamW's first moment
    beta2: Annotated[float, Role.TUNABLE] = 0.99  # decay of AdamW's second moment
    # steps over which Muon's momentum rises from 0.85 to 0.95; 0: 0.95 from the start
    momentum_warmup_iters: Annotated[int, Role.TUNABLE] = 0
    # largest global norm of the averaged gradient; 0 switches clipping off
    grad_clip: Annotated[float, Role.TUNABLE] = 1.0
    # dtype of the optimizer's moments and the gradient accumulator; bfloat16 needs 10 bytes per
    # parameter instead of 16
    state_dtype: Annotated[StateDtype, Role.FIXED] = "float32"

    def rates(self) -> dict[str, Any]:
        """Every learning rate, by its field."""
        return {name: getattr(self, name) for name in ("learning_rate", "min_lr", *GROUP_RATES)}

    def scaled(self, factor: float) -> "OptimizerConfig":
        """A copy with every learning rate multiplied by `factor` and rounded to two digits.

        For a model of another width the factor is sqrt(old width / new width): Muon's update is
        an orthogonal matrix, whose best rate does not depend on the width, times 0.2 sqrt(longer
        side), which the factor cancels. nanochat scales AdamW's rates this way, too.
        """
        rates = self.rates()
        for name, rate in rates.items():
            if rate is not None:
                rates[name] = float(f"{rate * factor:.2g}")
        return dataclasses.replace(self, **rates)

    def errors(self) -> list[str]:
        """A sentence for each invalid value."""
        errors = [
            *bad_counts(self, "warmup_iters", "momentum_warmup_iters", least=0),
            *bad_counts(self, "lr_decay_iters"),
            *bad_amounts(self, "min_lr", "weight_decay", "grad_clip"),
            *self._rate_errors(),
            *bad_shares(self, "beta1", "beta2"),
        ]
        if not 0 < self.cooldown_fraction <= 1:
            errors.append(
                f"cooldown_fraction {self.cooldown_fraction:g} must be above 0 and at most 1; "
                "for a rate that stays constant set decay_lr to False"
            )
        return errors

    def _rate_errors(self) -> list[str]:
        errors = bad_amounts(self, "learning_rate", *GROUP_RATES, zero=False)
        peak, end = self.learning_rate, self.min_lr
        if not errors and self.decay_lr and peak < end < math.inf:
            errors.append(
                f"min_lr {end:g} is above learning_rate {peak:g}; set it as well, usually to a "
                f"tenth: {peak / 10:g}"
            )
        return errors
