"""How a kind of network is stored: its config.json, the names of its tensors, its keys in GGUF.

Each kind has its `Format` in a file of its own (`gpt2.py`, `llama.py`). `huggingface.py` reads and
writes folders with it, `gguf_file.py` writes GGUF.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxgpt.config.architecture import ModelConfig

HEAD = "lm_head.weight"  # the only tensor without the prefix
Read = tuple[dict[str, Any], list[str]]  # fields of ModelConfig, and a sentence for each error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of network in Hugging Face's format and in GGUF."""

    model_type: str  # in config.json; in GGUF, the architecture
    title: str  # for people
    class_name: str  # in transformers
    prefix: str  # of the names of all tensors except the head's
    parts: Mapping[str, str]  # parts of a parameter's path that have another name in transformers
    transposed: bool  # whether kernels are stored as (out, in); Flax has (in, out)
    ignored: tuple[str, ...]  # endings of the names of tensors that hold no weights
    sizes: Mapping[str, tuple[str, int | None]]  # our field: its key, and the default if missing
    fixed: Mapping[str, Any]  # keys of which only this value, the default, is supported
    # (all other keys, the sizes or {} if one is invalid) -> their fields, and errors
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Read]
    write: Callable[[ModelConfig], dict[str, Any]]  # all other keys
    add_gguf_keys: Callable[[Any, ModelConfig], None]  # to a GGUFWriter: what only this kind has
    describe: Callable[[ModelConfig], str]  # what only this kind has, for the model card
    paired_rope: bool = False  # in llama.cpp: rotates pairs of neighbours, not halves

    def read_config(self, values: Mapping[str, Any]) -> Read:
        """The fields of ModelConfig in config.json, and whatever is not implemented here."""
        errors = [
            f"{key} is {json.dumps(values[key])}, and only {json.dumps(fixed)} is supported"
            for key, fixed in self.fixed.items()
            if values.get(key, fixed) != fixed
        ]
        sizes = {name: values.get(key, default) for name, (key, default) in self.sizes.items()}
        errors += [
            f"{self.sizes[name][0]} is {json.dumps(size)}, not a whole number"
            for name, size in sizes.items()
            if type(size) is not int
        ]
        others, more = self.read(values, {} if errors else sizes)
        return {**sizes, **others}, errors + more

    def config_values(self, cfg: ModelConfig, eot: int) -> dict[str, Any]:
        """What config.json says; `eot` is the id of the end-of-text token."""
        return {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            **self.fixed,
            **{key: getattr(cfg, name) for name, (key, _) in self.sizes.items()},
            **self.write(cfg),
            "initializer_range": 0.02,
            "bos_token_id": eot,
            "eos_token_id": eot,
            "dtype": "float32",
            "torch_dtype": "float32",  # for transformers before 5
        }

    def tensor_name(self, path: str) -> str:
        """'blocks/0/attn/c_attn/kernel' of a GPT-2 is 'h.0.attn.c_attn.weight', after a prefix."""
        *modules, leaf = path.split("/")
        name = ".".join(self.parts.get(part, part) for part in modules)
        return f"{name}.bias" if leaf == "bias" else f"{name}.weight"

    def full_name(self, path: str) -> str:
        """The same with the prefix."""
        name = self.tensor_name(path)
        return name if name == HEAD else self.prefix + name

    def is_transposed(self, path: str) -> bool:
        """Whether a parameter is stored as (out, in)."""
        return self.transposed and path.endswith("/kernel")
