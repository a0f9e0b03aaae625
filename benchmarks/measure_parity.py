"""Compare our logits with transformers' for the same random GPT-2s, in float32.

    python benchmarks/measure_parity.py --json benchmarks/results/parity.json

Several shapes with random weights and biases, GPT-2's own (124M) among them; each model is saved by
transformers, imported, exported and imported again. Needs torch and transformers.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.data.tokenizer import padded_vocab_size
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.blocks import Params
from jaxgpt.model.network import build_model
from jaxgpt.weights.huggingface import load_params, read_model_config, save_model

SHAPES = [  # n_layer, n_head, n_embd, n_positions, vocab_size, activation
    (2, 2, 16, 32, 61, "gelu_new"),
    (3, 4, 64, 128, 257, "gelu"),
    (6, 6, 384, 1024, 50_257, "gelu_new"),
    (12, 12, 768, 1024, 50_257, "gelu_new"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    result = {
        "command": "python benchmarks/measure_parity.py",
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers)},
        "models": [measure(*shape) for shape in SHAPES],
    }
    print(json.dumps(result, indent=2))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file)
            file.write("\n")


def measure(n_layer: int, n_head: int, n_embd: int, T: int, V: int, activation: str) -> dict:
    """The largest difference for one shape, over a full context."""
    torch.manual_seed(0)
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": V}
    config = transformers.GPT2Config(
        **shape, n_positions=T, activation_function=activation, bos_token_id=0, eos_token_id=0
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):  # zero in a new model
            torch.nn.init.normal_(parameter, std=0.1)
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
        **shape,
        "n_positions": T,
        "activation_function": activation,
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
