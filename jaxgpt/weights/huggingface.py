"""Reads and writes models in Hugging Face's format, without torch or transformers.

What differs between kinds of networks is in their `Format`s. The padding rows of the vocabulary are
dropped when writing and filled with zeros when reading.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxgpt.config.architecture import ModelConfig, parameter_shapes
from jaxgpt.errors import UserError, first_few
from jaxgpt.files import FormatError, decode_json, open_file, read_file, write_json
from jaxgpt.weights import gpt2, llama
from jaxgpt.weights.deploy import (
    deployed_config,
    deployed_params,
    put_leaf,
    rows_needed,
    zero_biases,
)
from jaxgpt.weights.format import HEAD, Format

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# By `arch`, which is also model_type in config.json.
FORMATS: dict[str, Format] = {
    form.model_type: form for form in (gpt2.FORMAT, llama.QWEN3, llama.LLAMA)
}


class FolderError(UserError):
    """A folder without a usable model; the message names the file, the error and the remedy."""


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture in `config.json`; n_vocab is its vocab_size.

    Raises:
        FolderError: with every difference from the networks implemented here.
    """
    path = folder / CONFIG_FILE
    values = _read_json(path)
    kind = values.get("model_type", "gpt2")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise FolderError(
            f"{path}: model_type is {json.dumps(kind)}, and only "
            f"{', '.join(json.dumps(name) for name in FORMATS)} are supported"
        )
    fields, errors = FORMATS[kind].read_config(values)
    if not errors:
        cfg = ModelConfig(**fields, n_vocab=fields["vocab_size"])
        errors = cfg.errors()
    if errors:
        raise FolderError("\n".join(f"{path}: {error}" for error in errors))
    return cfg


def format_of(cfg: ModelConfig) -> Format:
    """How the network is stored. Raises FolderError for a network that others do not have."""
    if cfg.arch not in FORMATS:
        raise FolderError(
            f"only {', '.join(FORMATS)} can be exported, and this network is {cfg.arch}; describe "
            "it in a file of jaxgpt/weights/"
        )
    return FORMATS[cfg.arch]


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
    form = format_of(cfg)
    tensors: dict[str, np.ndarray] = {}
    for file in _weight_files(folder):
        for name, tensor in _read_tensors(file, form.ignored):
            if tensors.setdefault(name.removeprefix(form.prefix), tensor) is not tensor:
                raise FolderError(f"{file}: tensor {name} occurs twice; download {folder} again")
    if cfg.n_layer > len(tensors):
        raise FolderError(
            f"{folder}: {form.sizes['n_layer'][0]} is {cfg.n_layer} in config.json, but the "
            f"weights have only {len(tensors)} tensors; the two files are not from the same model"
        )
    if cfg.tied_head:
        _drop_tied_head(tensors, form, cfg, folder)
    params: dict[str, Any] = {}
    needed = rows_needed(cfg)
    for path, shape in parameter_shapes(cfg).items():
        name = form.tensor_name(path)
        if name not in tensors:
            raise FolderError(f"{folder}: tensor {name} is missing; download or export it again")
        tensor = tensors.pop(name)
        if form.is_transposed(path):
            tensor = tensor.T
        put_leaf(params, path, _resized(tensor, name, shape, needed.get(path), folder))
    _refuse_unknown(tensors, form, cfg, folder)
    return params


def save_model(folder: Path, cfg: ModelConfig, params: Mapping[str, Any], eot: int) -> None:
    """Write `config.json` and `model.safetensors`; `eot` is the id of the end-of-text token.

    Raises:
        OSError: if they cannot be written.
        FolderError: if other programs do not have this network.
    """
    form = format_of(cfg)
    deployed = deployed_config(cfg)
    write_json(folder / CONFIG_FILE, form.config_values(deployed, eot))
    if read_model_config(folder) != deployed:
        raise FolderError(
            f"this network has an option that {form.class_name} lacks, so it cannot be exported"
        )
    tensors = {
        form.full_name(path): np.ascontiguousarray(x.T if form.is_transposed(path) else x)
        for path, x in deployed_params(cfg, params)
    }
    try:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:  # raised for a full disk, too
        raise OSError(str(error)) from None
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it readable by its owner only
    write_json(folder / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})


# ---------------------------------------------------------------- tensors


def _resized(
    tensor: np.ndarray, name: str, shape: tuple[int, ...], rows: int | None, folder: Path
) -> np.ndarray:
    """The tensor in float32 and in `shape`; if only `rows` are needed, cut or padded with zeros."""
    fits = tensor.shape == shape
    if rows is not None:
        fits = tensor.shape[1:] == shape[1:] and len(tensor) >= rows
    if not fits:
        raise FolderError(
            f"{folder}: tensor {name} is {tensor.shape}, but by config.json it is {shape}; the two "
            "files are not from the same model"
        )
    if tensor.dtype.kind in "biuc":  # bfloat16 is of kind V
        raise FolderError(f"{folder}: tensor {name} is {tensor.dtype}; only floats are supported")
    resized = np.zeros(shape, np.float32)
    kept = min(len(tensor), shape[0])
    resized[:kept] = tensor[:kept]
    return resized


def _drop_tied_head(
    tensors: dict[str, np.ndarray], form: Format, cfg: ModelConfig, folder: Path
) -> None:
    """Remove the head that some files have although it is tied."""
    head = tensors.pop(HEAD, None)
    name = form.tensor_name(next(iter(rows_needed(cfg))))
    if head is not None and not np.array_equal(head, tensors.get(name, head)):
        key = "tie_word_embeddings"
        remedy = "only a tied head is supported" if key in form.fixed else f"set {key} to false"
        raise FolderError(
            f"{folder}: {HEAD} differs from {name}, although config.json ties them; {remedy}"
        )


def _refuse_unknown(
    tensors: Mapping[str, np.ndarray], form: Format, cfg: ModelConfig, folder: Path
) -> None:
    # A model without biases is exported with zeros, which may be dropped; trained biases may not.
    biases = {form.tensor_name(path) for path in zero_biases(cfg)}
    for name, tensor in tensors.items():
        if name in biases and tensor.any():
            raise FolderError(
                f'{folder}: {name} is not zero, but config.json has "bias": false; if transformers '
                'has trained the biases, set "bias": true in config.json'
            )
        if name not in biases:
            raise FolderError(
                f"{folder}: tensor {name} does not belong to the {form.class_name} of "
                f"{cfg.n_layer} layers that config.json describes; it is from another model, or "
                "this is another kind of model"
            )


# ---------------------------------------------------------------- files


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {""}
        # Files of this folder only, whoever wrote the index.
        no_files = ("", "..")
        if outside := [x for x in names if x in no_files or "\0" in x or Path(x).name != x]:
            raise FolderError(
                f"{folder / INDEX_FILE}: its weight_map names {outside[0]!r}, which is not a file "
                "of this folder; download or export it again"
            )
        return [folder / name for name in sorted(names)]
    found = sorted(path.name for path in folder.iterdir())
    raise FolderError(
        f"{folder} has no {WEIGHTS_FILE} (it has {first_few(found)}); to convert a "
        "pytorch_model.bin, load it with transformers and call save_pretrained"
    )


def _read_tensors(path: Path, ignored: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
    try:
        open_file(path).close()
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if not name.endswith(ignored):
                    yield name, file.get_tensor(name)
    except (OSError, SafetensorError, AttributeError) as error:
        # AttributeError: NumPy has no such dtype, float8 for instance
        raise FolderError(f"{path} cannot be read ({error}); download or export it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return decode_json(read_file(path), dict[str, Any])
    except FileNotFoundError:
        raise FolderError(
            f"{path} is missing; a Hugging Face folder has {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from None
    except (OSError, FormatError) as error:
        raise FolderError(f"{path} cannot be read: {error}") from None
