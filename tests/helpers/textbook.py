"""The networks in plain jax.numpy: full logits, automatic gradients, no module of the package."""

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config.architecture import ModelConfig


def loss(cfg: ModelConfig, params, tokens_BT1) -> jax.Array:
    """Mean next-token loss () in nats."""
    logits = LOGITS[cfg.arch](cfg, params, tokens_BT1[:, :-1])[..., : cfg.n_vocab]
    targets = tokens_BT1[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def gpt2_logits(cfg: ModelConfig, params, tokens_BT) -> jax.Array:
    wte, wpe = params["wte"]["embedding"], params["wpe"]["embedding"]

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"]

    def attention(x, p):
        heads = (*x.shape[:2], cfg.n_head, -1)
        q, k, v = (y.reshape(heads) for y in jnp.split(x @ p["c_attn"]["kernel"], 3, -1))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return out.reshape(x.shape) @ p["c_proj"]["kernel"]

    def mlp(x, p):
        return jax.nn.gelu(x @ p["c_fc"]["kernel"], approximate=True) @ p["c_proj"]["kernel"]

    x = wte[tokens_BT] + wpe[: tokens_BT.shape[1]]
    for i in range(cfg.n_layer):
        block = params["blocks"][i]
        x = x + attention(norm(x, block["ln_1"]), block["attn"])
        x = x + mlp(norm(x, block["ln_2"]), block["mlp"])
    return norm(x, params["ln_f"]) @ wte.T


def qwen3_logits(cfg: ModelConfig, params, tokens_BT) -> jax.Array:
    """Of Qwen3, and of Llama, which has no norms of queries and keys; head by head."""
    N, K, H = cfg.n_head, cfg.kv_heads, cfg.head_width
    T = tokens_BT.shape[1]

    def norm(x, p):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + cfg.norm_eps) * p["scale"]

    def rotate(x_BTH):
        angles = jnp.arange(T)[:, None] * cfg.rope_theta ** (-2 * jnp.arange(H // 2) / H)
        angles = jnp.concatenate([angles, angles], 1)
        half_turned = jnp.concatenate([-x_BTH[..., H // 2 :], x_BTH[..., : H // 2]], -1)
        return x_BTH * jnp.cos(angles) + half_turned * jnp.sin(angles)

    def head(n, q, k, v, p):
        k, v = (y[..., n * K // N * H :][..., :H] for y in (k, v))
        q = q[..., n * H :][..., :H]
        if cfg.arch == "qwen3":
            q, k = norm(q, p["q_norm"]), norm(k, p["k_norm"])
        scores = rotate(q) @ rotate(k).swapaxes(-1, -2) / jnp.sqrt(H)
        return jax.nn.softmax(jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)) @ v

    def attention(x, p):
        qkv = [x @ p[name]["kernel"] for name in ("q_proj", "k_proj", "v_proj")]
        heads = [head(n, *qkv, p) for n in range(N)]
        return jnp.concatenate(heads, -1) @ p["o_proj"]["kernel"]

    def mlp(x, p):
        gate, up = x @ p["gate_proj"]["kernel"], x @ p["up_proj"]["kernel"]
        return (jax.nn.silu(gate) * up) @ p["down_proj"]["kernel"]

    embedding = params["embed_tokens"]["embedding"]
    x = embedding[tokens_BT]
    x = norm(x, {"scale": 1}) if cfg.embedding_norm else x
    for i in range(cfg.n_layer):
        block = params["blocks"][i]
        x = x + attention(norm(x, block["input_layernorm"]), block["attn"])
        x = x + mlp(norm(x, block["post_attention_layernorm"]), block["mlp"])
    head_VD = embedding if cfg.tied_head else params["lm_head"]["embedding"]
    return norm(x, params["norm"]) @ head_VD.T


LOGITS = {"gpt2": gpt2_logits, "qwen3": qwen3_logits, "llama": qwen3_logits}
