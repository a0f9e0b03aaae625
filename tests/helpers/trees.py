"""The smallest model in the tests, random parameters, and a bit-for-bit comparison of pytrees."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.model.network import init_params

TINY = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, n_vocab=50, bias=False
)


def random_params(cfg: ModelConfig):
    """Random values in every parameter, so that a lost or swapped one is noticed."""
    leaves, tree = jax.tree.flatten(init_params(cfg, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(
        [0.3 * jax.random.normal(k, x.shape) + 0.1 for k, x in zip(keys, leaves, strict=True)]
    )


def assert_trees_equal(a, b) -> None:
    """Assert that all leaves of two pytrees are equal bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
