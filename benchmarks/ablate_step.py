"""Time the training step with one part of its design replaced, as `jaxgpt.bench` times it.

    python benchmarks/ablate_step.py attention-plain --preset gpt2-124m --synthetic --json

Arguments after the variant are flags of `jaxgpt.bench`; the variant is added to its JSON. Parts
that are flags themselves (--remat, --scan-layers, --deterministic) are measured with `as-it-is`.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxgpt import bench
from jaxgpt.config.command_line import parse_run
from jaxgpt.planning.local_gpus import preset_of_this_machine
from jaxgpt.run.device import prepare_environment


def as_it_is() -> None:
    """The step that `train` runs."""


def attention_plain() -> None:
    """Attention that forms its T x T scores, as XLA compiles it."""
    from jaxgpt.model.attention import plain_attention
    from jaxgpt.training import build

    build.attention_on = lambda *_: (plain_attention, "plain (replaced)")


def loss_full() -> None:
    """A loss that forms all logits of a micro-batch at once, differentiated by JAX."""
    from jaxgpt.model import language_model

    language_model.mean_cross_entropy = full_loss


def full_loss(h_BTD: Any, wte_VD: Any, targets_BT: Any, n_vocab: int | None) -> Any:
    """Logits in the dtype of `h_BTD`, the rest in float32, as in the fused loss."""
    import jax.numpy as jnp
    import optax

    from jaxgpt.model.loss import mask_padding

    logits_BTV = h_BTD @ wte_VD.astype(h_BTD.dtype).T
    logits_BTV = mask_padding(logits_BTV.astype(jnp.float32), n_vocab)
    targets_BT = targets_BT.astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()


def multisteps_plain() -> None:
    """optax.MultiSteps in a plain loop: the optimizer runs on every micro-batch."""
    from jaxgpt.training import build

    def make_train_step(graphdef: Any, optimizer: Any, *_: Any) -> Callable:
        import jax
        import optax
        from flax import nnx

        def loss_fn(params: Any, tokens_BT1: Any) -> Any:
            return nnx.merge(graphdef, params).loss(tokens_BT1)

        def micro_step(carry: Any, tokens_BT1: Any) -> tuple[Any, Any]:
            params, opt_state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens_BT1)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        def train_step(state: Any, tokens_ABT1: Any) -> tuple[Any, Any]:
            carry = (state.params, state.opt_state)
            (params, opt_state), losses_A = jax.lax.scan(micro_step, carry, tokens_ABT1)
            state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
            return state, {"loss": losses_A.mean()}

        return train_step

    build.make_train_step = make_train_step


def scheduler_on() -> None:
    """XLA's latency-hiding scheduler on."""
    from jaxgpt.training import build

    build.GPU_OPTIONS["xla_gpu_enable_latency_hiding_scheduler"] = True


def triton_gemm_on() -> None:
    """Matrix products fused into Triton kernels."""
    from jaxgpt.training import build

    build.GPU_OPTIONS["xla_gpu_enable_triton_gemm"] = True


def fusion_tiles() -> None:
    """Eight tilings of each Triton fusion timed by XLA, not only the one its cost model prefers."""
    from jaxgpt.training import build

    build.GPU_OPTIONS["xla_gpu_fusion_autotune_top_k_configs"] = 8


def command_buffers() -> None:
    """The loop over micro-batches as a CUDA graph, too."""
    from jaxgpt.training import build

    kinds = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
    build.GPU_OPTIONS["xla_gpu_enable_command_buffer"] = kinds


def no_command_buffers() -> None:
    """Every kernel launched by itself, without CUDA graphs."""
    from jaxgpt.training import build

    build.GPU_OPTIONS["xla_gpu_enable_command_buffer"] = ""


VARIANTS: dict[str, Callable[[], None]] = {
    "as-it-is": as_it_is,
    "attention-plain": attention_plain,
    "loss-full": loss_full,
    "multisteps-plain": multisteps_plain,
    "scheduler-on": scheduler_on,
    "triton-gemm-on": triton_gemm_on,
    "fusion-tiles": fusion_tiles,
    "command-buffers": command_buffers,
    "no-command-buffers": no_command_buffers,
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in VARIANTS:
        described = "\n".join(f"  {name:18} {f.__doc__}" for name, f in VARIANTS.items())
        asked_for_help = argv[:1] in (["-h"], ["--help"])
        print(
            f"{__doc__}\nVariants:\n{described}", file=sys.stdout if asked_for_help else sys.stderr
        )
        return 0 if asked_for_help else 2
    # Variants import JAX, so the environment that bench would prepare is prepared before.
    asked, _, _ = parse_run(
        bench.BenchFlags,
        argv[1:],
        prog=bench.PROG,
        description=bench.__doc__ or "",
        default_preset=preset_of_this_machine,
    )
    prepare_environment(asked)
    VARIANTS[argv[0]]()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = bench.main([*argv[1:], "--json"])
    print(json.dumps({"variant": argv[0], **json.loads(output.getvalue())}, indent=2))
    return code


if __name__ == "__main__":
    sys.exit(main())
