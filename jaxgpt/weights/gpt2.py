"""GPT-2 as transformers and llama.cpp store it.

Its Conv1D stores matrices as (in, out), as Flax does, so nothing is transposed.
"""

from collections.abc import Mapping
from typing import Any

from jaxgpt.config.architecture import Gelu, ModelConfig
from jaxgpt.weights.format import Format, Read

ACTIVATIONS: dict[str, Gelu] = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
EPSILON = 1e-5  # of the layer norms


def _read(values: Mapping[str, Any], sizes: Mapping[str, Any]) -> Read:
    errors = []
    if sizes and values.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        errors.append(f"n_inner is {values['n_inner']}, and only 4 x n_embd is supported")
    activation = str(values.get("activation_function", "gelu_new"))
    if activation not in ACTIVATIONS:
        errors.append(f"activation_function {activation} is not one of {', '.join(ACTIVATIONS)}")
    bias = values.get("bias", True) is not False  # our key; transformers has biases
    return {"arch": "gpt2", "bias": bias, "gelu": ACTIVATIONS.get(activation)}, errors


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "activation_function": next(name for name, gelu in ACTIVATIONS.items() if gelu == cfg.gelu),
        "n_inner": None,
        "n_ctx": cfg.block_size,  # llama.cpp's converter needs it
        "attn_pdrop": 0.0,
        "embd_pdrop": cfg.dropout,
        "resid_pdrop": cfg.dropout,
        "bias": cfg.bias,
    }


def _add_gguf_keys(writer: Any, cfg: ModelConfig) -> None:
    writer.add_feed_forward_length(4 * cfg.n_embd)
    writer.add_layer_norm_eps(EPSILON)


def _describe(cfg: ModelConfig) -> str:
    return f"biases {'yes' if cfg.bias else 'no (exported as zeros)'}, {cfg.gelu} GELU"


FORMAT = Format(
    model_type="gpt2",
    title="GPT-2",
    class_name="GPT2LMHeadModel",
    prefix="transformer.",
    parts={"blocks": "h"},
    transposed=False,
    ignored=(".attn.bias", ".attn.masked_bias"),  # causal masks, which old files have
    sizes={
        "n_layer": ("n_layer", 12),
        "n_head": ("n_head", 12),
        "n_embd": ("n_embd", 768),
        "block_size": ("n_positions", 1024),
        "vocab_size": ("vocab_size", 50257),
    },
    fixed={
        "layer_norm_epsilon": EPSILON,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=_write,
    add_gguf_keys=_add_gguf_keys,
    describe=_describe,
)
