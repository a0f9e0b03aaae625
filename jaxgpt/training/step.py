"""One optimizer step in one jit: gradients of A micro-batches, averaged, applied or skipped.

`optax.MultiSteps` runs its inner optimizer on every micro-batch and throws the result away on all
but the last. Here each micro-batch goes through the real `update`, but the scan over the first
A - 1 carries only the accumulator out of it, so XLA deletes the inner optimizer from the loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from jaxgpt.model.gpt import Params
from jaxgpt.model.loss import mean_cross_entropy, token_losses
from jaxgpt.training.optim import grad_norm
from jaxgpt.training.spikes import add_to_history, is_spike, no_history


class TrainState(NamedTuple):
    """All that a step changes; what is not here does not survive a restart."""

    step: jax.Array  # (), int32: optimizer steps taken, skipped ones included
    skipped: jax.Array  # (), int32: steps skipped, for a number not finite or for a spike
    params: Params
    opt_state: optax.MultiStepsState
    key: jax.Array  # (), PRNG key; folded with step and micro-batch, never advanced
    recent: jax.Array  # (2, WINDOW), float32: losses and gradient norms that spikes are judged by


Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, ArrayLike], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, ArrayLike], jax.Array]


def init_state(params: Params, optimizer: optax.MultiSteps, key: jax.Array) -> TrainState:
    """The state before the first step."""
    # Two zeros, not one twice: the step donates its state, and a buffer can be donated only once.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, skipped, params, optimizer.init(params), key, no_history())


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.MultiSteps,
    schedule: optax.Schedule,
    skip_spikes: float = 0.0,
) -> TrainStep:
    """Make `train_step(state, tokens_ABT1) -> (state, metrics)`, to be jitted with state donated.

    `tokens_ABT1` are uint16 windows of block_size + 1 tokens; A must be the number of micro-batches
    that `optimizer` accumulates. A step is skipped if its loss or gradient is not finite or, unless
    `skip_spikes` is 0, lies that many deviations above the recent ones. Metrics are scalars: `loss`
    in nats (mean over the step's tokens), `grad_norm` before clipping, `learning_rate`, `skipped`
    (steps skipped so far).
    """

    def loss_and_grads(
        params: Params, tokens_BT1: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Params]:
        def loss_fn(params: Params) -> jax.Array:
            model = nnx.merge(graphdef, params)
            h_BTD = model.features(tokens_BT1[:, :-1], key if model.cfg.dropout else None)
            wte_VD = model.wte.embedding[...]
            return mean_cross_entropy(h_BTD, wte_VD, tokens_BT1[:, 1:], model.cfg.n_vocab)

        return jax.value_and_grad(loss_fn)(params)

    def train_step(state: TrainState, tokens_ABT1: ArrayLike) -> tuple[TrainState, Metrics]:
        tokens_ABT1 = jnp.asarray(tokens_ABT1)
        A = tokens_ABT1.shape[0]
        step_key = jax.random.fold_in(state.key, state.step)

        def accumulate(
            carry: tuple[jax.Array, Any], micro_batch: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, Any], jax.Array]:
            i, tokens_BT1 = micro_batch
            opt_state = state.opt_state._replace(mini_step=carry[0], acc_grads=carry[1])
            key = jax.random.fold_in(step_key, i)
            loss, grads = loss_and_grads(state.params, tokens_BT1, key)
            _, new = optimizer.update(grads, opt_state, state.params)
            return (new.mini_step, new.acc_grads), loss

        carry = (state.opt_state.mini_step, state.opt_state.acc_grads)
        losses_A1 = jnp.zeros(0)
        if A > 1:
            carry, losses_A1 = jax.lax.scan(
                accumulate, carry, (jnp.arange(A - 1), tokens_ABT1[:-1])
            )
        opt_state = state.opt_state._replace(mini_step=carry[0], acc_grads=carry[1])
        last_key = jax.random.fold_in(step_key, A - 1)
        loss, grads = loss_and_grads(state.params, tokens_ABT1[-1], last_key)
        updates, opt_state = optimizer.update(grads, opt_state, state.params)

        loss = (losses_A1.sum() + loss) / A
        norm = grad_norm(opt_state)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        good = finite
        if skip_spikes:
            good &= ~is_spike(state.recent, loss, norm, skip_spikes)
        new = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~good,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            key=state.key,
            recent=state.recent,
        )
        # A spike is remembered, so that what has become usual is no spike for ever.
        recent = jnp.where(finite, add_to_history(state.recent, loss, norm), state.recent)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": schedule(state.step),
            "skipped": new.skipped,
        }
        return keep_floats_unless(good, new, state)._replace(recent=recent), metrics

    return train_step


def keep_floats_unless(good: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """`new`, or with the floating-point leaves of `old` if not `good`: integers always advance.

    So a bad step changes no parameter, moment or accumulator, while every count stays the same
    integer as the loop's and the data goes on.
    """

    def choose(new_leaf: jax.Array, old_leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new_leaf.dtype, jnp.floating):
            return new_leaf
        return jnp.where(good, new_leaf, old_leaf)

    return jax.tree.map(choose, new, old)


def make_eval_step(graphdef: nnx.GraphDef) -> EvalStep:
    """Make `eval_step(params, tokens_BT1) -> losses_B`: each window's mean loss, float32."""

    def eval_step(params: Params, tokens_BT1: ArrayLike) -> jax.Array:
        tokens_BT1 = jnp.asarray(tokens_BT1)
        model = nnx.merge(graphdef, params)
        h_BTD = model.features(tokens_BT1[:, :-1])
        wte_VD = model.wte.embedding[...]
        losses_BT = token_losses(h_BTD, wte_VD, tokens_BT1[:, 1:], model.cfg.n_vocab)
        return losses_BT.mean(axis=1)

    return eval_step
