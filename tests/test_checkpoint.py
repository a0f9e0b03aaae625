from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, assert_trees_equal

from jaxgpt.config import OptimizerConfig
from jaxgpt.training.build import Training, build_training
from jaxgpt.training.checkpoint import CheckpointError, Checkpoints


@pytest.fixture(scope="module")
def training() -> Training:
    return build_training(
        TINY,
        OptimizerConfig(warmup_iters=2),
        max_iters=20,
        accumulation=2,
        dtype="float32",
        seed=0,
        device=jax.devices("cpu")[0],
    )


def take_steps(training: Training, state, steps: int):
    tokens = np.random.default_rng(0).integers(0, 50, (2, 3, 9)).astype(np.uint16)
    for _ in range(steps):
        state, _ = training.train_step(state, tokens)
    return state


def copy(state):
    return jax.tree.map(jnp.copy, state)


def steps_on_disk(out_dir: Path) -> list[int]:
    return sorted(int(p.name) for p in (out_dir / "checkpoints").iterdir() if p.name.isdigit())


def test_a_state_comes_back_bit_for_bit_though_it_was_donated_while_being_saved(
    training, tmp_path
) -> None:
    state, saved = training.init(), {}
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        for _ in range(6):
            state = take_steps(training, state, 1)
            saved[int(state.step)] = copy(state)
            checkpoints.save(state, config={"a": 1}, data={"b": [2]}, val_loss=None)
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        assert checkpoints.latest_step == 6
        for step, expected in saved.items():
            restored = checkpoints.restore(step, training.state_like)
            assert_trees_equal(restored.state, expected)
            assert (restored.config, restored.data) == ({"a": 1}, {"b": [2]})


def test_a_restored_state_trains_on_bit_for_bit(training, tmp_path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state = take_steps(training, training.init(), 3)
        checkpoints.save(state, config={}, data={}, val_loss=None)
        straight = take_steps(training, state, 3)
        checkpoints.wait()
        restored = checkpoints.restore(3, training.state_like)
    assert_trees_equal(take_steps(training, restored.state, 3), straight)


def test_the_newest_and_the_best_are_kept_by_two_rules(training, tmp_path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: 2.4}
    state = training.init()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for loss in losses.values():
            state = take_steps(training, state, 1)
            checkpoints.save(state, config={}, data={}, val_loss=loss)
        checkpoints.wait()
        assert checkpoints.best == (2, 1.0)
        assert checkpoints.latest_step == 6
    assert steps_on_disk(tmp_path) == [2, 5, 6]


def test_the_accumulator_is_not_written(training, tmp_path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(training.init(), config={}, data={}, val_loss=None)
    (stored,) = (tmp_path / "checkpoints").rglob("_METADATA")
    assert (
        "('opt_state', 'inner_opt_state', '2', '0', 'mu', 'wte', 'embedding')" in stored.read_text()
    )
    assert "'acc_grads', 'wte'" not in stored.read_text()


def test_a_step_that_is_saved_already_is_not_saved_again(training, tmp_path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for _ in range(2):
            checkpoints.save(training.init(), config={}, data={}, val_loss=None)
    assert steps_on_disk(tmp_path) == [0]


def test_a_checkpoint_that_is_not_there_is_said_in_a_sentence(training, tmp_path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.best is None
        with pytest.raises(CheckpointError, match=r"checkpoint 7 cannot be read .* delete .*7"):
            checkpoints.restore(7, training.state_like)


def test_an_error_in_the_run_is_not_hidden_by_its_last_save(training, tmp_path) -> None:
    def fail_after_a_save() -> None:
        with Checkpoints(tmp_path, 1) as checkpoints:
            checkpoints.save(training.init(), config={}, data={}, val_loss=None)
            raise KeyError("the reason")

    with pytest.raises(KeyError, match="the reason"):
        fail_after_a_save()
    assert steps_on_disk(tmp_path) == [0]


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be made .* choose another --out-dir"):
        Checkpoints(tmp_path / "file" / "run", 1)


def test_a_save_that_fails_is_said_in_a_sentence_and_the_one_before_stays(
    training, tmp_path, monkeypatch
) -> None:
    state = training.init()
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(state, config={}, data={}, val_loss=None)
        checkpoints.wait()

        class Failing:
            def result(self) -> None:
                raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmany lines")

        checkpoints._pending = Failing()
        with pytest.raises(
            CheckpointError, match=r"could not be saved .*No space left on device\)"
        ):
            checkpoints.wait()
    assert steps_on_disk(tmp_path) == [0]
