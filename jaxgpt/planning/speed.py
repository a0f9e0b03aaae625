"""How long training takes on a card, and the loss it reaches.

Both are predictions. Speed is the card's peak times an MFU that was measured or published for its
architecture; loss is the scaling law of Hoffmann et al. 2022 as Besiroglu et al. 2024 refitted it.
"""

import dataclasses
import math
from typing import NamedTuple

from jaxgpt.config.architecture import ModelConfig, parameter_sizes
from jaxgpt.config.fields import Remat
from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import Resolved
from jaxgpt.model.remat import REMATS
from jaxgpt.planning.gpus import Gpu


class Mfu(NamedTuple):
    """Model FLOPs utilization, and where it comes from."""

    value: float
    source: str


# By compute capability: GPT-2 124M on dense half-precision peaks, without rematerialization.
MFUS = {
    (7, 0): Mfu(0.30, "assumed: in float16 without flash attention; nothing is published"),
    (7, 5): Mfu(0.30, "assumed: in float16 without flash attention; nothing is published"),
    (8, 0): Mfu(0.60, "published: llm.c, 124M on A100 80GB, scripts/run_gpt2_124M.sh"),
    (8, 6): Mfu(0.55, "assumed: as on the RTX 4090; no good figure is published for this chip"),
    (8, 9): Mfu(0.55, "published: 124M in PyTorch on RTX 4090, nanoGPT issue 182: 0.55"),
    (9, 0): Mfu(0.50, "measured: six shapes on an H200, each within 11 %, docs/performance.md"),
    (10, 0): Mfu(0.40, "assumed: less than on Hopper; nothing is published for this chip"),
    (10, 3): Mfu(0.40, "assumed: less than on Hopper; nothing is published for this chip"),
    (12, 0): Mfu(0.50, "assumed: a little less than on the RTX 4090"),
}
# Each micro-batch, whatever its size, reads the weights and writes and accumulates gradients: some
# 30 bytes per parameter, which at 90 FLOPs per byte cost as much time as this many tokens.
TOKENS_LOST_PER_MICRO_BATCH = 450
HOUR = 3600.0
# L = E + A / N^alpha + B / D^beta, nats per token, N parameters, D tokens (Besiroglu et al. 2024,
# table 1).
SCALING_LAW = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
# How many tokens of GPT-2 with AdamW one token of another recipe is worth: ratios of the tokens
# that modded-nanogpt's runs at 124M need for a loss of 3.28 on FineWeb. llm.c's recipe needs 10.3B
# (record 1), the modern block 2.95B with Adam and 1.77B with Muon (track 3, results 2 and 6), here
# 1.9B, without the parts that no other program loads. GPT-2 with rotary positions needs 5.0B with
# AdamW and 3.25B with Muon (records 2 and 4). Nothing is published for llama: it counts as 1.
TOKENS_WORTH = {("gpt2", "muon"): 5.0 / 3.25, ("qwen3", "adamw"): 10.3 / 2.95}
TOKENS_WORTH |= {("qwen3", "muon"): 10.3 / 1.9}
# Peak learning rates by parameters: the rule in the README, continued with GPT-3's for 1.3B.
LEARNING_RATES = ((30e6, 8e-4), (124e6, 6e-4), (355e6, 5e-4), (774e6, 3e-4), (1.56e9, 2e-4))


def model_flops_per_token(model: ModelConfig) -> int:
    """FLOPs of one training token, forward and backward: 6 N + 12 L D T.

    The formula of nanoGPT and of PaLM's appendix B: N without embeddings that are only looked up
    (positions; tokens, if the head is not tied to them), D the width of all heads together, grouped
    or not; attention counted in full rather than causal, recomputation not counted.
    GPT-2 124M has N = 123,587,328, hence 854,770,176.
    """
    assert model.vocab_size is not None
    sizes = parameter_sizes(model).items()
    in_blocks = sum(size for path, size in sizes if not path.endswith("embedding"))
    N = in_blocks + model.vocab_size * model.n_embd
    return 6 * N + 12 * model.n_layer * model.n_head * model.head_width * model.block_size


def reached_mfu(tokens_per_second: float, model: ModelConfig, peak_flops: float) -> float:
    """MFU of a measured speed: the model's FLOPs, not the hardware's, over a card's peak."""
    return tokens_per_second * model_flops_per_token(model) / peak_flops


def peak_of(gpu: Gpu | None, dtype: str, devices: int) -> float | None:
    """FLOP/s that an MFU refers to: dense half precision; None in float32 and for unknown cards."""
    if gpu is None or gpu.half_flops is None or dtype == "float32":
        return None
    return gpu.half_flops * devices


def relative_step_time(remat: Remat, tokens_per_micro_batch: int) -> float:
    """Time of a step relative to remat none and infinite micro-batches; for ranking only."""
    return REMATS[remat].work + TOKENS_LOST_PER_MICRO_BATCH / tokens_per_micro_batch


def mfu_of(gpu: Gpu) -> Mfu | None:
    """The MFU to expect on a card; None if that or its peak is unknown."""
    return None if gpu.half_flops is None else MFUS.get(gpu.compute_capability)


def tokens_per_second(cfg: Resolved, gpu: Gpu) -> float | None:
    """Predicted training speed of `cfg` on such cards; None where no MFU is known for them.

    Communication between several cards is not included; docs/scaling.md has its bytes.
    """
    mfu, peak = mfu_of(gpu), peak_of(gpu, cfg.dtype, cfg.batch.devices)
    if mfu is None or peak is None:
        return None
    at_best = peak * mfu.value / model_flops_per_token(cfg.model)
    return at_best / relative_step_time(cfg.remat, cfg.batch.batch_size * cfg.model.block_size)


def predicted_loss_of(cfg: Resolved) -> float:
    """`predicted_loss` of a run, its tokens weighted by TOKENS_WORTH."""
    worth = TOKENS_WORTH.get((cfg.model.arch, cfg.optimizer.optimizer), 1.0)
    return predicted_loss(cfg.model.parameter_count(), worth * cfg.total_tokens)


def predicted_loss(parameters: int, tokens: float) -> float:
    """Loss in nats per token that the scaling law predicts; on its authors' data, not FineWeb."""
    law = SCALING_LAW
    return (
        law["E"]
        + law["A"] / parameters ** law["alpha"]
        + law["B"] / max(tokens, 1.0) ** law["beta"]
    )


def suggested_learning_rate(parameters: int) -> float:
    """Peak learning rate for a model's size, interpolated between LEARNING_RATES, to two digits."""
    sizes, rates = zip(*LEARNING_RATES, strict=True)
    x = min(max(parameters, sizes[0]), sizes[-1])
    i = next(i for i in range(1, len(sizes)) if x <= sizes[i])
    along = math.log(x / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
    rate = rates[i - 1] * (rates[i] / rates[i - 1]) ** along
    return float(f"{rate:.1e}")


def at_suggested_rates(cfg: Resolved) -> Resolved:
    """`cfg` with the learning rates for its size.

    Those of a preset made for Muon are known at its width; others follow the README's rule.
    """
    preset = load_preset(cfg.asked.preset)
    if cfg.optimizer.optimizer == preset.optimizer.optimizer == "muon":
        known = preset.optimizer.scaled(math.sqrt(preset.model.n_embd / cfg.model.n_embd))
        rates = known.rates()
    else:
        peak = suggested_learning_rate(cfg.model.parameter_count())
        rates = {"learning_rate": peak, "min_lr": float(f"{peak / 10:.2g}")}
    return dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, **rates))
