import json

import pytest

from jaxgpt.config.checks import ConfigError
from jaxgpt.data.tokenizer import byte_characters, load_tokenizer
from jaxgpt.data.tokenizer_json import JsonTokenizer, tokenizer_from_files
from jaxgpt.weights.gguf_file import PATTERNS, gguf_vocabulary

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split_by(pattern: str) -> dict:
    """The pre_tokenizer of Qwen and Llama 3."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    by_bytes = {**BYTE_LEVEL, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [{**split, "invert": False}, by_bytes]}


def tokenizer_of(pre_tokenizer: dict, **changes) -> JsonTokenizer:
    """A tokenizer.json with seven ids, of which one is unused, one merge, and two added tokens."""
    vocab = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "<eos>": 5, "<tool>": 6}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values = {
        "version": "1.0",
        "added_tokens": [
            {"id": 5, "content": "<eos>", "special": True, **added},
            {"id": 6, "content": "<tool>", "special": False, **added},
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
        **changes,
    }
    return tokenizer_from_files({"tokenizer.json": json.dumps(values).encode()}, "mine")


def test_tokens_types_and_merges_are_those_of_the_file() -> None:
    found = gguf_vocabulary(tokenizer_of({**BYTE_LEVEL, "use_regex": True}))
    assert found.tokens == ["a", "b", "Ġ", "ab", "[PAD4]", "<eos>", "<tool>"]
    assert found.types == [1, 1, 1, 1, 5, 3, 4]
    assert (found.merges, found.pre) == (["a b"], "gpt-2")


def test_llama_cpp_s_name_of_the_split_is_found() -> None:
    qwen = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert PATTERNS[qwen] == "qwen2"
    for pattern, name in PATTERNS.items():
        assert gguf_vocabulary(tokenizer_of(split_by(pattern))).pre == name
    digits = {"type": "Digits", "individual_digits": True}
    smollm = {"type": "Sequence", "pretokenizers": [digits, {**BYTE_LEVEL, "use_regex": True}]}
    assert gguf_vocabulary(tokenizer_of(smollm)).pre == "smollm"


@pytest.mark.parametrize(
    ("tokenizer", "answer"),
    [
        (tokenizer_of(split_by(r"\w+|\W+")), "llama.cpp cannot split a text into words as it does"),
        (tokenizer_of({"type": "Sequence", "pretokenizers": []}), "cannot split a text into words"),
        (tokenizer_of({**BYTE_LEVEL, "add_prefix_space": True}), "cannot split a text into words"),
        (tokenizer_of(BYTE_LEVEL, decoder={"type": "Fuse"}), "it is not a byte-level BPE"),
        (tokenizer_of(BYTE_LEVEL, normalizer={"type": "Lowercase"}), "its normalizer, Lowercase"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_apply_otherwise_is_refused(tokenizer, answer) -> None:
    with pytest.raises(ConfigError) as refused:
        gguf_vocabulary(tokenizer)
    assert answer in str(refused.value)
    assert "tokenizer mine cannot be stored in a .gguf file" in str(refused.value)


def test_gpt2_and_bytes_are_as_llama_cpp_needs_them() -> None:
    (merge,) = gguf_vocabulary(load_tokenizer("byte")).merges  # it refuses an empty list
    assert set(merge.split(" ")).isdisjoint(byte_characters().values())
    assert len(gguf_vocabulary(load_tokenizer("gpt2")).merges) == 50_000
