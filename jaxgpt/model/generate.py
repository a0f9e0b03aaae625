"""Text generation: one forward pass over the prompt, then a compiled loop, one token at a time.

While the text fits the context, a step computes one token and reads the others from the key-value
cache. With rotary positions this holds beyond the context, too: each token attends to the last
block_size tokens, and its keys replace those of the oldest. With learned positions the window then
slides, as nanoGPT's does; every position changes, so each step computes the full window.

Axes besides those of gpt.py: P prompt, W prompt padded, C tokens per call; K is candidates here.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.model.attention import Cache, LayerCache
from jaxgpt.model.blocks import Params
from jaxgpt.model.language_model import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the logits; the defaults are nanoGPT's."""

    temperature: float = 0.8  # divides the logits; 0 takes the likeliest token
    top_k: int | None = 200  # draw from this many of the likeliest tokens only
    top_p: float | None = None  # draw from the fewest tokens that reach this probability together
    stop_at: int | None = None  # the id that ends a sample, and pads it to the others' length


class _Decoding(NamedTuple):
    """The state of the generation loop."""

    window_BT: jax.Array  # int32, the last block_size tokens; undefined beyond `length`
    length: jax.Array  # (), int32: tokens so far, including those that have left the window
    done_B: jax.Array  # bool: has drawn `stop_at`
    cache: Cache
    keys_B: jax.Array  # one PRNG key per sample; folded with `length`, never advanced


class Generator:
    """Samples continuations of a prompt; compiled for each number of samples."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        block_size: int,
        sampling: Sampling,
        *,
        chunk: int,
        cached: bool = True,
        jit_options: Mapping[str, Any] | None = None,
    ):
        """One call of the compiled loop generates up to `chunk` tokens.

        `cached` False computes the full window for each token, the reference that the cache is
        tested and timed against; with rotary positions the two differ beyond the context.
        `jit_options` are arguments of `jax.jit` (`layout.jit_options`).
        """
        self._chunk = chunk
        self._block_size = block_size
        options = jit_options or {}
        self._prefill = jax.jit(partial(_prefill, graphdef), static_argnames="samples", **options)
        # The state is donated, so that its cache is updated in place and not copied at each call.
        decode = partial(_decode, graphdef, sampling, chunk, cached)
        self._decode = jax.jit(decode, donate_argnums=1, **options)

    def stream(
        self,
        params: Params,
        prompt_P: Sequence[int],
        max_new_tokens: int,
        key: jax.Array,
        samples: int,
    ) -> Iterator[np.ndarray]:
        """Yield tokens_BC as they are generated: int32, B = samples, C <= chunk.

        `prompt_P` has at least one token; the model sees its last block_size. Sample b depends on
        `key` and b, not on the number of samples. Ends early once all samples have drawn `stop_at`.
        """
        state = self._prefill(params, *_padded(prompt_P, self._block_size), key, samples=samples)
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
        """The tokens of `stream` in one array (samples, at most max_new_tokens)."""
        parts = self.stream(params, prompt_P, max_new_tokens, key, samples)
        return np.concatenate([np.zeros((samples, 0), np.int32), *parts], axis=1)


def _padded(prompt_P: Sequence[int], block_size: int) -> tuple[np.ndarray, int]:
    """(prompt_1W, P): the tokens that fit the context, padded to a power of two.

    So only a few widths are compiled. Causal attention masks the padding, and generation
    overwrites it.
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
    start = jnp.zeros((), jnp.int32)
    _, cache = model.cached_features(prompt_1W, start, model.empty_cache(batch=1))
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
    count: jax.Array,
) -> tuple[_Decoding, jax.Array]:
    """Draw up to `count` tokens: (state, tokens_BC), C = chunk."""
    model = nnx.merge(graphdef, params)
    T = model.cfg.block_size
    Carry = tuple[_Decoding, jax.Array, jax.Array]

    def is_unfinished(carry: Carry, within_context: bool) -> jax.Array:
        state, _, drawn = carry
        more = (drawn < count) & ~state.done_B.all()
        return more & (state.length <= T) if within_context else more

    def step(carry: Carry, features: Features) -> Carry:
        state, tokens_BC, drawn = carry
        h_BD, cache = features(model, state)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.length)
        next_B = draw(model.logits(h_BD), keys_B, sampling)
        state = _appended(state, next_B, cache, sampling.stop_at)
        return state, tokens_BC.at[:, drawn].set(state.window_BT[:, _last(state)]), drawn + 1

    padding_BC = jnp.full((len(state.done_B), chunk), sampling.stop_at or 0, jnp.int32)
    carry = (state, padding_BC, jnp.zeros((), jnp.int32))
    if cached:
        carry = jax.lax.while_loop(
            partial(is_unfinished, within_context=not model.has_rolling_cache),
            partial(step, features=_cached_features),
            carry,
        )
    if not (cached and model.has_rolling_cache):
        carry = jax.lax.while_loop(
            partial(is_unfinished, within_context=False),
            partial(step, features=_window_features),
            carry,
        )
    return carry[0], carry[1]


def draw(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw a token for each row, int32 (B,), with one PRNG key per row."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    # Relative to the largest, so that a temperature close to 0 does not overflow.
    logits_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    logits_BV = logits_BV / max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
    pick = jax.vmap(jax.random.categorical)
    if sampling.top_k is None and sampling.top_p is None:
        return pick(keys_B, logits_BV).astype(jnp.int32)
    V = logits_BV.shape[-1]
    best_BK, ids_BK = jax.lax.top_k(logits_BV, min(sampling.top_k or V, V))
    if sampling.top_p is not None:
        p_BK = jax.nn.softmax(best_BK)
        # Includes the token at which the sum passes top_p, so that at least one remains.
        likelier_BK = jnp.cumsum(p_BK, axis=-1) - p_BK
        best_BK = jnp.where(likelier_BK < sampling.top_p, best_BK, -jnp.inf)
    return jnp.take_along_axis(ids_BK, pick(keys_B, best_BK)[:, None], axis=1)[:, 0]


# (model, state) -> (h_BD of the newest token, cache)
Features = Callable[[LanguageModel, _Decoding], tuple[jax.Array, Cache]]


def _cached_features(model: LanguageModel, state: _Decoding) -> tuple[jax.Array, Cache]:
    token_B1 = jax.lax.dynamic_slice_in_dim(state.window_BT, _last(state), 1, axis=1)
    h_B1D, cache = model.cached_features(token_B1, state.length - 1, state.cache)
    return h_B1D[:, 0], cache


def _window_features(model: LanguageModel, state: _Decoding) -> tuple[jax.Array, Cache]:
    return model.features(state.window_BT)[:, _last(state)], state.cache


def _last(state: _Decoding) -> jax.Array:
    """Index of the newest token in the window."""
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
