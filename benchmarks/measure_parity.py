"""Compare our logits with transformers' for the same random models, in float32.

    python benchmarks/measure_parity.py --json benchmarks/results/parity.json

GPT-2, Qwen3 and Llama in several shapes, GPT-2's own (124M) among them; each model is saved by
transformers, imported, exported and imported again. Needs torch and transformers.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from jaxgpt.config.architecture import ModelConfig, padded_vocab_size
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.blocks import Params
from jaxgpt.model.network import build_model
from jaxgpt.weights.huggingface import load_params, read_model_config, save_model

GPT2 = [  # n_layer, n_head, n_embd, n_positions, vocab_size, activation
    (2, 2, 16, 32, 61, "gelu_new"),
    (3, 4, 64, 128, 257, "gelu"),
    (6, 6, 384, 1024, 50_257, "gelu_new"),
    (12, 12, 768, 1024, 50_257, "gelu_new"),
]
MODERN = [  # n_layer, n_head, n_kv_head, n_embd, head_dim, mlp_width, positions, vocab_size, tied
    (2, 4, 2, 32, 8, 64, 32, 61, True),
    (3, 6, 1, 48, 10, 100, 128, 257, False),
    (2, 3, 3, 96, 32, 256, 256, 257, True),
    (5, 8, 4, 64, 32, 176, 64, 512, False),
    (12, 6, 2, 768, 128, 2048, 1024, 50_257, False),
]

SHOWN = (
    *("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "mlp_width", "block_size"),
    *("tied_head", "gelu"),
)


def configs() -> Iterator[transformers.PretrainedConfig]:
    """Every model to compare."""
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    for n_layer, n_head, n_embd, T, V, activation in GPT2:
        shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": V}
        yield transformers.GPT2Config(**shape, n_positions=T, activation_function=activation, **ids)
    for kind in (transformers.Qwen3Config, transformers.LlamaConfig):
        for n_layer, n_head, n_kv_head, n_embd, head_dim, mlp_width, T, V, tied in MODERN:
            yield kind(
                num_hidden_layers=n_layer,
                num_attention_heads=n_head,
                num_key_value_heads=n_kv_head,
                hidden_size=n_embd,
                head_dim=head_dim,
                intermediate_size=mlp_width,
                max_position_embeddings=T,
                vocab_size=V,
                tie_word_embeddings=tied,
                rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
                **ids,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    result = {
        "command": "python benchmarks/measure_parity.py",
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers)},
        "models": [measure(config) for config in configs()],
    }
    print(json.dumps(result, indent=2))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


def measure(config: transformers.PretrainedConfig) -> dict:
    """The largest difference for one model, over a full context."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):  # zero in a new model
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:  # one in a new model
            torch.nn.init.normal_(parameter, mean=1, std=0.1)
    V, T = config.vocab_size, config.max_position_embeddings
    tokens_BT = np.random.default_rng(0).integers(0, V, (1, T))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens_BT)).logits.numpy()
    with tempfile.TemporaryDirectory() as scratch:
        first, second = Path(scratch) / "theirs", Path(scratch) / "ours"
        theirs.save_pretrained(first)
        cfg, params = imported(first)
        second.mkdir()
        save_model(second, cfg, params, eot=0)
        _, again = imported(second)
    same = all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
    got = np.asarray(nnx.merge(build_model(cfg, "float32", plain_attention), params)(tokens_BT))
    return {
        "model": type(theirs).__name__,
        **{name: getattr(cfg, name) for name in SHOWN},
        "vocab_size": V,
        "largest_logit": float(np.abs(expected).max()),
        "largest_difference": float(np.abs(got[..., :V] - expected).max()),
        "export_and_import_bit_exact": same,
    }


def imported(folder: Path) -> tuple[ModelConfig, Params]:
    """A model as --init-from reads it, with a padded vocabulary."""
    cfg = read_model_config(folder)
    cfg = dataclasses.replace(cfg, vocab_size=padded_vocab_size(cfg.vocab_size or 0))
    return cfg, load_params(folder, cfg)


if __name__ == "__main__":
    main()
