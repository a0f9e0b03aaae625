"""The network of a `ModelConfig` as `(graphdef, params)`; maps `arch` to its class."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config.architecture import Arch, ModelConfig
from jaxgpt.config.fields import Remat
from jaxgpt.model.attention import Attend
from jaxgpt.model.blocks import AllGather, Params
from jaxgpt.model.gpt import GPT
from jaxgpt.model.language_model import LanguageModel
from jaxgpt.model.qwen3 import Qwen3

NETWORKS: dict[Arch, Callable[..., LanguageModel]] = {"gpt2": GPT, "qwen3": Qwen3, "llama": Qwen3}


def build_model(
    cfg: ModelConfig, dtype: Any, attend: Attend, remat: Remat = "none", scan_layers: bool = False
) -> nnx.GraphDef:
    """The network without its parameters: `nnx.merge(graphdef, params)` is a LanguageModel."""
    abstract = nnx.eval_shape(
        lambda: NETWORKS[cfg.arch](cfg, jnp.dtype(dtype), attend, nnx.Rngs(0), remat, scan_layers)
    )
    return nnx.graphdef(abstract)


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Random parameters as a plain nested dict of float32 arrays."""

    def init(key: jax.Array) -> Params:
        rngs = nnx.Rngs(params=key)
        model = NETWORKS[cfg.arch](cfg, jnp.dtype(jnp.float32), _no_attention, rngs)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    return jax.jit(init)(key)


def _no_attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
    raise AssertionError("a model built for its parameters only was called")


def merge_model(
    graphdef: nnx.GraphDef, params: Params, all_gather: AllGather | None
) -> LanguageModel:
    """`nnx.merge(graphdef, params)`; `all_gather` is for sharded parameters.

    It is applied to each block when the block runs, and here to all other parameters.
    """
    if all_gather is None:
        return nnx.merge(graphdef, params)
    others = {name: part for name, part in params.items() if name != "blocks"}
    model = nnx.merge(graphdef, {**params, **all_gather(others, jnp.float32)})
    model.all_gather = all_gather
    return model


def shorten_context(params: Params, like: Params) -> Params:
    """`params` cut to the number of learned positions of `like`, which must not have more.

    Without learned positions, `params` as they are.
    """
    if "wpe" not in like:
        return params
    positions = like["wpe"]["embedding"].shape[0]
    return {**params, "wpe": {"embedding": params["wpe"]["embedding"][:positions]}}
