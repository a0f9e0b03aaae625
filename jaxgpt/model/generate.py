"""Text from a model: one compiled loop that draws a token at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.model.gpt import Params
from jaxgpt.model.loss import mask_padding

Generate = Callable[[Params, jax.Array, jax.Array], jax.Array]


def make_generate(
    graphdef: nnx.GraphDef,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 200,
) -> Generate:
    """Make `generate(params, prompt_BP, key) -> tokens_BL`, int32, L = P + max_new_tokens.

    Each new token is drawn from the `top_k` likeliest after dividing the logits by `temperature`
    (nanoGPT's defaults), seeing at most the last block_size tokens. Padded ids are never drawn.
    """

    def generate(params: Params, prompt_BP: jax.Array, key: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        T = model.cfg.block_size
        B, P = prompt_BP.shape
        L = P + max_new_tokens
        # Long enough for one window; what lies beyond position i cannot be seen from it.
        tokens_BL = jnp.zeros((B, max(L, T)), jnp.int32).at[:, :P].set(prompt_BP)

        def draw_next(i: jax.Array, tokens_BL: jax.Array) -> jax.Array:
            start = jnp.maximum(i - T, 0)
            window_BT = jax.lax.dynamic_slice_in_dim(tokens_BL, start, T, axis=1)
            h_BD = model.features(window_BT)[:, i - 1 - start]
            logits_BV = h_BD @ model.wte.embedding[...].astype(h_BD.dtype).T
            logits_BV = mask_padding(logits_BV.astype(jnp.float32), model.cfg.n_vocab)
            k = min(top_k, model.cfg.n_vocab or logits_BV.shape[-1])
            best_BK, ids_BK = jax.lax.top_k(logits_BV / temperature, k)
            picked_B = jax.random.categorical(jax.random.fold_in(key, i), best_BK)
            next_B = jnp.take_along_axis(ids_BK, picked_B[:, None], axis=1)[:, 0]
            return tokens_BL.at[:, i].set(next_B)

        return jax.lax.fori_loop(P, L, draw_next, tokens_BL)[:, :L]

    return jax.jit(generate)
