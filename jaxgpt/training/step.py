"""One optimizer step in one jit: gradients of A micro-batches, averaged, applied or skipped.

`optax.MultiSteps` runs its inner optimizer on every micro-batch and discards all results but the
last. Here a scan over the micro-batches only accumulates (`make_accumulator`), and the mean
gradient then passes once through the optimizer. The last micro-batch is inside the loop, too:
otherwise XLA would compute it first and keep its gradients and a bfloat16 copy of every weight
while the loop runs.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from jaxgpt.model.blocks import AllGather, Params
from jaxgpt.model.network import merge_model
from jaxgpt.training.loss_scale import LossScale
from jaxgpt.training.optimizer import grad_norm
from jaxgpt.training.spikes import add_to_history, empty_history, is_spike


class TrainState(NamedTuple):
    """All that a step changes and a checkpoint needs."""

    step: jax.Array  # (), int32: optimizer steps taken, skipped ones included
    skipped: jax.Array  # (), int32: steps skipped as non-finite or as a spike
    params: Params
    opt_state: optax.MultiStepsState
    key: jax.Array  # (), PRNG key; folded with step and micro-batch, never advanced
    recent: jax.Array  # (2, WINDOW), float32: losses and gradient norms for spike detection
    loss_scale: LossScale | tuple[()] = ()  # in float16 only


Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, ArrayLike], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, ArrayLike], jax.Array]
ScoreStep = Callable[[Params, ArrayLike], tuple[jax.Array, jax.Array]]
Factor = jax.Array | None  # of the loss, (), float32; None is 1
# (params, empty accumulator, tokens_ABT1, key, factor of the loss, indices_A of the micro-batches
# within the step: 0, 1, ... unless given) -> (mean gradient, mean loss), without the factor.
Gradients = Callable[..., tuple[Params, jax.Array]]


def init_state(
    params: Params,
    optimizer: optax.MultiSteps,
    key: jax.Array,
    loss_scale: LossScale | tuple[()] = (),
) -> TrainState:
    """The state before the first step."""
    # Two zeros, not one twice: the step donates its state, and a buffer can be donated only once.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    opt_state = optimizer.init(params)
    return TrainState(step, skipped, params, opt_state, key, empty_history(), loss_scale)


def make_gradients(
    graphdef: nnx.GraphDef, accumulator: optax.MultiSteps, all_gather: AllGather | None
) -> Gradients:
    """Make the function that averages loss and gradients over the micro-batches of one device."""

    def loss_fn(params: Params, tokens_BT1: jax.Array, key: jax.Array) -> jax.Array:
        return merge_model(graphdef, params, all_gather).loss(tokens_BT1, key)

    def gradients(
        params: Params,
        empty: optax.MultiStepsState,
        tokens_ABT1: jax.Array,
        step_key: jax.Array,
        factor: Factor,
        indices_A: jax.Array | None = None,
    ) -> tuple[Params, jax.Array]:
        indices_A = jnp.arange(len(tokens_ABT1)) if indices_A is None else indices_A

        def add(
            carry: tuple[jax.Array, Params], micro_batch: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, Params], jax.Array]:
            (mini_step, acc_grads), (tokens_BT1, index) = carry, micro_batch
            key = jax.random.fold_in(step_key, index)
            loss, pull_back = jax.vjp(partial(loss_fn, tokens_BT1=tokens_BT1, key=key), params)
            (grads,) = pull_back(jnp.ones_like(loss) if factor is None else factor)
            if factor is not None:
                grads = jax.tree.map(lambda g: g / factor, grads)
            before = empty._replace(mini_step=mini_step, acc_grads=acc_grads)
            _, after = accumulator.update(grads, before, params)
            return (after.mini_step, after.acc_grads), loss

        start = (empty.mini_step, empty.acc_grads)
        (_, mean_grads), losses_A = jax.lax.scan(add, start, (tokens_ABT1, indices_A))
        return mean_grads, losses_A.mean()

    return gradients


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.MultiSteps,
    accumulator: optax.MultiSteps,
    schedule: optax.Schedule,
    skip_spikes: float = 0.0,
    all_gather: AllGather | None = None,
    data_parallel: Callable[[Gradients], Gradients] = lambda gradients: gradients,
) -> TrainStep:
    """Make `train_step(state, tokens_ABT1) -> (state, metrics)`, to be jitted with state donated.

    `tokens_ABT1` are windows of block_size + 1 token ids; A must be the number of micro-batches
    that `optimizer` accumulates. A step is skipped if its loss or gradient is not finite or, unless
    `skip_spikes` is 0, more than that many standard deviations above the recent ones. Metrics are
    scalars: `loss` in nats (mean over the step's tokens), `grad_norm` before clipping,
    `learning_rate`, `skipped_steps` (so far), and with loss scaling `loss_scale` and `overflows`
    (so far, not among the skipped steps); all are logged, as `train/loss` and so on. On several
    devices `data_parallel` averages the gradients over them, and `all_gather` gathers sharded
    parameters.
    """
    step_gradients = data_parallel(make_gradients(graphdef, accumulator, all_gather))

    def train_step(state: TrainState, tokens_ABT1: ArrayLike) -> tuple[TrainState, Metrics]:
        tokens_ABT1 = jnp.asarray(tokens_ABT1)
        step_key = jax.random.fold_in(state.key, state.step)
        empty = state.opt_state._replace(inner_opt_state=())
        scaling = state.loss_scale or None
        factor = None if scaling is None else scaling.scale
        mean_grads, loss = step_gradients(state.params, empty, tokens_ABT1, step_key, factor)
        params, opt_state = _update(optimizer, state, mean_grads, len(tokens_ABT1))

        norm = grad_norm(opt_state)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        good = finite
        if skip_spikes:
            good &= ~is_spike(state.recent, loss, norm, skip_spikes)
        # A spike enters the history too, so that a lasting rise stops counting as one.
        recent = jnp.where(finite, add_to_history(state.recent, loss, norm), state.recent)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": schedule(state.step)}
        skipped, loss_scale = state.skipped + ~good, state.loss_scale
        if scaling is not None:
            overflowed = scaling.overflowed(loss, norm)
            loss_scale = scaling.after(overflowed, finite)
            skipped -= overflowed
            metrics |= {"loss_scale": loss_scale.scale, "overflows": loss_scale.overflows}
        metrics["skipped_steps"] = skipped
        new = TrainState(
            state.step + 1, skipped, params, opt_state, state.key, recent, state.loss_scale
        )
        # A step starts with an empty accumulator. Written as zeros, because XLA would keep a copy
        # of the old one during the step: 4 bytes per parameter.
        zeros = optax.tree.zeros_like(mean_grads)
        old = state._replace(opt_state=state.opt_state._replace(acc_grads=zeros))
        state = skip_if_bad(good, new, old)
        return state._replace(recent=recent, loss_scale=loss_scale), metrics

    return train_step


def _update(
    optimizer: optax.MultiSteps, state: TrainState, mean_grads: Params, accumulation: int
) -> tuple[Params, optax.MultiStepsState]:
    # The accumulator holds the mean already: adding it once more, as micro-batch A of A, leaves
    # MultiSteps' running mean as it is.
    opt_state = state.opt_state._replace(mini_step=accumulation - 1, acc_grads=mean_grads)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), mean_grads)
    updates, opt_state = optimizer.update(grads, opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state


def skip_if_bad(good: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` if `good`, else `new` with the floating-point leaves of `old`: integers always advance.

    So a skipped step changes no parameter, moment or accumulator; all counters still equal the
    loop's, and the next step reads the next batch.
    """

    def choose(new_leaf: jax.Array, old_leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new_leaf.dtype, jnp.floating):
            return new_leaf
        return jnp.where(good, new_leaf, old_leaf)

    return jax.tree.map(choose, new, old)


def make_eval_step(graphdef: nnx.GraphDef, all_gather: AllGather | None = None) -> EvalStep:
    """Make `eval_step(params, tokens_BT1) -> losses_B`: each window's mean loss, float32."""
    score_step = make_score_step(graphdef, all_gather)

    def eval_step(params: Params, tokens_BT1: ArrayLike) -> jax.Array:
        losses_BT, _ = score_step(params, tokens_BT1)
        return losses_BT.mean(axis=1)

    return eval_step


def make_score_step(graphdef: nnx.GraphDef, all_gather: AllGather | None = None) -> ScoreStep:
    """Make `score_step(params, tokens_BT1) -> (losses_BT, hits_BT)`, T at most block_size."""

    def score_step(params: Params, tokens_BT1: ArrayLike) -> tuple[jax.Array, jax.Array]:
        return merge_model(graphdef, params, all_gather).token_scores(jnp.asarray(tokens_BT1))

    return score_step
