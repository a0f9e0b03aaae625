"""The start of a fine-tuning: --init-from's architecture for the run, and its weights."""

from collections.abc import Collection
from typing import Any

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, flat_values, with_fields
from jaxgpt.weights.source import Weights, WeightsFlags, open_weights


def start_from(
    cfg: Config, saved: Config | None, given: Collection[str]
) -> tuple[Config, Weights | None]:
    """`cfg` with the architecture of the weights it starts from, and these weights.

    Without --init-from `cfg` is as it was. A run that goes on, `saved`, has its weights in its
    checkpoints and its architecture in its configuration; then there are no others. `given` are
    the names of the flags that were typed.

    Raises:
        UserError: if there are no such weights, or a flag asks for another architecture.
    """
    init_from = cfg.init_from or (saved.init_from if saved else None)
    if init_from is None:
        return cfg, None
    cfg = with_fields(cfg, init_from=init_from)
    if saved is not None and saved.init_from == init_from:
        return _with_architecture(cfg, saved.model, saved.tokenizer, given), None
    weights = open_weights(WeightsFlags(init_from=init_from))
    return _with_architecture(cfg, weights.model, weights.tokenizer.name, given), weights


def load_start(weights: Weights, device: Any, like: Any) -> Any:
    """The weights, read onto `device`, placed as parameters `like`, with as many positions."""
    import jax

    params = weights.load(device)
    params["wpe"]["embedding"] = params["wpe"]["embedding"][: like["wpe"]["embedding"].shape[0]]
    # Copies, because a training step donates them.
    return jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding, may_alias=False), params, like
    )


def _with_architecture(
    cfg: Config, model: ModelConfig, tokenizer: str, given: Collection[str]
) -> Config:
    asked = flat_values(cfg)
    names = ("n_layer", "n_head", "n_embd", "bias", "gelu", "vocab_size")
    found = {**{name: getattr(model, name) for name in names}, "tokenizer": tokenizer}
    errors = [
        f"--{name.replace('_', '-')} {asked[name]}: the weights of {cfg.init_from} have "
        f"{found[name]}; leave it out"
        for name in found
        if name in given and asked[name] not in (found[name], None)
    ]
    if "block_size" in given and asked["block_size"] > model.block_size:
        errors.append(
            f"--block-size {asked['block_size']}: the weights of {cfg.init_from} have positions "
            f"for {model.block_size} tokens; it may be shorter, not longer"
        )
    if errors:
        raise ConfigError("\n".join(errors))
    block_size = min(cfg.model.block_size, model.block_size)
    return with_fields(cfg, **found, n_vocab=model.n_vocab, block_size=block_size)
