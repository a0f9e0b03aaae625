"""GPT-2 as Hugging Face keeps it, config.json and model.safetensors, without torch or transformers.

Its Conv1D stores matrices as (in, out), as Flax does: nothing is transposed. The rows of our
embedding that no token reaches are left out on the way there and are zeros on the way back.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxgpt.config.architecture import Gelu, ModelConfig
from jaxgpt.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PREFIX = "transformer."
HEAD = "lm_head.weight"  # tied to wte.weight, and only sometimes there
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, once kept among the weights
ACTIVATIONS: dict[str, Gelu] = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}

# What transformers' GPT2Config means where config.json is silent.
SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
# The same, of what this network has one way of doing.
FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


class FolderError(UserError):
    """A folder that does not hold a GPT-2; the message names the file, the error and the remedy."""


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture that `config.json` tells, all rows of its vocabulary in use.

    Raises:
        FolderError: with everything that makes it another network than ours.
    """
    path = folder / CONFIG_FILE
    values = _read_json(path)
    errors = [
        f"{name} is {json.dumps(values[name])}, and only {json.dumps(fixed)} is known here"
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
        errors.append(f"n_inner is {values['n_inner']}, and only 4 x n_embd is known here")
    activation = str(values.get("activation_function", "gelu_new"))
    if activation not in ACTIVATIONS:
        errors.append(f"activation_function {activation} is none of {', '.join(ACTIVATIONS)}")
    if not errors:
        cfg = ModelConfig(
            n_layer=sizes["n_layer"],
            n_head=sizes["n_head"],
            n_embd=sizes["n_embd"],
            block_size=sizes["n_positions"],
            vocab_size=sizes["vocab_size"],
            n_vocab=sizes["vocab_size"],
            bias=values.get("bias", True) is not False,  # ours: transformers always has them
            gelu=ACTIVATIONS[activation],
        )
        errors = cfg.errors()
    if errors:
        raise FolderError("\n".join(f"{path}: {error}" for error in errors))
    return cfg


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights under a name that `load_params` looks for."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def load_params(folder: Path, cfg: ModelConfig) -> dict[str, Any]:
    """The weights as the nested dict of `init_params`, NumPy arrays in float32.

    `cfg` is that of `read_model_config`, or has a shorter block_size, a larger vocab_size and a
    smaller n_vocab.

    Raises:
        FolderError: if a tensor is missing, has another shape, or has no place in the network.
    """
    tensors = {
        name.removeprefix(PREFIX): tensor
        for path in _weight_files(folder)
        for name, tensor in _read_tensors(path)
    }
    head = tensors.pop(HEAD, None)
    if head is not None and not np.array_equal(head, tensors.get("wte.weight", head)):
        raise FolderError(f"{folder}: {HEAD} is not wte.weight; only a tied head is known here")
    params: dict[str, Any] = {}
    for name, path_in_tree, shape in _layout(cfg):
        if name not in tensors:
            raise FolderError(f"{folder}: tensor {name} is missing; download or export it again")
        _put(params, path_in_tree, _fitted(tensors.pop(name), name, shape, cfg, folder))
    _refuse_foreign(tensors, cfg, folder)
    return params


def save_model(folder: Path, cfg: ModelConfig, params: Mapping[str, Any], eot: int) -> None:
    """Write `config.json` and `model.safetensors` for a model whose end-of-text id is `eot`.

    Raises OSError if the disk does not take them.
    """
    n_vocab = cfg.n_vocab or cfg.vocab_size
    tensors = {}
    for name, path_in_tree, _ in _layout(cfg):
        array = np.asarray(_get(params, path_in_tree), np.float32)
        tensors[PREFIX + name] = np.ascontiguousarray(
            array[:n_vocab] if name == "wte.weight" else array
        )
    if not cfg.bias:
        tensors |= {PREFIX + name: np.zeros(n, np.float32) for name, n in _missing_biases(cfg)}
    try:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:  # which is how it says that a disk is full
        raise OSError(str(error)) from None
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors lets nobody else read it
    _write_json(folder / CONFIG_FILE, _config_values(cfg, eot))
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


# ---------------------------------------------------------------- names, places, shapes


def _layout(cfg: ModelConfig) -> Iterator[tuple[str, tuple[str | int, ...], tuple[int, ...]]]:
    """Every tensor: its name there, its place in our parameters, its shape here."""
    D = cfg.n_embd
    yield "wte.weight", ("wte", "embedding"), (cfg.vocab_size or 0, D)
    yield "wpe.weight", ("wpe", "embedding"), (cfg.block_size, D)
    for i in range(cfg.n_layer):
        for norm in ("ln_1", "ln_2"):
            yield from _pair(cfg, f"h.{i}.{norm}", ("blocks", i, norm), "scale", (D,))
        for part, linear, shape in (
            ("attn", "c_attn", (D, 3 * D)),
            ("attn", "c_proj", (D, D)),
            ("mlp", "c_fc", (D, 4 * D)),
            ("mlp", "c_proj", (4 * D, D)),
        ):
            place = ("blocks", i, part, linear)
            yield from _pair(cfg, f"h.{i}.{part}.{linear}", place, "kernel", shape)
    yield from _pair(cfg, "ln_f", ("ln_f",), "scale", (D,))


def _pair(
    cfg: ModelConfig,
    name: str,
    place: tuple[str | int, ...],
    weight: str,
    shape: tuple[int, ...],
) -> Iterator[tuple[str, tuple[str | int, ...], tuple[int, ...]]]:
    yield f"{name}.weight", (*place, weight), shape
    if cfg.bias:
        yield f"{name}.bias", (*place, "bias"), shape[-1:]


def _missing_biases(cfg: ModelConfig) -> Iterator[tuple[str, int]]:
    """The biases that transformers wants of a model without: name and length."""
    for name, place, shape in _layout(cfg):
        if place[0] not in ("wte", "wpe"):
            yield name.removesuffix("weight") + "bias", shape[-1]


def _put(tree: dict, place: tuple[str | int, ...], leaf: np.ndarray) -> None:
    for key in place[:-1]:
        tree = tree.setdefault(key, {})
    tree[place[-1]] = leaf


def _get(tree: Any, place: tuple[str | int, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _fitted(
    tensor: np.ndarray, name: str, shape: tuple[int, ...], cfg: ModelConfig, folder: Path
) -> np.ndarray:
    """The tensor in float32: positions cut to the context, the vocabulary filled up with zeros."""
    cuttable = {"wpe.weight": cfg.block_size, "wte.weight": cfg.n_vocab or 0}
    least = cuttable.get(name, shape[0])
    fits = tensor.shape[1:] == shape[1:] and len(tensor) >= least
    if not fits or (len(tensor) > shape[0] and name not in cuttable):
        raise FolderError(
            f"{folder}: tensor {name} is {tensor.shape}, and config.json says {shape}; the two "
            "files are not of the same model"
        )
    fitted = np.zeros(shape, np.float32)
    kept = min(len(tensor), shape[0])
    fitted[:kept] = tensor[:kept]
    return fitted


def _refuse_foreign(left: Mapping[str, np.ndarray], cfg: ModelConfig, folder: Path) -> None:
    # A model exported without biases has zeros there, and any other must not lose its own.
    biases = dict(_missing_biases(cfg)) if not cfg.bias else {}
    for name, tensor in left.items():
        if name in biases and tensor.any():
            raise FolderError(
                f'{folder}: {name} is not zero, and config.json says "bias": false; transformers '
                'trains biases all the same: if it has, set "bias": true in config.json'
            )
        if name not in biases:
            raise FolderError(
                f"{folder}: tensor {name} has no place in this GPT-2 of {cfg.n_layer} layers "
                f"(bias {cfg.bias}); config.json is not that of these weights, or it is another "
                "kind of model"
            )


# ---------------------------------------------------------------- files


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {""}
        # Files of this folder and of no other, whoever wrote the index.
        if foreign := [name for name in names if name in ("", "..") or Path(name).name != name]:
            raise FolderError(
                f"{folder / INDEX_FILE}: its weight_map names {foreign[0]!r}, which is no file of "
                "this folder; download or export it again"
            )
        return [folder / name for name in sorted(names)]
    found = sorted(path.name for path in folder.iterdir())
    raise FolderError(
        f"{folder}: has no {WEIGHTS_FILE} (there is: {', '.join(found[:8])}); where there is only "
        "pytorch_model.bin, load it with transformers and save_pretrained it again"
    )


def _read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if not name.endswith(MASKS):
                    yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path} cannot be read ({error}); download or export it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no table")
    except FileNotFoundError:
        raise FolderError(
            f"{path}: no such file; a Hugging Face folder has {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path} cannot be read: {error}") from None
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
