"""One optimizer step in one jit: gradients of A micro-batches, averaged, applied or skipped.

`optax.MultiSteps` runs its inner optimizer on every micro-batch and throws the result away on all
but the last. Here a scan over the micro-batches runs the half of it that accumulates
(`make_accumulator`), and what comes out goes once through the real one. Nothing of the last
micro-batch stands outside the loop: XLA would compute that one first, and hold its gradients and
every weight's bfloat16 copy while the loop runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from jaxgpt.model.gpt import Gather, Params, merge_shards
from jaxgpt.model.loss import mean_cross_entropy, token_losses, token_scores
from jaxgpt.training.optimizer import grad_norm
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
ScoreStep = Callable[[Params, ArrayLike], tuple[jax.Array, jax.Array]]
# (params, empty accumulator, tokens_ABT1, numbers_A of the micro-batches in the step, key) ->
# (mean gradient, loss); and the same for the whole of a step, whose micro-batches need no numbers.
Accumulate = Callable[..., tuple[Params, jax.Array]]
Spread = Callable[..., tuple[Params, jax.Array]]


def init_state(params: Params, optimizer: optax.MultiSteps, key: jax.Array) -> TrainState:
    """The state before the first step."""
    # Two zeros, not one twice: the step donates its state, and a buffer can be donated only once.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, skipped, params, optimizer.init(params), key, no_history())


def alone(accumulate: Accumulate) -> Spread:
    """`accumulate` on one device, where its micro-batches are all there are."""

    def on_one(params: Params, empty: Any, tokens_ABT1: jax.Array, key: jax.Array) -> Any:
        return accumulate(params, empty, tokens_ABT1, jnp.arange(len(tokens_ABT1)), key)

    return on_one


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.MultiSteps,
    accumulator: optax.MultiSteps,
    schedule: optax.Schedule,
    skip_spikes: float = 0.0,
    gather: Gather | None = None,
    spread: Callable[[Accumulate], Spread] = alone,
) -> TrainStep:
    """Make `train_step(state, tokens_ABT1) -> (state, metrics)`, to be jitted with state donated.

    `tokens_ABT1` are uint16 windows of block_size + 1 tokens; A must be the number of micro-batches
    that `optimizer` accumulates. A step is skipped if its loss or gradient is not finite or, unless
    `skip_spikes` is 0, lies that many deviations above the recent ones. Metrics are scalars: `loss`
    in nats (mean over the step's tokens), `grad_norm` before clipping, `learning_rate`, `skipped`
    (steps skipped so far). On several devices each runs `accumulate` on its rows, which `spread`
    sees to, and `gather` makes parameters whole of which it holds a shard.
    """

    def loss_and_grads(
        params: Params, tokens_BT1: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Params]:
        def loss_fn(params: Params) -> jax.Array:
            model = merge_shards(graphdef, params, gather)
            h_BTD = model.features(tokens_BT1[:, :-1], key if model.cfg.dropout else None)
            wte_VD = model.wte.embedding[...]
            return mean_cross_entropy(h_BTD, wte_VD, tokens_BT1[:, 1:], model.cfg.n_vocab)

        return jax.value_and_grad(loss_fn)(params)

    def accumulate(
        params: Params,
        empty: optax.MultiStepsState,
        tokens_ABT1: jax.Array,
        numbers_A: jax.Array,
        step_key: jax.Array,
    ) -> tuple[Params, jax.Array]:
        def add(
            carry: tuple[jax.Array, Params], micro_batch: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, Params], jax.Array]:
            (mini_step, acc_grads), (tokens_BT1, number) = carry, micro_batch
            loss, grads = loss_and_grads(params, tokens_BT1, jax.random.fold_in(step_key, number))
            before = empty._replace(mini_step=mini_step, acc_grads=acc_grads)
            _, after = accumulator.update(grads, before, params)
            return (after.mini_step, after.acc_grads), loss

        start = (empty.mini_step, empty.acc_grads)
        (_, mean_grads), losses_A = jax.lax.scan(add, start, (tokens_ABT1, numbers_A))
        return mean_grads, losses_A.mean()

    def train_step(state: TrainState, tokens_ABT1: ArrayLike) -> tuple[TrainState, Metrics]:
        tokens_ABT1 = jnp.asarray(tokens_ABT1)
        A = tokens_ABT1.shape[0]
        step_key = jax.random.fold_in(state.key, state.step)
        empty = state.opt_state._replace(inner_opt_state=())
        mean_grads, loss = spread(accumulate)(state.params, empty, tokens_ABT1, step_key)
        # As the last of A micro-batches the mean of all A leaves the mean as it is.
        opt_state = state.opt_state._replace(mini_step=A - 1, acc_grads=mean_grads)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), mean_grads)
        updates, opt_state = optimizer.update(grads, opt_state, state.params)

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
        # A step begins with an empty accumulator. To name the one it began with would have XLA keep
        # a copy of it through the step: 4 bytes a parameter.
        zeros = optax.tree.zeros_like(mean_grads)
        old = state._replace(opt_state=state.opt_state._replace(acc_grads=zeros))
        return keep_floats_unless(good, new, old)._replace(recent=recent), metrics

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


def make_eval_step(graphdef: nnx.GraphDef, gather: Gather | None = None) -> EvalStep:
    """Make `eval_step(params, tokens_BT1) -> losses_B`: each window's mean loss, float32."""

    def eval_step(params: Params, tokens_BT1: ArrayLike) -> jax.Array:
        tokens_BT1 = jnp.asarray(tokens_BT1)
        model = merge_shards(graphdef, params, gather)
        h_BTD = model.features(tokens_BT1[:, :-1])
        wte_VD = model.wte.embedding[...]
        losses_BT = token_losses(h_BTD, wte_VD, tokens_BT1[:, 1:], model.cfg.n_vocab)
        return losses_BT.mean(axis=1)

    return eval_step


def make_score_step(graphdef: nnx.GraphDef, gather: Gather | None = None) -> ScoreStep:
    """Make `score_step(params, tokens_BT1) -> (losses_BT, hits_BT)`, T at most block_size."""

    def score_step(params: Params, tokens_BT1: ArrayLike) -> tuple[jax.Array, jax.Array]:
        tokens_BT1 = jnp.asarray(tokens_BT1)
        model = merge_shards(graphdef, params, gather)
        h_BTD = model.features(tokens_BT1[:, :-1])
        wte_VD = model.wte.embedding[...]
        return token_scores(h_BTD, wte_VD, tokens_BT1[:, 1:], model.cfg.n_vocab)

    return score_step
