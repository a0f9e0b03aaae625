import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.trees import TINY, random_params

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import ConfigError
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.weights.gguf_file import GgufDtype, add_tokenizer, save_gguf

BYTE = load_tokenizer("byte")
GPT2 = dataclasses.replace(TINY, n_embd=48, vocab_size=320, n_vocab=257)


def saved(
    path: Path, cfg: ModelConfig, tokenizer: Tokenizer = BYTE, dtype: GgufDtype = "f32"
) -> tuple[dict, dict]:
    """Random parameters, and the keys and tensors of the file that they are written to."""
    params = random_params(cfg)
    save_gguf(path, cfg, params, tokenizer, dtype)
    return params, tensors_of(path)


def reader_of(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def keys_of(path: Path) -> dict:
    return {name: field.contents() for name, field in reader_of(path).fields.items()}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader_of(path).tensors}


def types_of(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in reader_of(path).tensors}


def test_a_gpt2_has_llama_cpp_s_keys_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "my-model.gguf"
    params, tensors = saved(path, GPT2)
    keys = keys_of(path)
    expected = {
        "general.architecture": "gpt2",
        "general.name": "my-model",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "gpt2.block_count": 2,
        "gpt2.context_length": 8,
        "gpt2.embedding_length": 48,
        "gpt2.feed_forward_length": 192,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.merges": ["€ €"],
        "tokenizer.ggml.eos_token_id": 256,
    }
    assert {name: keys.get(name) for name in expected} == expected
    block = params["blocks"][1]
    np.testing.assert_array_equal(
        tensors["blk.1.attn_qkv.weight"], block["attn"]["c_attn"]["kernel"].T
    )
    np.testing.assert_array_equal(tensors["blk.1.ffn_norm.weight"], block["ln_2"]["scale"])
    np.testing.assert_array_equal(tensors["token_embd.weight"], params["wte"]["embedding"][:257])
    np.testing.assert_array_equal(tensors["position_embd.weight"], params["wpe"]["embedding"])
    parts = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    biases = {f"blk.{i}.{part}.bias" for i in (0, 1) for part in parts} | {"output_norm.bias"}
    assert {name for name in tensors if name.endswith("bias")} == biases
    assert not any(tensors[name].any() for name in biases)


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_the_tokenizer_is_in_the_file(name: str) -> None:
    tokenizer = load_tokenizer(name)
    writer = gguf.GGUFWriter(None, "gpt2")
    add_tokenizer(writer, tokenizer)  # reading 100,000 texts back would take seconds
    keys = {k.removeprefix("tokenizer.ggml."): v.value for k, v in writer.kv_data[0].items()}
    assert len(keys["tokens"]) == tokenizer.n_vocab
    assert keys["tokens"][tokenizer.eot] == "<|endoftext|>"
    assert keys["tokens"][0] == {"gpt2": "!", "byte": "Ā"}[name]
    assert [i for i, kind in enumerate(keys["token_type"]) if kind != 1] == [tokenizer.eot]
    assert keys["token_type"][tokenizer.eot] == 3
    assert (keys["model"], keys["pre"], keys["add_bos_token"]) == ("gpt2", "gpt-2", False)
    assert keys["bos_token_id"] == keys["eos_token_id"] == tokenizer.eot
    first = {"gpt2": (50_000, "Ġ t"), "byte": (1, "€ €")}[name]  # llama.cpp refuses an empty list
    assert (len(keys["merges"]), keys["merges"][0]) == first


def test_matrices_are_of_the_dtype_asked_for_and_vectors_float32(tmp_path: Path) -> None:
    for dtype, kind, error in (
        ("f16", "F16", 1e-3),
        ("bf16", "BF16", 8e-3),
        ("q8_0", "Q8_0", 2e-2),
    ):
        path = tmp_path / f"{dtype}.gguf"
        cfg = dataclasses.replace(GPT2, n_embd=64)
        params, tensors = saved(path, cfg, dtype=dtype)
        assert types_of(path)["blk.0.ffn_up.weight"] == types_of(path)["token_embd.weight"] == kind
        vectors = {"blk.0.ffn_up.bias", "output_norm.weight", "position_embd.weight"}
        assert {types_of(path)[name] for name in vectors} == {"F32"}
        kernel = params["blocks"][0]["mlp"]["c_fc"]["kernel"].T
        assert np.abs(tensors["blk.0.ffn_up.weight"] - kernel).max() < error


def test_rows_that_q8_0_cannot_divide_are_float16(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    fallen_back = save_gguf(path, GPT2, random_params(GPT2), BYTE, "q8_0")
    types = types_of(path)
    assert types["blk.0.ffn_down.weight"] == "Q8_0"  # 192 wide
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "F16"  # 48 wide
    assert set(fallen_back) == {name for name, kind in types.items() if kind == "F16"}


def test_a_weight_beyond_float16_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    params = random_params(GPT2)
    params["blocks"][0]["mlp"]["c_fc"]["kernel"] *= 1e6
    with pytest.raises(ConfigError, match=r"blk.0.ffn_up.weight has weights too large .* bf16"):
        save_gguf(tmp_path / "m.gguf", GPT2, params, BYTE, "f16")
    assert list(tmp_path.iterdir()) == []


MODERN = ModelConfig(
    arch="qwen3",
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=24,
    head_dim=16,
    mlp_width=40,
    block_size=12,
    vocab_size=320,
    n_vocab=257,
    rope_theta=5e5,
    tied_head=False,
)


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_a_modern_network_has_llama_cpp_s_keys_and_tensors(tmp_path: Path, arch) -> None:
    cfg = dataclasses.replace(MODERN, arch=arch)
    params, tensors = saved(tmp_path / "m.gguf", cfg)
    keys = keys_of(tmp_path / "m.gguf")
    expected = {
        "general.architecture": arch,
        f"{arch}.block_count": 2,
        f"{arch}.context_length": 12,
        f"{arch}.embedding_length": 24,
        f"{arch}.feed_forward_length": 40,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": 16,
        f"{arch}.attention.value_length": 16,
        f"{arch}.rope.freq_base": 5e5,
        f"{arch}.rope.dimension_count": 16,
        f"{arch}.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }
    assert {name: keys.get(name) for name in expected} == expected
    block = params["blocks"][1]
    down = block["mlp"]["down_proj"]["kernel"].T
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"], down)
    np.testing.assert_array_equal(tensors["output.weight"], params["lm_head"]["embedding"][:257])
    k_THD = np.asarray(block["attn"]["k_proj"]["kernel"].T).reshape(2, 16, 24)
    if arch == "llama":  # llama.cpp rotates neighbours: element i is followed by i + 8
        k_THD = k_THD[:, [i // 2 + 8 * (i % 2) for i in range(16)]]
    np.testing.assert_array_equal(tensors["blk.1.attn_k.weight"].reshape(2, 16, 24), k_THD)
    norms = {"blk.1.attn_q_norm.weight", "blk.1.attn_k_norm.weight"}
    assert (norms <= tensors.keys()) == (arch == "qwen3")


def test_a_tied_head_is_not_in_the_file(tmp_path: Path) -> None:
    cfg = dataclasses.replace(MODERN, tied_head=True)
    assert "output.weight" not in saved(tmp_path / "m.gguf", cfg)[1]
