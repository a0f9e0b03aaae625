"""What all networks have in common: features, logits, losses and cached generation."""

from abc import abstractmethod

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.fields import Remat
from jaxgpt.model.attention import Cache, LayerCache
from jaxgpt.model.blocks import AllGather, run_scanned, run_unrolled
from jaxgpt.model.layers import dropout
from jaxgpt.model.loss import mask_padding, mean_cross_entropy, token_scores


class LanguageModel(nnx.Module):
    """A decoder that computes in `dtype` and keeps its parameters in float32.

    A subclass creates the parameters: a list `blocks`, and what `embed`, `final_norm` and `head`
    read. A block maps (x_BTD, dropout key, its cache, start) to (x_BTD, its new cache).
    """

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, remat: Remat, scan_layers: bool):
        assert cfg.vocab_size is not None, "resolve the vocabulary before building"
        self.cfg = cfg
        self.dtype = dtype
        # In large networks the residual stream exceeds float16's largest number, 65,504.
        self.stream_dtype = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
        self.remat = remat
        self.scan_layers = scan_layers
        self.all_gather: AllGather | None = None  # set by `merge_model` for sharded parameters
        self.drop = nnx.Dropout(cfg.dropout)

    @abstractmethod
    def embed(self, tokens_BT: jax.Array, positions_T: jax.Array) -> jax.Array:
        """The first block's input x_BTD in `stream_dtype`."""

    @abstractmethod
    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        """The norm after the last block."""

    @abstractmethod
    def head(self) -> jax.Array:
        """The output matrix head_VD, float32: logits are h_BTD @ head_VD.T."""

    def features(self, tokens_BT: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The final normed hidden state h_BTD in `dtype`; a `key` turns dropout on."""
        x_BTD = self.embed(tokens_BT, jnp.arange(tokens_BT.shape[1]))
        n = len(self.blocks) + 1
        keys = [None] * n if key is None else list(jax.random.split(key, n))
        x_BTD = dropout(self.drop, x_BTD, keys[-1])
        run = run_scanned if self.scan_layers else run_unrolled
        x_BTD = run(self.blocks, x_BTD, keys[:-1], self.dtype, self.remat, self.all_gather)
        # Recomputed in the backward pass; otherwise XLA keeps the norm's output in float32.
        return jax.checkpoint(self.final_norm)(x_BTD).astype(self.dtype)

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Next-token logits (..., V) of features (..., D): float32, minus infinity for padding."""
        logits_BTV = h_BTD @ self.head().astype(h_BTD.dtype).T
        return mask_padding(logits_BTV.astype(jnp.float32), self.cfg.n_vocab)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Next-token logits_BTV in float32, minus infinity in the padded vocabulary."""
        return self.logits(self.features(tokens_BT))

    def loss(self, tokens_BT1: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Mean next-token loss () in nats, float32, to be differentiated; `key` is dropout's."""
        h_BTD = self.features(tokens_BT1[:, :-1], key if self.cfg.dropout else None)
        return mean_cross_entropy(h_BTD, self.head(), tokens_BT1[:, 1:], self.cfg.n_vocab)

    def token_scores(self, tokens_BT1: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(losses_BT in nats, hits_BT): each next token's loss, and whether it is the likeliest."""
        h_BTD = self.features(tokens_BT1[:, :-1])
        return token_scores(h_BTD, self.head(), tokens_BT1[:, 1:], self.cfg.n_vocab)

    # ------------------------------------------------------------ generation

    @property
    def has_rolling_cache(self) -> bool:
        """Whether cached keys stay valid beyond block_size tokens.

        Rotary ones do: they are cached rotated by their absolute position, and scores depend on
        differences only. With learned positions the window is recomputed for each token.
        """
        return not self.cfg.has_learned_positions

    def empty_cache(self, batch: int) -> Cache:
        """A cache with room for block_size tokens of `batch` sequences."""
        cfg = self.cfg
        zeros = jnp.zeros((batch, cfg.block_size, cfg.kv_heads, cfg.head_width), self.dtype)
        return [LayerCache(zeros, zeros) for _ in range(cfg.n_layer)]

    def cached_features(
        self, tokens_BT: jax.Array, start: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """(h_BTD, cache) of T tokens that follow `start` cached ones; start + T <= block_size.

        Beyond that one token at a time, if `has_rolling_cache`.
        """
        x_BTD = self.embed(tokens_BT, start + jnp.arange(tokens_BT.shape[1]))
        new_cache = []
        for block, layer in zip(self.blocks, cache, strict=True):
            x_BTD, layer = block(x_BTD, cache=layer, start=start)
            new_cache.append(layer)
        return self.final_norm(x_BTD).astype(self.dtype), new_cache
