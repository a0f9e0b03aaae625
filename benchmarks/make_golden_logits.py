"""Make tests/golden/: small random models saved by transformers, and their logits.

    python benchmarks/make_golden_logits.py        # needs torch and transformers

With them, tests compare our logits with transformers' without having it installed. Weights and
biases are large, so that every part of the network affects the logits.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SHAPES = {
    "tanh-2x2x16": {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 61},
    "erf-1x4x32": {"n_layer": 1, "n_head": 4, "n_embd": 32, "n_positions": 8, "vocab_size": 40},
    "tanh-5x1x8": {"n_layer": 5, "n_head": 1, "n_embd": 8, "n_positions": 20, "vocab_size": 17},
}
MODERN = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 12,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    models = {
        name: random_gpt2(shape, activation="gelu" if name.startswith("erf") else "gelu_new")
        for name, shape in SHAPES.items()
    }
    shared = {"bos_token_id": 0, "eos_token_id": 0}
    for tied in (True, False):
        qwen3 = transformers.Qwen3Config(**MODERN, **shared, tie_word_embeddings=tied)
        models["qwen3-tied" if tied else "qwen3-untied"] = randomized(qwen3)
    models["llama"] = randomized(transformers.LlamaConfig(**MODERN, **shared))
    for name, model in models.items():
        folder = GOLDEN / name
        config = model.config
        tokens_BT = np.random.default_rng(0).integers(
            0, config.vocab_size, (2, config.max_position_embeddings)
        )
        with torch.no_grad():
            logits_BTV = model(torch.tensor(tokens_BT)).logits.numpy()
        model.save_pretrained(folder)
        np.savez_compressed(folder / "logits.npz", tokens=tokens_BT, logits=logits_BTV)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "model.safetensors").chmod(0o644)
        print(f"{folder}: logits from {logits_BTV.min():.2f} to {logits_BTV.max():.2f}")


def random_gpt2(shape: dict[str, int], activation: str) -> transformers.PreTrainedModel:
    """A GPT-2 with all parameters random, biases and norms included."""
    config = transformers.GPT2Config(
        **shape, activation_function=activation, bos_token_id=0, eos_token_id=0
    )
    return randomized(config)


def randomized(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """A model of this configuration with all parameters random."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        is_scale = (".ln_" in name or "norm" in name) and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.5)
    return model


if __name__ == "__main__":
    main()
