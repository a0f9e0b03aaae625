"""A tokenizer as GGUF stores it: tokens, merges, and llama.cpp's name for how text is split.

llama.cpp has a fixed list of ways to split a text into words before BPE. A tokenizer that splits in
another way would load and give other ids, so it is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxgpt.config.checks import ConfigError
from jaxgpt.data.tokenizer import ByteTokenizer, Tokenizer, gpt2_merges
from jaxgpt.data.tokenizer_files import is_byte_level, vocabulary
from jaxgpt.data.tokenizer_json import MAIN_FILE, JsonTokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
# llama.cpp refuses a vocabulary without merges. No byte is written as this character, so that this
# one joins nothing; "Ġ Ġ" would lose double spaces.
NO_MERGES = ["€ €"]

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?%s+|\p{N}%s| ?[^\s%s\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The one that suits most scripts: marks belong to the letter before them, which those of India
# need, and each digit is a word.
WORDS_WITH_MARKS = _WORDS % (r"[\p{L}\p{M}]", "", r"\p{L}\p{M}")
# The regular expression that splits a text, by llama.cpp's name.
PATTERNS = {
    _WORDS % (r"\p{L}", "", r"\p{L}"): "qwen2",
    _WORDS % (r"\p{L}", "{1,3}", r"\p{L}"): "llama-bpe",
    WORDS_WITH_MARKS: "qwen35",
}


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
        ConfigError: if llama.cpp would make other ids of a text.
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
    """llama.cpp's name for the way in which a text is split, None if it has none."""
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
