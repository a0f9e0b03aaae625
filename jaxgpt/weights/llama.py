"""Qwen3 and Llama as transformers and llama.cpp store them. Linear's kernels are (out, in)."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxgpt.config.architecture import Arch, ModelConfig
from jaxgpt.weights.format import Format, Read

# Keys that change the network, and the one value that ours implements; null means that value.
NEEDED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
# The same in rope_parameters (transformers 5) and rope_scaling (before).
ROPE_NEEDED = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}


def _read(
    arch: Arch,
    defaults: Mapping[str, int | None],
    values: Mapping[str, Any],
    sizes: Mapping[str, Any],
) -> Read:
    """`defaults`: of num_key_value_heads and head_dim, as transformers has them for this kind."""
    errors = _unsupported(values, NEEDED)
    if other := {str(kind) for kind in values.get("layer_types") or []} - {"full_attention"}:
        errors.append(f"layer_types has {min(other)}, and only full_attention is supported")
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = values.get(key) or {}
        if not isinstance(found, dict):
            errors.append(f"{key} is {json.dumps(found)}, not an object")
            continue
        errors += [f"{key}: {error}" for error in _unsupported(found, ROPE_NEEDED)]
        rope |= found
    shared = {"num_key_value_heads": "n_kv_head", "head_dim": "head_dim"}
    fields = {name: values.get(key, defaults[key]) for key, name in shared.items()}
    errors += [
        f"{key} is {json.dumps(fields[name])}, not a whole number"
        for key, name in shared.items()
        if fields[name] is not None and type(fields[name]) is not int
    ]
    floats = {
        "rope_theta": rope.get("rope_theta") or values.get("rope_theta") or 10_000.0,
        "norm_eps": values.get("rms_norm_eps", 1e-6),
    }
    errors += [
        f"{name} is {json.dumps(value)}, not a number"
        for name, value in floats.items()
        if type(value) not in (int, float)
    ]
    tied = values.get("tie_word_embeddings", False) is True
    return {"arch": arch, **fields, **floats, "tied_head": tied}, errors


def _unsupported(values: Mapping[str, Any], needed: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {json.dumps(values[key])}, and only {json.dumps(value)} is supported"
        for key, value in needed.items()
        if values.get(key) not in (None, value)
    ]


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        # transformers 5 reads the second, older versions and vLLM the first.
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "tie_word_embeddings": cfg.tied_head,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def _add_gguf_keys(writer: Any, cfg: ModelConfig) -> None:
    writer.add_feed_forward_length(cfg.mlp_hidden)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_key_length(cfg.head_width)
    writer.add_value_length(cfg.head_width)
    writer.add_rope_dimension_count(cfg.head_width)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)


def _describe(cfg: ModelConfig) -> str:
    head = "tied" if cfg.tied_head else "untied"
    return (
        f"{cfg.kv_heads} heads of keys and values, head width {cfg.head_width}, MLP width "
        f"{cfg.mlp_hidden}, rotary base {cfg.rope_theta:,g}, {head} head"
    )


SHARED: dict[str, Any] = {
    "prefix": "model.",
    "parts": {"blocks": "layers", "attn": "self_attn"},
    "transposed": True,
    "ignored": (".rotary_emb.inv_freq",),  # computed; old files have it
    "sizes": {
        "n_layer": ("num_hidden_layers", None),
        "n_head": ("num_attention_heads", None),
        "n_embd": ("hidden_size", None),
        "mlp_width": ("intermediate_size", None),
        "block_size": ("max_position_embeddings", None),
        "vocab_size": ("vocab_size", None),
    },
    "fixed": {},
    "add_gguf_keys": _add_gguf_keys,
    "describe": _describe,
}
QWEN3 = Format(
    model_type="qwen3",
    title="Qwen3",
    class_name="Qwen3ForCausalLM",
    read=partial(_read, "qwen3", {"num_key_value_heads": 32, "head_dim": 128}),
    write=lambda cfg: _write(cfg) | {"use_sliding_window": False, "sliding_window": None},
    **SHARED,
)
LLAMA = Format(
    model_type="llama",
    title="Llama",
    class_name="LlamaForCausalLM",
    read=partial(_read, "llama", {"num_key_value_heads": None, "head_dim": None}),
    write=lambda cfg: _write(cfg) | {"mlp_bias": False},
    paired_rope=True,
    **SHARED,
)
