"""Writes GGUF, the file format of llama.cpp, Ollama and LM Studio, with the `gguf` package.

llama.cpp builds the network from the file's keys and from the names of its tensors. The tokenizer
is part of the file: a wrong key there gives a model that loads and writes nonsense. llama.cpp has a
fixed list of ways to split a text into words before BPE; a tokenizer that splits in another way
would give other ids, so it is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import ConfigError
from jaxgpt.data.tokenizer import ByteTokenizer, Tokenizer, gpt2_merges
from jaxgpt.data.tokenizer_files import is_byte_level, vocabulary
from jaxgpt.data.tokenizer_json import MAIN_FILE, JsonTokenizer
from jaxgpt.files import atomic_write
from jaxgpt.weights.deploy import deployed_config, deployed_params
from jaxgpt.weights.huggingface import format_of

GgufDtype = Literal["f32", "f16", "bf16", "q8_0"]
BLOCK = 32  # elements of a row that share a scale in q8_0

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
# llama.cpp refuses a vocabulary without merges. This one never applies, because no byte is written
# as "€"; "Ġ Ġ" would lose double spaces.
NO_MERGES = ["€ €"]

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?%s+|\p{N}%s| ?[^\s%s\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The one that suits most scripts: combining marks stay with the letter before them, as Indian
# scripts need, and each digit is a word.
WORDS_WITH_MARKS = _WORDS % (r"[\p{L}\p{M}]", "", r"\p{L}\p{M}")
# The regular expression that splits a text, by llama.cpp's name.
PATTERNS = {
    _WORDS % (r"\p{L}", "", r"\p{L}"): "qwen2",
    _WORDS % (r"\p{L}", "{1,3}", r"\p{L}"): "llama-bpe",
    WORDS_WITH_MARKS: "qwen35",
}


def require_gguf(tokenizer: Tokenizer) -> None:
    """Raises ConfigError if the gguf package is missing, or GGUF cannot hold the tokenizer."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError("a .gguf file needs the gguf package: pip install gguf") from None
    gguf_vocabulary(tokenizer)


def save_gguf(
    path: Path, cfg: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer, dtype: GgufDtype
) -> list[str]:
    """Write the model and its tokenizer to `path`, atomically.

    Returns the names of tensors that are float16 although q8_0 was asked for, because their rows
    do not divide into blocks; llama.cpp's converter does the same.

    Raises:
        OSError: if the file cannot be written.
        ConfigError: if a weight is too large for float16.
    """
    import gguf

    form, deployed = format_of(cfg), deployed_config(cfg)
    writer = gguf.GGUFWriter(None, form.model_type)
    writer.add_type("model")
    writer.add_name(path.stem)
    writer.add_size_label(gguf.size_label(deployed.parameter_count(), 0, 0, 0))
    writer.add_block_count(cfg.n_layer)
    writer.add_context_length(cfg.block_size)
    writer.add_embedding_length(cfg.n_embd)
    writer.add_head_count(cfg.n_head)
    form.add_gguf_keys(writer, deployed)
    file_types = {"f32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[file_types.get(dtype, f"MOSTLY_{dtype.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[form.model_type.upper()], cfg.n_layer)
    fallen_back = []
    for source, array in deployed_params(cfg, params):
        name = names.get_name(form.full_name(source), try_suffixes=(".weight", ".bias"))
        assert name is not None, source
        if source.endswith("/kernel"):
            array = array.T  # rows are outputs, whatever Hugging Face's format has
            if form.paired_rope:
                array = _pair_halves(array, source, cfg)
        chosen = _choose_dtype(name, array, dtype)
        if chosen == "f16" and dtype == "q8_0":
            fallen_back.append(name)
        kind = gguf.GGMLQuantizationType[chosen.upper()]
        stored = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    with atomic_write(path) as file:
        try:
            writer.write_header_to_file(Path(file.name))  # opens the same file
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return fallen_back


def modelfile_of(path: Path) -> Path:
    """Where Ollama's Modelfile is, beside the model at `path`."""
    return path.with_suffix(".Modelfile")


def save_modelfile(path: Path) -> Path:
    """Write Ollama's Modelfile beside the model at `path`; returns its own path."""
    modelfile = modelfile_of(path)
    with atomic_write(modelfile) as file:
        file.write(f"FROM ./{path.name}\n".encode())
    return modelfile


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """Add a tokenizer to a GGUFWriter."""
    found = gguf_vocabulary(tokenizer)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    writer.add_token_merges(found.merges)
    # Without them llama.cpp takes id 11 for both.
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)


def _choose_dtype(name: str, array: np.ndarray, asked: GgufDtype) -> GgufDtype:
    """float32 for vectors and positions, as in llama.cpp's converter; else what was asked for.

    Raises:
        ConfigError: if a weight is too large for float16.
    """
    if array.ndim == 1 or name.startswith("position_embd"):
        return "f32"
    chosen: GgufDtype = "f16" if asked == "q8_0" and array.shape[-1] % BLOCK else asked
    if chosen == "f16" and np.abs(array).max() > np.finfo(np.float16).max:
        raise ConfigError(f"{name} has weights too large for float16; use --dtype bf16")
    return chosen


def _pair_halves(array: np.ndarray, source: str, cfg: ModelConfig) -> np.ndarray:
    """(out, in) rows of each q and k head in llama.cpp's order: element i beside i + H/2."""
    heads = {"q_proj": cfg.n_head, "k_proj": cfg.kv_heads}.get(source.split("/")[-2])
    if heads is None:
        return array
    N2HD = array.reshape(heads, 2, -1, array.shape[-1])
    return N2HD.swapaxes(1, 2).reshape(array.shape)


@dataclass(frozen=True)
class GgufVocabulary:
    """What a GGUF file says about a tokenizer with byte-level BPE."""

    tokens: list[str]  # by id
    types: list[int]
    merges: list[str]
    pre: str  # how text is split into words


def gguf_vocabulary(tokenizer: Tokenizer) -> GgufVocabulary:
    """The tokenizer for a GGUF file.

    Raises:
        ConfigError: if llama.cpp would encode some text otherwise.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return _of_json(tokenizer)
    if not is_byte_level(tokenizer):
        raise _refused(tokenizer, "its files cannot be exported")
    types = [NORMAL] * tokenizer.n_vocab
    types[tokenizer.eot] = CONTROL
    merges = NO_MERGES if isinstance(tokenizer, ByteTokenizer) else gpt2_merges()
    return GgufVocabulary(list(vocabulary(tokenizer)), types, merges, "gpt-2")


def _of_json(tokenizer: JsonTokenizer) -> GgufVocabulary:
    values = json.loads(tokenizer.files[MAIN_FILE])
    model, normalizer = values["model"], values.get("normalizer") or {"type": "NFC"}
    pre = _name_of_split(values.get("pre_tokenizer") or {})
    if model.get("type") != "BPE" or (values.get("decoder") or {}).get("type") != "ByteLevel":
        raise _refused(tokenizer, "it is not a byte-level BPE")
    if pre is None:
        raise _refused(tokenizer, "llama.cpp cannot split a text into words as it does")
    if normalizer["type"] != "NFC":  # which llama.cpp ignores: most texts are in that form
        raise _refused(tokenizer, f"llama.cpp does not have its normalizer, {normalizer['type']}")
    tokens = [f"[PAD{id}]" for id in range(tokenizer.n_vocab)]
    types = [UNUSED] * tokenizer.n_vocab
    added = {token["content"]: token["special"] for token in values.get("added_tokens", [])}
    kinds = {text: CONTROL if special else USER_DEFINED for text, special in added.items()}
    for text, id in tokenizer.library.get_vocab(with_added_tokens=True).items():
        tokens[id], types[id] = text, kinds.get(text, NORMAL)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return GgufVocabulary(tokens, types, merges or NO_MERGES, pre)


def _name_of_split(pre_tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the way a text is split into words, None if it has none."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        digits = [step.get("type") == "Digits" and step["individual_digits"] for step in before]
        return {(): "gpt-2", (True,): "smollm"}.get(tuple(digits))
    if len(before) != 1 or before[0].get("type") != "Split" or before[0]["behavior"] != "Isolated":
        return None
    return PATTERNS.get(before[0]["pattern"].get("Regex", ""))


def _refused(tokenizer: Tokenizer, why: str) -> ConfigError:
    return ConfigError(
        f"tokenizer {tokenizer.name} cannot be stored in a .gguf file: {why}; export a folder "
        "instead: --to FOLDER"
    )
