"""Qwen3 in Flax NNX: RMSNorm, rotary positions, grouped heads with QK-norm, SwiGLU, no biases.

Without QK-norm it is Llama. The numerics are those of transformers' `Qwen3ForCausalLM`, and so are
most names of parameters. Axes are those of `gpt.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.fields import Remat
from jaxgpt.model.attention import Attend, LayerCache, attention
from jaxgpt.model.blocks import Block, make_blocks
from jaxgpt.model.language_model import LanguageModel
from jaxgpt.model.layers import INIT_STD, Norm, linears_of_norm, make_linear
from jaxgpt.model.rms_norm import RMSNorm, rms_normalize
from jaxgpt.model.rotary import rotate, rotation
from jaxgpt.model.swiglu import swiglu


class Qwen3(LanguageModel):
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
        self.embed_tokens = nnx.Embed(cfg.vocab_size, cfg.n_embd, embedding_init=init, rngs=rngs)
        self.blocks = make_blocks(
            cfg.n_layer, lambda rngs: Qwen3Block(cfg, dtype, attend, rngs), rngs
        )
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        if not cfg.tied_head:
            head = nnx.initializers.zeros if cfg.zero_init else init
            self.lm_head = nnx.Embed(cfg.vocab_size, cfg.n_embd, embedding_init=head, rngs=rngs)

    def embed(self, tokens_BT: jax.Array, positions_T: jax.Array) -> jax.Array:
        """Token embeddings x_BTD in `stream_dtype`."""
        # Looked up in float32, so that the embedding's gradient is summed in float32.
        x_BTD = self.embed_tokens(tokens_BT.astype(jnp.int32)).astype(self.stream_dtype)
        if not self.cfg.embedding_norm:
            return x_BTD
        return rms_normalize(x_BTD, jnp.ones(self.cfg.n_embd), self.cfg.norm_eps)

    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        return self.norm(x_BTD)

    def head(self) -> jax.Array:
        """The matrix of the head, or the token embedding if the two are tied."""
        return (self.embed_tokens if self.cfg.tied_head else self.lm_head).embedding[...]


class Qwen3Block(Block):
    """A block with Qwen3's names."""

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, attend: Attend, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.attn = Attention(cfg, dtype, attend, rngs)
        self.post_attention_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = MLP(cfg, dtype, rngs)
        self.drop = nnx.Dropout(cfg.dropout)

    def norms(self) -> tuple[Norm, Norm]:
        return self.input_layernorm, self.post_attention_layernorm


class Attention(nnx.Module):
    """Causal self-attention; N / K adjacent heads share a head of keys and values."""

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, attend: Attend, rngs: nnx.Rngs):
        self.cfg = cfg
        self.attend = attend
        D, N, K, H = cfg.n_embd, cfg.n_head, cfg.kv_heads, cfg.head_width
        self.q_proj = make_linear(cfg, D, N * H, dtype, rngs)
        self.k_proj = make_linear(cfg, D, K * H, dtype, rngs)
        self.v_proj = make_linear(cfg, D, K * H, dtype, rngs)
        self.o_proj = make_linear(cfg, N * H, D, dtype, rngs, residual=True)
        if cfg.arch == "qwen3":
            self.q_norm, self.k_norm = RMSNorm(H, cfg.norm_eps), RMSNorm(H, cfg.norm_eps)

    def __call__(
        self,
        x_BTD: jax.Array,
        norm: Norm,
        cache: LayerCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        (B, T, _), H = x_BTD.shape, self.cfg.head_width
        q_BTNH, k_BTKH, v_BTKH = (
            y.reshape(B, T, -1, H)
            for y in linears_of_norm([self.q_proj, self.k_proj, self.v_proj], norm, x_BTD)
        )
        if self.cfg.arch == "qwen3":
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        angles = rotation(start + jnp.arange(T), H, self.cfg.rope_theta)
        q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
        out_BTNH, cache = attention(self.attend, q_BTNH, k_BTKH, v_BTKH, cache, start)
        return self.o_proj(out_BTNH.reshape(B, T, -1)), cache


class MLP(nnx.Module):
    """SwiGLU between linear layers."""

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, F = cfg.n_embd, cfg.mlp_hidden
        self.gate_proj = make_linear(cfg, D, F, dtype, rngs)
        self.up_proj = make_linear(cfg, D, F, dtype, rngs)
        self.down_proj = make_linear(cfg, F, D, dtype, rngs, residual=True)

    def __call__(self, x_BTD: jax.Array, norm: Norm) -> jax.Array:
        gate_BTF, up_BTF = linears_of_norm([self.gate_proj, self.up_proj], norm, x_BTD)
        return self.down_proj(swiglu(gate_BTF, up_BTF))
