import dataclasses
import json
import re
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.trees import TINY, assert_trees_equal, random_params
from safetensors.numpy import load_file, save_file

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.network import build_model
from jaxgpt.weights import gpt2, huggingface
from jaxgpt.weights.huggingface import (
    FolderError,
    load_params,
    read_model_config,
    save_model,
)

GOLDEN = sorted(path for path in (Path(__file__).parents[1] / "golden").iterdir())
WITH_BIAS = dataclasses.replace(TINY, bias=True)


def logits(cfg: ModelConfig, params, tokens_BT) -> np.ndarray:
    model = nnx.merge(build_model(cfg, "float32", plain_attention), params)
    return np.asarray(model(tokens_BT))[..., : cfg.n_vocab]


def imported_logits(folder: Path, tokens_BT) -> np.ndarray:
    cfg = read_model_config(folder)
    return logits(cfg, load_params(folder, cfg), tokens_BT)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_imported_weights_give_the_logits_of_transformers(folder: Path) -> None:
    golden = np.load(folder / "logits.npz")
    got = imported_logits(folder, golden["tokens"])
    np.testing.assert_allclose(got, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("activation", "kind", "shard"),
    [
        ("gelu_new", "GPT2LMHeadModel", "5GB"),
        ("gelu_new", "GPT2LMHeadModel", "10KB"),
        ("gelu", "GPT2Model", "5GB"),  # its tensors have no prefix
    ],
)
def test_files_written_by_transformers_give_its_logits(tmp_path, activation, kind, shard) -> None:
    torch = pytest.importorskip("torch", reason="compared with golden numbers instead")
    transformers = pytest.importorskip("transformers", reason="compared with golden numbers")
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 16, "vocab_size": 61}
    config = transformers.GPT2Config(
        **shape, activation_function=activation, bos_token_id=0, eos_token_id=0
    )
    theirs = getattr(transformers, kind)(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    tokens_BT = np.random.default_rng(0).integers(0, 61, (3, 16))
    with torch.no_grad():
        out = theirs(torch.tensor(tokens_BT))
        expected = out.logits if "logits" in out else out[0] @ theirs.wte.weight.T
    got = imported_logits(tmp_path, tokens_BT)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 16), (1, 4, 64), (4, 3, 24)])
def test_exported_files_give_the_same_logits_in_transformers(tmp_path, shape, bias, gelu) -> None:
    torch = pytest.importorskip("torch", reason="compared with golden numbers instead")
    transformers = pytest.importorskip("transformers", reason="compared with golden numbers")
    n_layer, n_head, n_embd = shape
    cfg = dataclasses.replace(
        TINY, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=bias, gelu=gelu
    )
    params = random_params(cfg)
    save_model(tmp_path, cfg, params, eot=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens_BT = np.random.default_rng(0).integers(0, cfg.n_vocab, (3, cfg.block_size))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens_BT)).logits.numpy()
    np.testing.assert_allclose(logits(cfg, params, tokens_BT), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(imported_logits(tmp_path, tokens_BT), expected, atol=1e-4, rtol=0)
    trained = sum(p.numel() for p in theirs.parameters())
    zero_biases = 0 if bias else sum(p.numel() for p in theirs.parameters() if not p.any())
    assert cfg.parameter_count(padding=False) == trained - zero_biases


@pytest.mark.parametrize("cfg", [TINY, WITH_BIAS], ids=["without bias", "with bias"])
def test_export_and_import_change_no_bit(tmp_path: Path, cfg: ModelConfig) -> None:
    params = random_params(cfg)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_model(tmp_path / "a", cfg, params, eot=7)
    found = read_model_config(tmp_path / "a")
    assert dataclasses.replace(found, vocab_size=64, n_vocab=50) == cfg
    back = load_params(tmp_path / "a", cfg)
    assert not back["wte"]["embedding"][50:].any()
    unpadded = {**params, "wte": {"embedding": params["wte"]["embedding"].at[50:].set(0)}}
    assert_trees_equal(back, jax.tree.map(np.asarray, unpadded))
    save_model(tmp_path / "b", cfg, back, eot=7)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_padding_rows_are_not_exported(tmp_path: Path) -> None:
    save_model(tmp_path, TINY, random_params(TINY), eot=49)
    assert load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].shape == (50, 16)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["vocab_size"], values["eos_token_id"], values["bias"]) == (50, 49, False)
    assert values["n_ctx"] == TINY.block_size  # llama.cpp's converter stops without it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a golden model, to be modified."""
    return Path(shutil.copytree(GOLDEN[-1], tmp_path / "model"))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_masks(tensors: dict) -> dict:
    mask = np.tril(np.ones((1, 1, 20, 20), bool))
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    return bare | {"h.0.attn.bias": mask, "h.0.attn.masked_bias": np.float32([-1e4])}


@pytest.mark.parametrize(
    "change",
    [
        with_masks,
        lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]},
        lambda tensors: {name: x.astype(np.float64) for name, x in tensors.items()},
    ],
    ids=["no prefix, with mask buffers", "with the tied head", "another dtype"],
)
def test_other_ways_to_store_the_weights_give_the_same_logits(folder: Path, change) -> None:
    golden = np.load(folder / "logits.npz")
    change_tensors(folder, change)
    got = imported_logits(folder, golden["tokens"])
    np.testing.assert_allclose(got, golden["logits"], atol=1e-4, rtol=0)


def test_weights_in_several_files_are_found_by_their_index(folder: Path) -> None:
    expected = load_params(folder, read_model_config(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_trees_equal(load_params(folder, read_model_config(folder)), expected)


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "", "..", "\0", None])
def test_an_index_may_not_name_files_of_another_folder(folder: Path, name: str | None) -> None:
    (folder / "model.safetensors").rename(folder.parent / "a.safetensors")
    weight_map = ["x"] if name is None else {"wte.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FolderError, match=r"weight_map names '\S*', which is not a file of th"):
        load_params(folder, read_model_config(folder))


def test_a_failed_write_raises_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        save_model(tmp_path / "nowhere", TINY, random_params(TINY), eot=7)


def test_a_network_that_its_config_json_does_not_describe_is_not_exported(
    tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delitem(huggingface.FORMATS, "gpt2")
        with pytest.raises(FolderError, match="only qwen3, llama can be exported, and this netw"):
            save_model(tmp_path, TINY, random_params(TINY), eot=7)
    other = dataclasses.replace(gpt2.FORMAT, write=lambda cfg: {"bias": True})
    monkeypatch.setitem(huggingface.FORMATS, "gpt2", other)
    with pytest.raises(FolderError, match="an option that GPT2LMHeadModel lacks"):
        save_model(tmp_path, TINY, random_params(TINY), eot=7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_are_read_exactly(folder: Path, dtype: str) -> None:
    change_tensors(folder, lambda t: {name: x.astype(jnp.dtype(dtype)) for name, x in t.items()})
    params = load_params(folder, read_model_config(folder))
    stored = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    assert stored.dtype == dtype
    np.testing.assert_array_equal(params["wte"]["embedding"], stored.astype(np.float32))


def test_the_context_may_be_shorter_and_the_vocabulary_padded(folder: Path) -> None:
    cfg = read_model_config(folder)
    other = dataclasses.replace(cfg, block_size=6, vocab_size=64)
    tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 6))
    got = logits(other, load_params(folder, other), tokens_BT)
    expected = logits(cfg, load_params(folder, cfg), tokens_BT)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "answers"),
    [
        ({"model_type": "mamba"}, ['model_type is "mamba"', '"gpt2"', '"qwen3"', '"llama"']),
        ({"layer_norm_epsilon": 1e-6}, ["layer_norm_epsilon is 1e-06, and only 1e-05"]),
        ({"n_inner": 17}, ["n_inner is 17, and only 4 x n_embd"]),
        ({"activation_function": "relu"}, ["activation_function relu is not one of gelu_new"]),
        ({"activation_function": ["gelu"]}, ["activation_function ['gelu'] is not one of"]),
        ({"n_layer": "2"}, ['n_layer is "2", not a whole number']),
        ({"n_embd": {}, "n_inner": 64}, ["n_embd is {}, not a whole number"]),
        ({"n_embd": 15, "n_head": 2}, ["n_embd 15 is not a multiple of n_head 2"]),
        (
            {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
            ["tie_word_embeddings is false", "scale_attn_by_inverse_layer_idx is true"],
        ),
    ],
)
def test_an_unsupported_model_is_refused_with_every_reason(folder, values, answers) -> None:
    change_config(folder, **values)
    with pytest.raises(FolderError) as refused:
        read_model_config(folder)
    assert [part for part in answers if part not in str(refused.value)] == []
    assert str(refused.value).startswith(str(folder / "config.json"))


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "h.1.mlp.c_fc.bias" not in k},
            "tensor h.1.mlp.c_fc.bias is missing",
        ),
        (lambda t: {**t, "score.weight": np.ones(3)}, "tensor score.weight does not belong"),
        (lambda t: {**t, "transformer.ln_f.weight": np.ones(9)}, "tensor ln_f.weight is (9,)"),
        (lambda t: {k: np.asarray(x, int) for k, x in t.items()}, "is int64; only floats"),
        (lambda t: {**t, "ln_f.weight": t["transformer.ln_f.weight"]}, "ln_f.weight occurs twi"),
        (
            lambda t: {**t, "lm_head.weight": 1 + t["transformer.wte.weight"]},
            "lm_head.weight differs from wte.weight",
        ),
    ],
)
def test_an_error_names_the_tensor_that_does_not_fit(folder: Path, change, answer) -> None:
    change_tensors(folder, change)
    cfg = read_model_config(folder)
    with pytest.raises(FolderError, match=re.escape(answer)):
        load_params(folder, cfg)


def test_trained_biases_are_not_dropped_where_the_config_has_none(folder: Path) -> None:
    change_config(folder, bias=False)
    with pytest.raises(FolderError, match=r'bias is not zero, .* set "bias": true in config.json'):
        load_params(folder, read_model_config(folder))


def test_an_error_names_the_file_that_is_missing_or_unreadable(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FolderError, match=r"model\.safetensors cannot be read"):
        load_params(folder, WITH_BIAS)
    header = b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'  # NumPy has no such
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(FolderError, match=r"model\.safetensors cannot be read .*float8"):
        load_params(folder, WITH_BIAS)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FolderError, match=r"has no model.safetensors .*save_pretrained"):
        load_params(folder, WITH_BIAS)
    (folder / "config.json").write_text("[]")
    with pytest.raises(FolderError, match="cannot be read: Expected `object`, got"):
        read_model_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FolderError, match=r"config\.json is missing"):
        read_model_config(folder)


def test_more_layers_than_tensors_are_refused_without_listing_them(folder: Path) -> None:
    change_config(folder, n_layer=10**9)
    with pytest.raises(FolderError, match="n_layer is 1000000000 in"):
        load_params(folder, read_model_config(folder))
