import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.training.spikes import WINDOW, add_to_history, empty_history, is_spike


def history(losses, norms=None):
    recent = empty_history()
    for loss, norm in zip(losses, norms if norms is not None else losses, strict=True):
        recent = add_to_history(recent, jnp.float32(loss), jnp.float32(norm))
    return recent


def spike(recent, loss: float, norm: float, deviations: float = 6.0) -> bool:
    return bool(is_spike(recent, jnp.float32(loss), jnp.float32(norm), deviations))


NOISE = np.random.default_rng(0).normal(4.0, 0.1, WINDOW)


def test_the_history_holds_the_newest_steps_in_order() -> None:
    recent = history(range(1, WINDOW + 4))
    assert recent.shape == (2, WINDOW)
    np.testing.assert_array_equal(recent[0], np.arange(4, WINDOW + 4))


@pytest.mark.parametrize("known", [WINDOW // 2, WINDOW - 1, WINDOW])
def test_the_limit_is_the_mean_plus_deviations_of_the_recorded_steps(known: int) -> None:
    values = NOISE[:known]
    limit = values.mean() + 6 * values.std()
    recent = history(values)
    assert not spike(recent, limit - 0.01, 4.0)
    assert spike(recent, limit + 0.01, 4.0)
    assert spike(recent, 4.0, limit + 0.01)
    assert not spike(recent, 0.1, 0.1)


def test_there_is_no_spike_before_half_a_window() -> None:
    assert not spike(history(NOISE[: WINDOW // 2 - 1]), 1e9, 1e9)
    assert not spike(empty_history(), 1e9, 1e9)
