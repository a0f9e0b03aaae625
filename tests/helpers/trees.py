"""The smallest models in the tests, and a bit-for-bit comparison of pytrees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config.architecture import ModelConfig

TINY = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, n_vocab=50, bias=False
)
# No two of its axes have the same length.
TINY_QWEN3 = dataclasses.replace(
    TINY,
    **dict(arch="qwen3", n_kv_head=1, head_dim=24, mlp_width=40),
    **dict(tied_head=False, embedding_norm=True),
)
MODELS = {"gpt2": TINY, "qwen3": TINY_QWEN3}


def assert_trees_equal(a, b) -> None:
    """Assert that all leaves of two pytrees are equal bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
