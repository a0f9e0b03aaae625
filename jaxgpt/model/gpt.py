"""GPT-2 in Flax NNX: pre-LN blocks, fused qkv, learned positions, tied head.

`GPT` is an ordinary module; outside this package it is a pair `(graphdef, params)` made by
`build_gpt` and put together again by `nnx.merge(graphdef, params)`, so that optimizer, checkpoints
and step see a plain nested dict with paths such as `blocks/0/attn/c_attn/kernel`.

Shapes live in names, with the letters of `jax.nn.dot_product_attention`:
A micro-batches, B batch, T time, S key time, D width, N heads, H head width, F MLP width,
V vocabulary; T1 is T + 1; M is B * T, rows of a batch laid end to end.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.fields import Remat
from jaxgpt.model.attention import Attend
from jaxgpt.model.gelu import GELUS
from jaxgpt.model.layer_norm import LayerNorm, normalize
from jaxgpt.model.loss import mask_padding
from jaxgpt.model.remat import rematerialized

Params = dict[str, Any]
# Shards of parameters, a dtype -> the parameters, matrices in that dtype (`hardware/mesh.py`).
Gather = Callable[[Params, Any], Params]
INIT_STD = 0.02  # GPT-2's, for every matrix and embedding


class GPT(nnx.Module):
    """Next-token logits from token ids. Computes in `dtype`, keeps its parameters in float32."""

    def __init__(
        self,
        cfg: ModelConfig,
        dtype: jnp.dtype,
        attend: Attend,
        rngs: nnx.Rngs,
        remat: Remat = "none",
        scan_layers: bool = False,
    ):
        assert cfg.vocab_size is not None, "resolve the vocabulary before building"
        init = nnx.initializers.normal(INIT_STD)
        self.cfg = cfg
        self.dtype = dtype
        self.remat = remat
        self.scan_layers = scan_layers
        self.gather: Gather | None = None  # set where the blocks hold shards: `merge_shards`
        self.wte = nnx.Embed(cfg.vocab_size, cfg.n_embd, embedding_init=init, rngs=rngs)
        self.wpe = nnx.Embed(cfg.block_size, cfg.n_embd, embedding_init=init, rngs=rngs)
        self.drop = nnx.Dropout(cfg.dropout)
        self.blocks = nnx.List([Block(cfg, dtype, attend, rngs) for _ in range(cfg.n_layer)])
        self.ln_f = LayerNorm(cfg.n_embd, cfg.bias)

    def features(self, tokens_BT: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The final normed hidden state h_BTD in `dtype`; `key` switches dropout on."""
        _, T = tokens_BT.shape
        # Rows are gathered and added in float32, so that their gradients are summed in float32.
        x_BTD = self.wte(tokens_BT.astype(jnp.int32)) + self.wpe(jnp.arange(T))
        keys = [None] * (len(self.blocks) + 1) if key is None else _split(key, len(self.blocks) + 1)
        x_BTD = dropout(self.drop, x_BTD.astype(self.dtype), keys[-1])
        through = scanned if self.scan_layers else unrolled
        return self.ln_f(through(self.blocks, x_BTD, keys[:-1], self.remat, self.gather))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Next-token logits_BTV in float32, minus infinity in the padded vocabulary."""
        logits_BTV = self.features(tokens_BT) @ self.wte.embedding[...].astype(self.dtype).T
        return mask_padding(logits_BTV.astype(jnp.float32), self.cfg.n_vocab)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, attend: Attend, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(cfg.n_embd, cfg.bias)
        self.attn = Attention(cfg, dtype, attend, rngs)
        self.ln_2 = LayerNorm(cfg.n_embd, cfg.bias)
        self.mlp = MLP(cfg, dtype, rngs)
        self.drop = nnx.Dropout(cfg.dropout)

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        attn_key, mlp_key = (None, None) if key is None else _split(key, 2)
        x_BTD = add_by_rows(x_BTD, dropout(self.drop, self.attn(x_BTD, self.ln_1), attn_key))
        return add_by_rows(x_BTD, dropout(self.drop, self.mlp(x_BTD, self.ln_2), mlp_key))


Keys = list[jax.Array] | list[None]  # one for each block; None without dropout


def unrolled(
    blocks: nnx.List, x_BTD: jax.Array, keys: Keys, remat: Remat, gather: Gather | None = None
) -> jax.Array:
    """x through the blocks, each compiled for itself."""
    for block, key in zip(blocks, keys, strict=True):
        run = block if gather is None else gathering(block, gather)
        x_BTD = rematerialized(run, remat)(x_BTD, key)
    return x_BTD


def gathering(block: "Block", gather: Gather) -> Callable[..., jax.Array]:
    """A block of shards, which is put together when it runs, and with remat again to run back."""
    graphdef, shards = nnx.graphdef(block), nnx.to_pure_dict(nnx.state(block, nnx.Param))
    return lambda x_BTD, key: nnx.merge(graphdef, gather(shards, x_BTD.dtype))(x_BTD, key)


def scanned(
    blocks: nnx.List, x_BTD: jax.Array, keys: Keys, remat: Remat, gather: Gather | None = None
) -> jax.Array:
    """x through the blocks by one `lax.scan` over their stacked parameters.

    Compiles in a time that does not grow with depth. Costs a stack of all the weights and, in the
    backward pass, one of their gradients; matrices are stacked in the dtype of their products.
    """
    graphdef = nnx.graphdef(blocks[0])
    params = [nnx.to_pure_dict(nnx.state(block, nnx.Param)) for block in blocks]
    dtype = x_BTD.dtype if gather is None else jnp.float32  # shards are cast when gathered
    stacked = jax.tree.map(lambda *leaves: _stack(leaves, dtype), *params)

    def one(x_BTD: jax.Array, layer: tuple[Params, jax.Array | None]) -> tuple[jax.Array, None]:
        params, key = layer
        params = params if gather is None else gather(params, x_BTD.dtype)
        return nnx.merge(graphdef, params)(x_BTD, key), None

    stacked_keys = None if keys[0] is None else jnp.stack(keys)
    return jax.lax.scan(rematerialized(one, remat), x_BTD, (stacked, stacked_keys))[0]


def _stack(leaves: tuple[jax.Array, ...], dtype: jnp.dtype) -> jax.Array:
    # Norms' scales and biases stay in float32, in which they are used.
    return jnp.stack([leaf.astype(dtype) if leaf.ndim > 1 else leaf for leaf in leaves])


class Attention(nnx.Module):
    """Causal self-attention; `attend` is the kernel chosen for the device."""

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, attend: Attend, rngs: nnx.Rngs):
        self.n_head = cfg.n_head
        self.attend = attend
        self.c_attn = make_linear(cfg, cfg.n_embd, 3 * cfg.n_embd, dtype, rngs)
        self.c_proj = make_linear(cfg, cfg.n_embd, cfg.n_embd, dtype, rngs, residual=True)

    def __call__(self, x_BTD: jax.Array, norm: LayerNorm) -> jax.Array:
        q_BTNH, k_BTNH, v_BTNH = self.heads(linear_of_norm(self.c_attn, norm, x_BTD))
        return self.c_proj(self.attend(q_BTNH, k_BTNH, v_BTNH).reshape(x_BTD.shape))

    def heads(self, qkv_BTE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q_BTNH, k_BTNH, v_BTNH) of what `c_attn` gives, E = 3 * D."""
        B, T, E = qkv_BTE.shape
        qkv_BT3NH = qkv_BTE.reshape(B, T, 3, self.n_head, E // 3 // self.n_head)
        q_BTNH, k_BTNH, v_BTNH = jnp.unstack(qkv_BT3NH, axis=2)
        return q_BTNH, k_BTNH, v_BTNH


class MLP(nnx.Module):
    """Four times as wide in the middle."""

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gelu = GELUS[cfg.gelu]
        self.c_fc = make_linear(cfg, cfg.n_embd, 4 * cfg.n_embd, dtype, rngs)
        self.c_proj = make_linear(cfg, 4 * cfg.n_embd, cfg.n_embd, dtype, rngs, residual=True)

    def __call__(self, x_BTD: jax.Array, norm: LayerNorm) -> jax.Array:
        return self.narrowed(linear_of_norm(self.c_fc, norm, x_BTD))

    def narrowed(self, h_BTF: jax.Array) -> jax.Array:
        """What becomes of `c_fc`'s output, in the width of the residual stream."""
        return self.c_proj(self.gelu(h_BTF))


def make_linear(
    cfg: ModelConfig,
    d_in: int,
    d_out: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    residual: bool = False,
) -> nnx.Linear:
    """A linear layer; those that write to the residual stream start smaller by sqrt(2 n_layer)."""
    std = INIT_STD / math.sqrt(2 * cfg.n_layer) if residual else INIT_STD
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=cfg.bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.normal(std),
        dot_general=dot_general_by_rows,
        rngs=rngs,
    )


def dot_general_by_rows(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """`lax.dot_general` of x (..., d_in) and kernel (d_in, d_out), leading axes laid end to end.

    The weight gradient then contracts one axis instead of two, for which XLA:CPU has its fast
    matrix product (a training step of the demo takes two thirds of the time).
    """
    y_MF = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())))
    return y_MF.reshape(*x.shape[:-1], kernel.shape[-1])


def linear_of_norm(linear: nnx.Linear, norm: LayerNorm, x: jax.Array) -> jax.Array:
    """`linear(norm(x))`, with the norm's scale and bias worked into the linear layer's.

    The gradient of a scale is then a sum over a matrix and not over all tokens, for which XLA would
    write out a float32 product as large as x and read it again. To one token at a time, as in
    generation, this has nothing to give.
    """
    kernel = norm.scale[...][:, None] * linear.kernel[...]
    normed = normalize(x, jnp.ones_like(norm.scale[...]))  # XLA leaves a factor of one out
    y = dot_general_by_rows(normed, kernel.astype(x.dtype))
    if norm.bias is None:
        return y
    bias = linear.bias[...] + norm.bias[...] @ linear.kernel[...]
    return y + bias.astype(x.dtype)


def add_by_rows(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """x + y, leading axes laid end to end as `dot_general_by_rows` had them for y.

    That product then adds x itself. With a reshape in between XLA takes x for its own, has cuBLAS
    add in place, and makes a copy of x before.
    """
    D = x_BTD.shape[-1]
    return (x_BTD.reshape(-1, D) + y_BTD.reshape(-1, D)).reshape(x_BTD.shape)


def dropout(layer: nnx.Dropout, x: jax.Array, key: jax.Array | None) -> jax.Array:
    return layer(x, deterministic=key is None, rngs=key)


def _split(key: jax.Array, n: int) -> list[jax.Array]:
    return list(jax.random.split(key, n))


def build_gpt(
    cfg: ModelConfig, dtype: Any, attend: Attend, remat: Remat = "none", scan_layers: bool = False
) -> nnx.GraphDef:
    """The network without its parameters: `nnx.merge(graphdef, params)` is a GPT."""
    abstract = nnx.eval_shape(
        lambda: GPT(cfg, jnp.dtype(dtype), attend, nnx.Rngs(0), remat, scan_layers)
    )
    return nnx.graphdef(abstract)


def merge_shards(graphdef: nnx.GraphDef, params: Params, gather: Gather | None) -> GPT:
    """The GPT of `params`; of shards if there is a `gather`, by which blocks become whole as they
    run, and all else at once."""
    if gather is None:
        return nnx.merge(graphdef, params)
    ends = {name: part for name, part in params.items() if name != "blocks"}
    model = nnx.merge(graphdef, {**params, **gather(ends, jnp.float32)})
    model.gather = gather
    return model


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Random parameters as a plain nested dict of float32 arrays, nanoGPT's distributions."""

    def init(key: jax.Array) -> Params:
        model = GPT(cfg, jnp.dtype(jnp.float32), _no_attention, nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    return jax.jit(init)(key)


def _no_attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
    raise AssertionError("a model made for its parameters is not called")
