import runpy
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jaxgpt.errors import UserError
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.network import build_model
from jaxgpt.weights.huggingface import load_params, read_model_config

torch = pytest.importorskip("torch", reason="nanoGPT's checkpoints are torch's")
convert_nanogpt = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "convert_nanogpt.py"))
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
def test_a_converted_checkpoint_gives_the_original_logits(tmp_path: Path, bias: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="it computes what nanoGPT would")
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 61}
    config = transformers.GPT2Config(
        **shape, n_positions=12, activation_function="gelu", bos_token_id=0, eos_token_id=0
    )
    network = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in network.named_parameters():
        std = 0.4 if bias or not name.endswith("bias") else 0.0
        torch.nn.init.normal_(parameter, std=std)
    # Under nanoGPT's names, matrices as torch's Linear has them, as torch.compile leaves it.
    state = {
        f"_orig_mod.{name}": (x.T if name.endswith(MATRICES) else x).clone()
        for name, x in network.state_dict().items()
        if bias or not name.endswith("bias")
    }
    args = {**shape, "block_size": 12, "bias": bias, "dropout": 0.1}
    torch.save({"model": state, "model_args": args, "iter_num": 3}, tmp_path / "ckpt.pt")
    convert_nanogpt["convert"](tmp_path / "ckpt.pt", tmp_path / "hf")

    cfg = read_model_config(tmp_path / "hf")
    model = nnx.merge(
        build_model(cfg, "float32", plain_attention), load_params(tmp_path / "hf", cfg)
    )
    tokens_BT = np.random.default_rng(0).integers(0, 61, (2, 12))
    with torch.no_grad():
        expected = network(torch.tensor(tokens_BT)).logits.numpy()
    np.testing.assert_allclose(model(tokens_BT), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("rows", "ids"), [(50_304, 50_257), (50_257, 50_257), (65, 65)])
def test_padded_ids_are_left_out(rows: int, ids: int) -> None:
    args = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "bias": False}
    cfg = convert_nanogpt["model_config"]({**args, "vocab_size": rows})
    assert (cfg.n_vocab, cfg.gelu, cfg.bias) == (ids, "erf", False)


def test_a_file_that_is_not_nanogpts_checkpoint_is_refused(tmp_path: Path) -> None:
    convert = convert_nanogpt["convert"]
    with pytest.raises(UserError, match="cannot be read"):
        convert(tmp_path / "ckpt.pt", tmp_path / "hf")
    (tmp_path / "text.pt").write_text("no pickle")
    torch.save({"model": {}}, tmp_path / "part.pt")
    torch.save({"model": {}, "model_args": {}}, tmp_path / "empty.pt")
    torch.save(Path("x"), tmp_path / "code.pt")  # not weights alone: its loader would run code
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"model": {"a": 1}, "model_args": {"vocab_size": 65}}, tmp_path / "other.pt")
    torch.save({"model": {}, "model_args": 3}, tmp_path / "number.pt")
    (tmp_path / "nothing.pt").touch()
    for name in ("text", "part", "empty", "code", "tensor", "other", "number", "nothing"):
        with pytest.raises(UserError, match=rf"{name}\.pt is not a ckpt\.pt of nanoGPT") as refused:
            convert(tmp_path / f"{name}.pt", tmp_path / "hf")
        assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "hf").exists()
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match="already exists"):
        convert(tmp_path / "ckpt.pt", tmp_path / "hf")
