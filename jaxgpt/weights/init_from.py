"""Fine-tuning: the architecture and the initial parameters that `--init-from` gives a run."""

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import ConfigError, as_flag
from jaxgpt.config.fields import Config, names_with
from jaxgpt.config.resolved import Origin, Resolved
from jaxgpt.config.roles import Role
from jaxgpt.weights.deploy import explicit_sizes
from jaxgpt.weights.source import Weights, WeightsFlags, open_weights

# Fields of ModelConfig that the weights determine. block_size may be shorter than theirs; where
# positions are not learned, also longer.
FROM_WEIGHTS = tuple(
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.name in names_with(Role.FIXED) and f.name != "block_size"
)


def find_origin(
    asked: Config, saved: Resolved | None, given: Collection[str]
) -> tuple[Origin, Weights | None]:
    """Where a run's model comes from, and the weights to start from if the run is fine-tuned.

    A resumed run, `saved`, needs no weights: its parameters are in its checkpoints, and its
    architecture is in its configuration. `given` are the names of the flags on the command line.

    Raises:
        UserError: if the weights do not exist, or a flag contradicts their architecture.
    """
    init_from = asked.init_from or (saved.init_from if saved else None)
    if init_from is None:
        return dataclasses.replace(Origin.of(asked), saved=saved), None
    weights = None
    if saved is not None and saved.init_from == init_from:
        model, tokenizer = saved.model, saved.tokenizer
    else:
        weights = open_weights(WeightsFlags(init_from=init_from))
        model, tokenizer = weights.model, weights.tokenizer.name
    _check_architecture(asked, init_from, model, tokenizer, given)
    adopted = {name: getattr(model, name) for name in FROM_WEIGHTS}
    longer = "block_size" in given and not model.has_learned_positions
    block_size = asked.model.block_size
    block_size = block_size if longer else min(block_size, model.block_size)
    origin = Origin(
        model=dataclasses.replace(asked.model, **adopted, block_size=block_size),
        tokenizer=tokenizer,
        init_from=init_from,
        saved=saved,
    )
    return origin, weights


def load_initial_params(weights: Weights, device: Any, like: Any) -> Any:
    """The parameters of `weights`, read onto `device` and then sharded like `like`.

    Position embeddings beyond the run's block_size are dropped.
    """
    import jax

    from jaxgpt.model.network import shorten_context

    params = shorten_context(weights.load(device), like)
    # A copy, never an alias, because a training step donates its parameters.
    return jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding, may_alias=False), params, like
    )


def _check_architecture(
    asked: Config, init_from: str, model: ModelConfig, tokenizer: str, given: Collection[str]
) -> None:
    """Raises ConfigError for flags that contradict the weights."""
    wanted = {name: getattr(asked.model, name) for name in FROM_WEIGHTS}
    wanted["tokenizer"] = asked.tokenizer
    # A run's sizes may be unset because they follow from others; a flag may name the same value.
    sizes = explicit_sizes(model)
    found = {**{name: getattr(sizes, name) for name in FROM_WEIGHTS}, "tokenizer": tokenizer}
    errors = [
        f"{as_flag(name)} {wanted[name]}: the weights of {init_from} have "
        f"{found[name]}; drop the flag"
        for name in found
        if name in given and wanted[name] not in (found[name], None)
    ]
    too_long = "block_size" in given and asked.model.block_size > model.block_size
    if too_long and model.has_learned_positions:
        errors.append(
            f"--block-size {asked.model.block_size}: the weights of {init_from} have "
            f"{model.block_size} positions; it must be at most {model.block_size}"
        )
    if errors:
        raise ConfigError("\n".join(errors))
