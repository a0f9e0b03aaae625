"""Text from a model: the prompt in one pass, then a compiled loop that draws a token at a time.

While the text fits the context, a step feeds one token and finds the others in a cache. Past it
the context slides as nanoGPT's does, every position changes, and a step reads the whole window.

Letters besides those of gpt.py: P prompt, W the width it is filled up to, L length of a text,
C tokens of one call, K candidates.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.model.cache import Cache, LayerCache, cached_features, empty_cache
from jaxgpt.model.gpt import GPT, Params
from jaxgpt.model.loss import mask_padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from its logits; the defaults are nanoGPT's."""

    temperature: float = 0.8  # logits are divided by it; 0 takes the likeliest token
    top_k: int | None = 200  # draw from so many of the likeliest tokens only
    top_p: float | None = None  # draw from the fewest tokens that have this probability together
    stop_at: int | None = None  # the id that ends a sample, its length filled up with the same id


class _Decoding(NamedTuple):
    """Where generation stands."""

    window_BT: jax.Array  # int32, the last block_size tokens; before they are there, any filling
    length: jax.Array  # (), int32: tokens so far, those that have left the window included
    done_B: jax.Array  # bool: has drawn `stop_at`
    cache: Cache
    keys_B: jax.Array  # a PRNG key a sample; folded with `length`, never advanced


class Generator:
    """Draws continuations of a prompt; compiled once for a number of samples and a chunk."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        block_size: int,
        sampling: Sampling,
        *,
        chunk: int,
        cached: bool = True,
        results: Mapping[str, Any] | None = None,
    ):
        """`chunk` tokens, or fewer, are made by one call of the compiled loop.

        `cached` False reads the whole window for each token, which is what the cache is measured
        and tested against. `results` tells `jax.jit` where results lie when parameters lie on
        several devices: on all of them.
        """
        self._chunk = chunk
        self._block_size = block_size
        out = results or {}
        self._prefill = jax.jit(partial(_prefill, graphdef), static_argnames="samples", **out)
        # The state is donated: its cache is written in place, not copied with each call.
        decode = partial(_decode, graphdef, sampling, chunk, cached)
        self._decode = jax.jit(decode, donate_argnums=1, **out)

    def stream(
        self,
        params: Params,
        prompt_P: Sequence[int],
        max_new_tokens: int,
        key: jax.Array,
        samples: int,
    ) -> Iterator[np.ndarray]:
        """Yield tokens_BC as they are made, int32, B = samples, C = chunk or less at the end.

        `prompt_P` has at least one token; of more than block_size, the last are seen. Sample b
        depends on `key` and b and not on how many samples there are. Ends early when every sample
        has drawn `stop_at`.
        """
        state = self._prefill(params, *_filled_up(prompt_P, self._block_size), key, samples=samples)
        left = max_new_tokens
        while left > 0:
            state, tokens_BC = self._decode(params, state, min(left, self._chunk))
            yield np.asarray(tokens_BC)[:, :left]
            left -= self._chunk
            if state.done_B.all():
                return

    def generate(
        self,
        params: Params,
        prompt_P: Sequence[int],
        max_new_tokens: int,
        key: jax.Array,
        samples: int,
    ) -> np.ndarray:
        """The tokens of `stream` in one array (samples, max_new_tokens or less)."""
        parts = self.stream(params, prompt_P, max_new_tokens, key, samples)
        return np.concatenate([np.zeros((samples, 0), np.int32), *parts], axis=1)


def _filled_up(prompt_P: Sequence[int], block_size: int) -> tuple[np.ndarray, int]:
    """(prompt_1W, P): the tokens that fit the context; W a power of two, so that few are compiled.

    Causal attention keeps the filling out of sight, and generation writes over it.
    """
    seen = np.asarray(prompt_P, np.int32)[-block_size:]
    assert len(seen), "a prompt has at least one token"
    width = min(block_size, 1 << (len(seen) - 1).bit_length())
    return np.pad(seen, (0, width - len(seen)))[None], len(seen)


def _prefill(
    graphdef: nnx.GraphDef,
    params: Params,
    prompt_1W: jax.Array,
    length: jax.Array,
    key: jax.Array,
    *,
    samples: int,
) -> _Decoding:
    model = nnx.merge(graphdef, params)
    W, T = prompt_1W.shape[1], model.cfg.block_size
    _, cache = cached_features(model, prompt_1W, jnp.zeros((), jnp.int32), empty_cache(model, 1))
    return _Decoding(
        window_BT=jnp.tile(jnp.pad(prompt_1W, ((0, 0), (0, T - W))), (samples, 1)),
        length=jnp.asarray(length, jnp.int32),
        done_B=jnp.zeros(samples, bool),
        cache=[LayerCache(*(jnp.repeat(x, samples, axis=0) for x in layer)) for layer in cache],
        keys_B=jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(samples)),
    )


def _decode(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    chunk: int,
    cached: bool,
    params: Params,
    state: _Decoding,
    wanted: jax.Array,
) -> tuple[_Decoding, jax.Array]:
    """Draw up to `wanted` tokens: (state, tokens_BC), C = chunk."""
    model = nnx.merge(graphdef, params)
    T = model.cfg.block_size
    Carry = tuple[_Decoding, jax.Array, jax.Array]

    def goes_on(carry: Carry, fits: bool) -> jax.Array:
        state, _, made = carry
        more = (made < wanted) & ~state.done_B.all()
        return more & (state.length <= T) if fits else more

    def step(carry: Carry, see: Callable[[GPT, _Decoding], tuple[jax.Array, Cache]]) -> Carry:
        state, tokens_BC, made = carry
        h_BD, cache = see(model, state)
        logits_BV = (h_BD @ model.wte.embedding[...].astype(h_BD.dtype).T).astype(jnp.float32)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.length)
        next_B = draw(mask_padding(logits_BV, model.cfg.n_vocab), keys_B, sampling)
        state = _appended(state, next_B, cache, sampling.stop_at)
        return state, tokens_BC.at[:, made].set(state.window_BT[:, _last(state)]), made + 1

    filling = jnp.full((len(state.done_B), chunk), sampling.stop_at or 0, jnp.int32)
    carry = (state, filling, jnp.zeros((), jnp.int32))
    if cached:
        carry = jax.lax.while_loop(
            partial(goes_on, fits=True), partial(step, see=_see_cached), carry
        )
    state, tokens_BC, _ = jax.lax.while_loop(
        partial(goes_on, fits=False), partial(step, see=_see_window), carry
    )
    return state, tokens_BC


def draw(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """A token for each row, int32 (B,), with one key for each row."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    # From the likeliest token's, or a temperature close to 0 would divide up to infinity.
    logits_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    logits_BV = logits_BV / max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
    pick = jax.vmap(jax.random.categorical)
    if sampling.top_k is None and sampling.top_p is None:
        return pick(keys_B, logits_BV).astype(jnp.int32)
    V = logits_BV.shape[-1]
    best_BK, ids_BK = jax.lax.top_k(logits_BV, min(sampling.top_k or V, V))
    if sampling.top_p is not None:
        p_BK = jax.nn.softmax(best_BK)
        # The token with which the sum passes top_p is still in, so that one always is.
        likelier_BK = jnp.cumsum(p_BK, axis=-1) - p_BK
        best_BK = jnp.where(likelier_BK < sampling.top_p, best_BK, -jnp.inf)
    return jnp.take_along_axis(ids_BK, pick(keys_B, best_BK)[:, None], axis=1)[:, 0]


def _see_cached(model: GPT, state: _Decoding) -> tuple[jax.Array, Cache]:
    last = _last(state)
    token_B1 = jax.lax.dynamic_slice_in_dim(state.window_BT, last, 1, axis=1)
    h_B1D, cache = cached_features(model, token_B1, last, state.cache)
    return h_B1D[:, 0], cache


def _see_window(model: GPT, state: _Decoding) -> tuple[jax.Array, Cache]:
    return model.features(state.window_BT)[:, _last(state)], state.cache


def _last(state: _Decoding) -> jax.Array:
    """Where the newest token stands in the window."""
    return jnp.minimum(state.length, state.window_BT.shape[1]) - 1


def _appended(state: _Decoding, next_B: jax.Array, cache: Cache, stop_at: int | None) -> _Decoding:
    if stop_at is not None:
        next_B = jnp.where(state.done_B, stop_at, next_B)
    is_full = state.length >= state.window_BT.shape[1]
    window_BT = jnp.where(is_full, jnp.roll(state.window_BT, -1, axis=1), state.window_BT)
    state = state._replace(length=state.length + 1, cache=cache)
    return state._replace(
        window_BT=window_BT.at[:, _last(state)].set(next_B),
        done_B=state.done_B if stop_at is None else state.done_B | (next_B == stop_at),
    )
