"""A model for export: padding is dropped, and what only training needs is folded in."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxgpt.config.architecture import ARCHITECTURES, ModelConfig, Shapes, parameter_shapes


def explicit_sizes(cfg: ModelConfig) -> ModelConfig:
    """The same network with all sizes set, also those that follow from others."""
    sizes: dict[str, Any] = {
        "n_kv_head": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "mlp_width": cfg.mlp_hidden,
    }
    options = ARCHITECTURES[cfg.arch].options
    return dataclasses.replace(cfg, **{n: size for n, size in sizes.items() if n in options})


def deployed_config(cfg: ModelConfig) -> ModelConfig:
    """The architecture of `deployed_params`: no padding, and nothing that only training needs."""
    n_vocab = cfg.n_vocab or cfg.vocab_size
    training: dict[str, Any] = {"dropout": 0.0, "zero_init": False, "embedding_norm": False}
    return dataclasses.replace(explicit_sizes(cfg), vocab_size=n_vocab, n_vocab=n_vocab, **training)


def deployed_params(
    cfg: ModelConfig, params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each parameter's path and its value in float32; the logits are those of `params`.

    Padding rows of embeddings are cut. Biases that other programs' GPT-2 has, and this model has
    not, are zeros. The norm after the token embedding is applied to its rows.
    """
    needed = rows_needed(cfg)
    for path in parameter_shapes(cfg):
        array = np.asarray(get_leaf(params, path), np.float32)[: needed.get(path)]
        if cfg.embedding_norm and path == "embed_tokens/embedding":
            squares = np.mean(np.square(array), axis=-1, keepdims=True, dtype=np.float64)
            array = (array / np.sqrt(squares + cfg.norm_eps)).astype(np.float32)
        yield path, np.ascontiguousarray(array)
    for path, shape in zero_biases(cfg).items():
        yield path, np.zeros(shape, np.float32)


def zero_biases(cfg: ModelConfig) -> Shapes:
    """Shapes of the biases that other programs require and a model without biases does not have."""
    if "bias" not in ARCHITECTURES[cfg.arch].options:
        return {}
    with_biases = parameter_shapes(dataclasses.replace(cfg, bias=True))
    return {p: with_biases[p] for p in with_biases.keys() - parameter_shapes(cfg).keys()}


def rows_needed(cfg: ModelConfig) -> dict[str, int]:
    """Rows that the model uses of each table that may have more, by path."""
    used = {"vocab_size": cfg.n_vocab or cfg.vocab_size or 0, "block_size": cfg.block_size}
    axes = ARCHITECTURES[cfg.arch].axes(cfg)
    return {path: used[names[0]] for path, names in axes.items() if names[0] in used}


def get_leaf(tree: Any, path: str) -> Any:
    """The leaf of a parameter tree at 'blocks/0/ln_1/scale'."""
    for key in _keys(path):
        tree = tree[key]
    return tree


def put_leaf(tree: dict, path: str, leaf: Any) -> None:
    """Set a leaf of a parameter tree."""
    *parents, last = _keys(path)
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _keys(path: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in path.split("/")]
