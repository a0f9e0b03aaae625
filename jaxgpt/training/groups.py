"""The groups of parameters that the optimizer treats differently, by path."""

from typing import Any, Literal

import jax

from jaxgpt.config.optimizer import OptimizerConfig

Group = Literal["matrix", "embedding", "head", "vector"]


def group_of(path: str) -> Group:
    """The group of a parameter, by its path: 'blocks/0/attn/c_attn/kernel' is a matrix.

    A tied head has no parameter of its own; its matrix is the embedding.
    """
    if path.endswith("kernel"):
        return "matrix"
    if path.endswith("embedding"):
        return "head" if path.startswith("lm_head") else "embedding"
    return "vector"


def is_vector(path: str) -> bool:
    """Whether a parameter is a norm's scale or a bias: neither decayed nor sharded along `fsdp`.

    It is too small for sharding to be worth a collective.
    """
    return group_of(path) == "vector"


def peak_rates(cfg: OptimizerConfig) -> dict[Group, float]:
    """The peak learning rate of each group."""
    peak = cfg.learning_rate
    return {
        "matrix": peak,
        "embedding": cfg.embedding_lr or peak,
        "head": cfg.head_lr or peak,
        "vector": cfg.vector_lr or peak,
    }


def joined(path: Any) -> str:
    """A path of `jax.tree.map_with_path` as text: 'blocks/0/attn/c_attn/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
