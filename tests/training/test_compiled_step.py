"""What a card would run, read from the program that XLA's compiler makes for one that is not here.

The guards of `test_step_cost.py` see what is computed; these see what is also moved.
"""

import dataclasses
import math
import re

import pytest
from helpers.configs import resolved
from hlo import Program

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.fields import Config, Dtype
from jaxgpt.planning import memory, target
from jaxgpt.planning.gpus import find_gpu

H100 = find_gpu("h100")
B, T, D = 8, 1024, 768
GPT2 = ModelConfig(n_layer=2, n_head=12, n_embd=D, block_size=T, vocab_size=50304, n_vocab=50257)
MODELS = {
    "gpt2": GPT2,
    "qwen3": dataclasses.replace(GPT2, arch="qwen3", n_head=6, n_kv_head=2, tied_head=False),
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        target.obstacle(H100) is not None,
        reason=f"XLA's compiler for cards: {target.obstacle(H100)}",
    ),
]


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def program(request) -> str:
    cfg = resolved(Config(model=request.param), "bfloat16", batch_size=B, effective_batch_size=B)
    return memory.compile_ahead(cfg, target.card_devices(H100)[0]).as_text()


def made_by(operation: str, program: str) -> list[tuple[str, int]]:
    """(dtype, elements) of each array that an operation gives."""
    found = re.findall(rf" = (\w+)\[([\d,]+)\]\S* {operation}\(", program)
    return [(dtype, math.prod(map(int, dims.split(",")))) for dtype, dims in found]


def test_no_activation_of_a_layer_is_copied(program) -> None:
    """As the residual stream was, when cuBLAS was to add to it in place.

    The embeddings are, once: without excess precision they are written in bfloat16, and kept.
    """
    assert [size for _, size in made_by("copy", program) if size >= B * T * D] == [B * T * D]


def test_the_gradient_of_a_blocks_norm_is_no_array_as_large_as_its_input(program) -> None:
    """Only the last norm, which no linear layer follows, has its two in float32."""
    as_large = [dtype for dtype, size in made_by("fusion", program) if size == B * T * D]
    assert as_large.count("bf16") > 2 * GPT2.n_layer
    assert as_large.count("f32") <= 2


def test_flash_attention_runs_once_forward_and_once_back_in_each_layer(program) -> None:
    for kernel in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
        assert program.count(f'custom_call_target="__cudnn${kernel}"') == GPT2.n_layer


def test_a_deterministic_step_holds_one_backward_pass_of_attention() -> None:
    """XLA fails to run a deterministic program that holds it twice."""
    asked = Config(model=GPT2, deterministic=True)
    cfg = resolved(asked, "bfloat16", batch_size=B, effective_batch_size=2 * B)
    program = memory.compile_ahead(cfg, target.card_devices(H100)[0]).as_text()
    assert program.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 1


def test_gpt2s_gelu_and_its_queries_keys_and_values_need_no_pass_of_their_own() -> None:
    cfg = resolved(Config(model=GPT2), "bfloat16", batch_size=B, effective_batch_size=B)
    program = memory.compile_ahead(cfg, target.card_devices(H100)[0]).as_text()
    assert program.count('"epilogue":"GELU_AUX"') == GPT2.n_layer
    sizes = re.findall(r" = \(bf16\[(\d+),(\d+)\]\S* s8\[\d+\]\S*\) custom-call", program)
    assert sizes.count((str(B * T), str(D))) >= 3 * GPT2.n_layer
    assert (str(B * T), str(3 * D)) not in sizes
    assert f"bf16[{B},{T},{3 * D}]" not in program  # nor are their gradients joined


def test_a_norms_backward_pass_is_one_kernel(program) -> None:
    """Sums over rows have no kernel of their own, which would read activations once more."""
    activation = 2 * B * T * D
    kernels = [k for k in Program(program).kernels() if "Norm.without_gain" in k.sources]
    assert len([k for k in kernels if k.read >= activation]) >= 2 * GPT2.n_layer
    assert not [k for k in kernels if k.read >= activation and k.written < activation]


@pytest.mark.parametrize(("card", "dtype"), [("t4", "float16"), ("rtx3090", "float32")])
def test_no_array_has_the_scores_of_all_queries_where_flash_attention_is_missing(
    card: str, dtype: Dtype
) -> None:
    T = 1280  # no other axis is as long
    cfg = Config(model=dataclasses.replace(GPT2, block_size=T))
    cfg = resolved(cfg, dtype, batch_size=2, effective_batch_size=2)
    program = memory.compile_ahead(cfg, target.card_devices(find_gpu(card))[0]).as_text()
    shapes = [dims.split(",") for dims in re.findall(r"\w\[([\d,]+)\]", program)]
    assert max(dims.count(str(T)) for dims in shapes) == 1
