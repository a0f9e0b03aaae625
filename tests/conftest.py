"""Shapes and steps shared by the tests; every model is tiny and everything runs on the CPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where XLA's compiler for cards is installed, it must not look for one.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import ModelConfig

TINY = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, n_vocab=50, bias=False
)


@pytest.fixture(scope="session")
def tokens_BT1() -> np.ndarray:
    """Six windows of random tokens, (6, 9) uint16."""
    return np.random.default_rng(0).integers(0, TINY.n_vocab, (6, 9)).astype(np.uint16)


def assert_trees_equal(a, b) -> None:
    """Every leaf of two pytrees is equal bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
