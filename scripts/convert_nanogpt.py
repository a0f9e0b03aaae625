"""Turn nanoGPT's ckpt.pt into a Hugging Face folder, for --init-from and for transformers.

    python scripts/convert_nanogpt.py out/ckpt.pt --to my-nanogpt       # needs torch

The file is a pickle and is read by torch's weights-only loader, which runs no code from it. The
result uses the exact GELU, as nanoGPT does.
"""

import argparse
import pickle
from pathlib import Path

import numpy as np

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.data.tokenizer_files import write_tokenizer
from jaxgpt.errors import UserError, fail
from jaxgpt.weights.huggingface import save_model

COMPILED = "_orig_mod."  # torch.compile's prefix of every name
# nanoGPT pads GPT-2's 50,257 ids to 50,304; no text contains the others.
PADDED_GPT2 = 50_304


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="nanoGPT's ckpt.pt")
    parser.add_argument("--to", type=Path, required=True, help="new folder to write")
    args = parser.parse_args()
    try:
        convert(args.checkpoint, args.to)
    except UserError as error:
        fail(parser.prog, str(error))


def convert(checkpoint: Path, folder: Path) -> None:
    """Read `checkpoint` and write `folder`.

    Raises:
        UserError: if it is missing, is not nanoGPT's, or the folder exists.
    """
    if folder.exists():
        raise UserError(f"--to {folder} already exists; name another folder")
    args, weights = read_checkpoint(checkpoint)
    try:
        cfg = model_config(args)
        params = to_params(cfg, weights)
    except KeyError as error:
        raise UserError(f"{checkpoint} is not a ckpt.pt of nanoGPT: {error} is missing") from None
    gpt2 = load_tokenizer("gpt2")
    is_gpt2 = cfg.n_vocab == gpt2.n_vocab
    try:
        folder.mkdir(parents=True)
        save_model(folder, cfg, params, eot=gpt2.eot if is_gpt2 else 0)
        if is_gpt2:
            write_tokenizer(folder, gpt2, cfg.block_size)
    except OSError as error:
        raise UserError(f"--to {folder} cannot be written: {error}") from None
    shape = f"{cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}"
    print(f"{folder}: {shape}, {cfg.n_vocab:,} ids")
    if not is_gpt2:
        print(
            "its vocabulary is in nanoGPT's meta.pkl, not GPT-2's: transformers loads the weights, "
            "jaxgpt has no tokenizer for them"
        )


def read_checkpoint(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(model_args, weights by nanoGPT's names in float32) of a ckpt.pt."""
    try:
        import torch
    except ImportError:
        raise UserError("reading nanoGPT's files needs PyTorch: pip install torch") from None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        # Only torch's first sentence: the next one advises loading with code execution.
        reason = (str(error).strip().splitlines() or ["it is empty"])[0].partition(". ")[0]
        raise UserError(
            f"{path} is not a ckpt.pt of nanoGPT ({type(error).__name__}: {reason})"
        ) from None
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    args, state = parts.get("model_args"), parts.get("model")
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise UserError(f"{path} is not a ckpt.pt of nanoGPT: model_args or model is missing")
    tensors = {name: x for name, x in state.items() if isinstance(x, torch.Tensor)}
    return args, {name.removeprefix(COMPILED): x.float().numpy() for name, x in tensors.items()}


def model_config(args: dict) -> ModelConfig:
    """The architecture in nanoGPT's model_args."""
    rows = args["vocab_size"]
    return ModelConfig(
        n_layer=args["n_layer"],
        n_head=args["n_head"],
        n_embd=args["n_embd"],
        block_size=args["block_size"],
        bias=args["bias"],
        dropout=args.get("dropout", 0.0),
        vocab_size=rows,
        n_vocab=50_257 if rows == PADDED_GPT2 else rows,
        gelu="erf",
    )


def to_params(cfg: ModelConfig, weights: dict[str, np.ndarray]) -> dict:
    """nanoGPT's weights as the nested dict of `init_params`."""

    def layer_norm(name: str) -> dict[str, np.ndarray]:
        norm = {"scale": weights[f"{name}.weight"]}
        return {**norm, "bias": weights[f"{name}.bias"]} if cfg.bias else norm

    def linear(name: str) -> dict[str, np.ndarray]:
        layer = {"kernel": weights[f"{name}.weight"].T}
        return {**layer, "bias": weights[f"{name}.bias"]} if cfg.bias else layer

    def block(name: str) -> dict:
        return {
            "ln_1": layer_norm(f"{name}.ln_1"),
            "attn": {part: linear(f"{name}.attn.{part}") for part in ("c_attn", "c_proj")},
            "ln_2": layer_norm(f"{name}.ln_2"),
            "mlp": {part: linear(f"{name}.mlp.{part}") for part in ("c_fc", "c_proj")},
        }

    return {
        "wte": {"embedding": weights["transformer.wte.weight"]},
        "wpe": {"embedding": weights["transformer.wpe.weight"]},
        "blocks": {i: block(f"transformer.h.{i}") for i in range(cfg.n_layer)},
        "ln_f": layer_norm("transformer.ln_f"),
    }


if __name__ == "__main__":
    main()
