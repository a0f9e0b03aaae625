"""GPT-2 in Flax NNX: pre-LN blocks, fused qkv, learned positions, tied head.

`GPT` is an ordinary module. Outside this package it is a pair `(graphdef, params)`, which
`nnx.merge(graphdef, params)` joins again (`network.py`), so that optimizer, checkpoints and step
see a plain nested dict with paths such as `blocks/0/attn/c_attn/kernel`. The shapes of its
parameters are declared a second time, without JAX, in `config/architecture.py`.

Names of arrays end in their axes, with the letters of `jax.nn.dot_product_attention`:
A micro-batches, B batch, T time, S key time, D width, N heads, K heads of keys and values,
H head width, F MLP width, V vocabulary; T1 is T + 1; E is 3 * D; M is B * T, the flattened rows of
a batch.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.fields import Remat
from jaxgpt.model.attention import Attend, LayerCache, attention, cudnn_attention
from jaxgpt.model.blocks import Block, make_blocks
from jaxgpt.model.gelu import Gelu, pick_gelu
from jaxgpt.model.language_model import LanguageModel
from jaxgpt.model.layer_norm import LayerNorm
from jaxgpt.model.layers import INIT_STD, Norm, linears_of_norm, make_linear


class GPT(LanguageModel):
    """Next-token logits from token ids."""

    def __init__(
        self,
        cfg: ModelConfig,
        dtype: jnp.dtype,
        attend: Attend,
        rngs: nnx.Rngs,
        remat: Remat = "none",
        scan_layers: bool = False,
    ):
        super().__init__(cfg, dtype, remat, scan_layers)
        init = nnx.initializers.normal(INIT_STD)
        self.wte = nnx.Embed(cfg.vocab_size, cfg.n_embd, embedding_init=init, rngs=rngs)
        self.wpe = nnx.Embed(cfg.block_size, cfg.n_embd, embedding_init=init, rngs=rngs)
        gelu = pick_gelu(cfg.gelu, dtype, remat)
        self.blocks = make_blocks(
            cfg.n_layer, lambda rngs: GPTBlock(cfg, dtype, attend, gelu, rngs), rngs
        )
        self.ln_f = LayerNorm(cfg.n_embd, cfg.bias)

    def embed(self, tokens_BT: jax.Array, positions_T: jax.Array) -> jax.Array:
        """Token plus position embeddings, x_BTD in `stream_dtype`."""
        # Looked up and added in float32, so that their gradients are summed in float32.
        x_BTD = self.wte(tokens_BT.astype(jnp.int32)) + self.wpe(positions_T)
        return x_BTD.astype(self.stream_dtype)

    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        return self.ln_f(x_BTD)

    def head(self) -> jax.Array:
        """The token embedding, which is tied to the head."""
        return self.wte.embedding[...]


class GPTBlock(Block):
    """A block with GPT-2's names."""

    def __init__(
        self, cfg: ModelConfig, dtype: jnp.dtype, attend: Attend, gelu: Gelu, rngs: nnx.Rngs
    ):
        self.ln_1 = LayerNorm(cfg.n_embd, cfg.bias)
        self.attn = Attention(cfg, dtype, attend, rngs)
        self.ln_2 = LayerNorm(cfg.n_embd, cfg.bias)
        self.mlp = MLP(cfg, dtype, gelu, rngs)
        self.drop = nnx.Dropout(cfg.dropout)

    def norms(self) -> tuple[Norm, Norm]:
        return self.ln_1, self.ln_2


class Attention(nnx.Module):
    """Causal self-attention; `attend` is the kernel chosen for the device."""

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, attend: Attend, rngs: nnx.Rngs):
        self.n_head = cfg.n_head
        self.attend = attend
        # cuDNN reads q, k and v from separate arrays: XLA would copy them out of a joint one.
        self.parts = 3 if attend is cudnn_attention else 1
        self.c_attn = make_linear(cfg, cfg.n_embd, 3 * cfg.n_embd, dtype, rngs)
        self.c_proj = make_linear(cfg, cfg.n_embd, cfg.n_embd, dtype, rngs, residual=True)

    def __call__(
        self,
        x_BTD: jax.Array,
        norm: LayerNorm,
        cache: LayerCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        B, T, D = x_BTD.shape
        shape = (B, T, 3 // self.parts, self.n_head, D // self.n_head)
        parts = linears_of_norm([self.c_attn], norm, x_BTD, self.parts)
        q_BTNH, k_BTNH, v_BTNH = (
            y_BTNH for part in parts for y_BTNH in jnp.unstack(part.reshape(shape), axis=2)
        )
        out_BTNH, cache = attention(self.attend, q_BTNH, k_BTNH, v_BTNH, cache, start)
        return self.c_proj(out_BTNH.reshape(x_BTD.shape)), cache


class MLP(nnx.Module):
    """Two linear layers with a GELU between them, four times as wide as the model."""

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, gelu: Gelu, rngs: nnx.Rngs):
        self.gelu = gelu
        self.c_fc = make_linear(cfg, cfg.n_embd, 4 * cfg.n_embd, dtype, rngs)
        self.c_proj = make_linear(cfg, 4 * cfg.n_embd, cfg.n_embd, dtype, rngs, residual=True)

    def __call__(self, x_BTD: jax.Array, norm: LayerNorm) -> jax.Array:
        (h_BTF,) = linears_of_norm([self.c_fc], norm, x_BTD)
        return self.c_proj(self.gelu(h_BTF))
