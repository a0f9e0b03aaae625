"""Qwen3 and Llama in Hugging Face's format; test_huggingface.py has what GPT-2 shares with them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers.trees import assert_trees_equal, random_params
from safetensors.numpy import load_file

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.network import build_model
from jaxgpt.weights.huggingface import FolderError, load_params, read_model_config, save_model

QWEN3 = ModelConfig(
    arch="qwen3",
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=24,
    head_dim=10,
    mlp_width=40,
    block_size=12,
    vocab_size=64,
    n_vocab=50,
    rope_theta=5e5,
    norm_eps=1e-5,
    tied_head=False,
)
TIED = dataclasses.replace(QWEN3, tied_head=True)
LLAMA = dataclasses.replace(QWEN3, arch="llama")
# n_layer, n_head, n_kv_head, n_embd, head_dim, tied; transformers wants n_embd % n_head == 0
SHAPES = [
    (2, 4, 2, 32, 8, True),
    (1, 6, 1, 24, 10, False),
    (3, 3, 3, 48, 16, False),
    (2, 8, 4, 64, 32, True),
    (5, 2, 1, 16, 6, False),
]


def logits(cfg: ModelConfig, params, tokens_BT) -> np.ndarray:
    model = nnx.merge(build_model(cfg, "float32", plain_attention), params)
    return np.asarray(model(tokens_BT))[..., : cfg.n_vocab]


def some_tokens(cfg: ModelConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, cfg.n_vocab, (2, cfg.block_size))


def assert_same_logits(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
@pytest.mark.parametrize(("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "tied"), SHAPES)
def test_transformers_computes_the_same_logits_from_an_export_and_we_from_its_files(
    tmp_path, arch, n_layer, n_head, n_kv_head, n_embd, head_dim, tied
) -> None:
    torch = pytest.importorskip("torch", reason="compared with golden numbers instead")
    transformers = pytest.importorskip("transformers", reason="compared with golden numbers")
    shape = {"n_layer": n_layer, "n_head": n_head, "n_kv_head": n_kv_head, "n_embd": n_embd}
    cfg = dataclasses.replace(QWEN3, arch=arch, **shape, head_dim=head_dim, tied_head=tied)
    params = random_params(cfg)
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", cfg, params, eot=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(some_tokens(cfg))).logits.numpy()
    assert_same_logits(logits(cfg, params, some_tokens(cfg)), expected)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    back = read_model_config(tmp_path / "theirs")
    again = load_params(tmp_path / "theirs", back)
    assert_same_logits(logits(back, again, some_tokens(cfg)), expected)


@pytest.mark.parametrize("cfg", [QWEN3, TIED, LLAMA], ids=["qwen3", "tied", "llama"])
def test_export_and_import_change_no_bit(tmp_path: Path, cfg: ModelConfig) -> None:
    params = random_params(cfg)
    save_model(tmp_path, cfg, params, eot=7)
    assert read_model_config(tmp_path) == dataclasses.replace(cfg, vocab_size=50)
    back = load_params(tmp_path, cfg)
    for name in {"embed_tokens", "lm_head"} & params.keys():
        assert not back[name]["embedding"][50:].any()
        params[name] = {"embedding": params[name]["embedding"].at[50:].set(0)}
    assert_trees_equal(back, params)


def test_config_json_is_read_by_old_and_new_readers(tmp_path: Path) -> None:
    save_model(tmp_path, QWEN3, random_params(QWEN3), eot=7)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "hidden_act": "silu",
        "max_position_embeddings": 12,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "rope_theta": 5e5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "initializer_range": 0.02,
        "bos_token_id": 7,
        "eos_token_id": 7,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def test_sizes_that_are_not_set_are_written_as_numbers(tmp_path: Path) -> None:
    cfg = dataclasses.replace(QWEN3, n_kv_head=None, head_dim=None, mlp_width=None)
    save_model(tmp_path, cfg, random_params(cfg), eot=7)
    found = read_model_config(tmp_path)
    assert (found.n_kv_head, found.head_dim, found.mlp_width) == (4, 6, 64)


def test_kernels_are_stored_as_out_in_and_a_tied_head_is_not(tmp_path: Path) -> None:
    params = random_params(TIED)
    save_model(tmp_path, TIED, params, eot=7)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (20, 24)
    np.testing.assert_array_equal(
        tensors["model.layers.1.mlp.down_proj.weight"],
        params["blocks"][1]["mlp"]["down_proj"]["kernel"].T,
    )
    assert tensors["model.embed_tokens.weight"].shape == (50, 24)
    assert "model.norm.weight" in tensors
    assert "lm_head.weight" not in tensors


def test_the_norm_after_the_embedding_is_folded_without_changing_the_logits(tmp_path) -> None:
    cfg = dataclasses.replace(QWEN3, embedding_norm=True, zero_init=True)
    params = random_params(cfg)
    save_model(tmp_path, cfg, params, eot=7)
    plain = read_model_config(tmp_path)
    assert not plain.embedding_norm
    folded = load_params(tmp_path, plain)
    expected = logits(cfg, params, some_tokens(cfg))
    assert_same_logits(logits(plain, folded, some_tokens(cfg)), expected)
    unfolded = {**folded, "embed_tokens": {"embedding": params["embed_tokens"]["embedding"][:50]}}
    assert np.abs(logits(plain, unfolded, some_tokens(cfg)) - expected).max() > 0.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path, QWEN3, random_params(QWEN3), eot=7)
    return tmp_path


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in found.items() if v != "missing"}))


@pytest.mark.parametrize(
    ("values", "theta"),
    [
        ({"rope_parameters": "missing"}, 5e5),
        ({"rope_theta": "missing"}, 5e5),
        ({"rope_parameters": "missing", "rope_theta": "missing"}, 10_000),  # transformers' default
        ({"rope_parameters": "missing", "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_scaling": None, "sliding_window": 4096, "max_window_layers": 28}, 5e5),  # Qwen's
        ({"layer_types": ["full_attention"] * 2}, 5e5),
    ],
)
def test_the_rotary_base_is_found_wherever_it_is_written(folder, values, theta) -> None:
    change_config(folder, **values)
    assert read_model_config(folder) == dataclasses.replace(QWEN3, vocab_size=50, rope_theta=theta)


def test_sizes_that_old_files_do_not_have_are_transformers_defaults(folder: Path) -> None:
    change_config(folder, num_key_value_heads="missing", head_dim="missing", model_type="llama")
    found = read_model_config(folder)
    assert (found.arch, found.kv_heads, found.head_width) == ("llama", 4, 6)


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"attention_bias": True}, "attention_bias is true, and only false"),
        ({"mlp_bias": True}, "mlp_bias is true, and only false"),
        ({"use_sliding_window": True}, "use_sliding_window is true, and only false"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has sliding_attention, and only"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", and only "silu"'),
        (
            {"rope_scaling": {"rope_type": "llama3"}},
            'rope_scaling: rope_type is "llama3", and only',
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling: type is "linear"'),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_parameters: rope_type is "yarn", and o'),
        ({"rope_parameters": [1]}, "rope_parameters is [1], not an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only 1.0"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {"),
        ({"num_hidden_layers": "missing"}, "num_hidden_layers is null, not a whole number"),
        ({"head_dim": "8"}, 'head_dim is "8", not a whole number'),
        ({"head_dim": 7}, "heads of width 7: rotary positions need an even width"),
        ({"num_key_value_heads": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"rms_norm_eps": "1e-6"}, 'norm_eps is "1e-6", not a number'),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(folder: Path, values, answer) -> None:
    change_config(folder, **values)
    with pytest.raises(FolderError) as refused:
        read_model_config(folder)
    assert answer in str(refused.value)


def test_a_head_that_is_said_to_be_tied_must_be_the_embedding(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(FolderError, match=r"lm_head.weight differs from embed_tokens.weight"):
        load_params(folder, read_model_config(folder))


def test_an_untied_head_must_be_in_the_file(tmp_path: Path) -> None:
    save_model(tmp_path, TIED, random_params(TIED), eot=7)
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(FolderError, match=r"tensor lm_head.weight is missing"):
        load_params(tmp_path, read_model_config(tmp_path))
