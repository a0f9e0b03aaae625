"""Reads and writes GPT-2 in Hugging Face's format, without torch or transformers.

Its Conv1D stores matrices as (in, out), as Flax does, so nothing is transposed. The padding rows of
the embedding are dropped when writing and filled with zeros when reading.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxgpt.config.architecture import Gelu, ModelConfig, parameter_shapes
from jaxgpt.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PREFIX = "transformer."
HEAD = "lm_head.weight"  # tied to wte.weight; some files have it
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which old files have
ACTIVATIONS: dict[str, Gelu] = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}

# GPT2Config's defaults, for keys missing in config.json.
SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
# The same, for options of which this network implements only the default.
FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


class FolderError(UserError):
    """A folder without a usable GPT-2; the message names the file, the error and the remedy."""


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture in `config.json`; n_vocab is its vocab_size.

    Raises:
        FolderError: with every difference from the network implemented here.
    """
    path = folder / CONFIG_FILE
    values = _read_json(path)
    errors = [
        f"{name} is {json.dumps(values[name])}, and only {json.dumps(fixed)} is supported"
        for name, fixed in FIXED.items()
        if values.get(name, fixed) != fixed
    ]
    sizes = {name: values.get(name, default) for name, default in SIZES.items()}
    errors += [
        f"{name} is {json.dumps(size)}, not a whole number"
        for name, size in sizes.items()
        if type(size) is not int
    ]
    if not errors and values.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        errors.append(f"n_inner is {values['n_inner']}, and only 4 x n_embd is supported")
    activation = str(values.get("activation_function", "gelu_new"))
    if activation not in ACTIVATIONS:
        errors.append(f"activation_function {activation} is not one of {', '.join(ACTIVATIONS)}")
    if not errors:
        cfg = ModelConfig(
            n_layer=sizes["n_layer"],
            n_head=sizes["n_head"],
            n_embd=sizes["n_embd"],
            block_size=sizes["n_positions"],
            vocab_size=sizes["vocab_size"],
            n_vocab=sizes["vocab_size"],
            bias=values.get("bias", True) is not False,  # our key; transformers has biases
            gelu=ACTIVATIONS[activation],
        )
        errors = cfg.errors()
    if errors:
        raise FolderError("\n".join(f"{path}: {error}" for error in errors))
    return cfg


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights that `load_params` can read, by the file's name."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def load_params(folder: Path, cfg: ModelConfig) -> dict[str, Any]:
    """The weights as the nested dict of `init_params`, float32 NumPy arrays.

    `cfg` comes from `read_model_config`, possibly with a shorter block_size, a larger vocab_size or
    a smaller n_vocab.

    Raises:
        FolderError: if a tensor is missing, has another shape, or does not belong to the network.
    """
    tensors = {
        name.removeprefix(PREFIX): tensor
        for path in _weight_files(folder)
        for name, tensor in _read_tensors(path)
    }
    head = tensors.pop(HEAD, None)
    if head is not None and not np.array_equal(head, tensors.get("wte.weight", head)):
        raise FolderError(f"{folder}: {HEAD} is not wte.weight; only a tied head is supported")
    if cfg.n_layer > len(tensors):
        raise FolderError(
            f"{folder}: n_layer is {cfg.n_layer} in config.json, but the weights have only "
            f"{len(tensors)} tensors; the two files are not from the same model"
        )
    params: dict[str, Any] = {}
    for path, shape in parameter_shapes(cfg).items():
        name = _tensor_name(path)
        if name not in tensors:
            raise FolderError(f"{folder}: tensor {name} is missing; download or export it again")
        _put(params, path, _resized(tensors.pop(name), name, shape, cfg, folder))
    _refuse_unknown(tensors, cfg, folder)
    return params


def save_model(folder: Path, cfg: ModelConfig, params: Mapping[str, Any], eot: int) -> None:
    """Write `config.json` and `model.safetensors`; `eot` is the id of the end-of-text token.

    Raises:
        OSError: if they cannot be written.
        FolderError: if the network is another than GPT-2.
    """
    n_vocab = cfg.n_vocab or cfg.vocab_size
    _write_json(folder / CONFIG_FILE, _config_values(cfg, eot))
    exported = dataclasses.replace(cfg, vocab_size=n_vocab, n_vocab=n_vocab, dropout=0.0)
    if read_model_config(folder) != exported:
        raise FolderError("only GPT-2 can be exported, and this is another network")
    tensors = {}
    for path in parameter_shapes(cfg):
        name, array = _tensor_name(path), np.asarray(_get(params, path), np.float32)
        tensors[PREFIX + name] = np.ascontiguousarray(
            array[:n_vocab] if name == "wte.weight" else array
        )
    for name, shape in _zero_biases(cfg).items():
        tensors[PREFIX + name] = np.zeros(shape, np.float32)
    try:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:  # raised for a full disk, too
        raise OSError(str(error)) from None
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it readable by its owner only
    _write_json(folder / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})


def _config_values(cfg: ModelConfig, eot: int) -> dict[str, Any]:
    activation = next(name for name, gelu in ACTIVATIONS.items() if gelu == cfg.gelu)
    return {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        "activation_function": activation,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_embd": cfg.n_embd,
        "n_inner": None,
        "n_positions": cfg.block_size,
        "vocab_size": cfg.n_vocab or cfg.vocab_size,
        "attn_pdrop": 0.0,
        "embd_pdrop": cfg.dropout,
        "resid_pdrop": cfg.dropout,
        "initializer_range": 0.02,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "bias": cfg.bias,
        "torch_dtype": "float32",
    }


# ---------------------------------------------------------------- names and shapes


def _tensor_name(path: str) -> str:
    """'blocks/0/attn/c_attn/kernel' is 'h.0.attn.c_attn.weight' in transformers."""
    *modules, leaf = path.split("/")
    name = ".".join("h" if part == "blocks" else part for part in modules)
    return f"{name}.bias" if leaf == "bias" else f"{name}.weight"


def _zero_biases(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the biases that transformers requires and a model without biases does not have."""
    with_biases = parameter_shapes(dataclasses.replace(cfg, bias=True))
    missing = with_biases.keys() - parameter_shapes(cfg).keys()
    return {_tensor_name(path): with_biases[path] for path in missing}


def _keys(path: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in path.split("/")]


def _put(tree: dict, path: str, leaf: np.ndarray) -> None:
    *parents, last = _keys(path)
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _get(tree: Any, path: str) -> Any:
    for key in _keys(path):
        tree = tree[key]
    return tree


def _resized(
    tensor: np.ndarray, name: str, shape: tuple[int, ...], cfg: ModelConfig, folder: Path
) -> np.ndarray:
    """The tensor in float32, positions cut to block_size, the vocabulary padded with zeros."""
    least_rows = {"wpe.weight": cfg.block_size, "wte.weight": cfg.n_vocab or 0}
    fits = tensor.shape[1:] == shape[1:] and len(tensor) >= least_rows.get(name, shape[0])
    if not fits or (len(tensor) > shape[0] and name not in least_rows):
        raise FolderError(
            f"{folder}: tensor {name} is {tensor.shape}, but by config.json it is {shape}; the two "
            "files are not from the same model"
        )
    resized = np.zeros(shape, np.float32)
    kept = min(len(tensor), shape[0])
    resized[:kept] = tensor[:kept]
    return resized


def _refuse_unknown(tensors: Mapping[str, np.ndarray], cfg: ModelConfig, folder: Path) -> None:
    # A model without biases is exported with zeros, which may be dropped; trained biases may not.
    biases = _zero_biases(cfg)
    for name, tensor in tensors.items():
        if name in biases and tensor.any():
            raise FolderError(
                f'{folder}: {name} is not zero, but config.json has "bias": false; if transformers '
                'has trained the biases, set "bias": true in config.json'
            )
        if name not in biases:
            raise FolderError(
                f"{folder}: tensor {name} does not belong to a GPT-2 of {cfg.n_layer} layers "
                f"(bias {cfg.bias}); config.json is from another model, or this is another kind of "
                "model"
            )


# ---------------------------------------------------------------- files


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {""}
        # Files of this folder only, whoever wrote the index.
        if outside := [name for name in names if name in ("", "..") or Path(name).name != name]:
            raise FolderError(
                f"{folder / INDEX_FILE}: its weight_map names {outside[0]!r}, which is not a file "
                "of this folder; download or export it again"
            )
        return [folder / name for name in sorted(names)]
    found = sorted(path.name for path in folder.iterdir())
    raise FolderError(
        f"{folder} has no {WEIGHTS_FILE} (it has {', '.join(found[:8])}); to convert a "
        "pytorch_model.bin, load it with transformers and call save_pretrained"
    )


def _read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if not name.endswith(MASKS):
                    yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path} cannot be read ({error}); download or export it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        raise FolderError(
            f"{path} is missing; a Hugging Face folder has {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path} cannot be read: {error}") from None
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
