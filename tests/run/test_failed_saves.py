"""Saves that fail or must not be made, and what is left of them."""

import re
import shutil
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from helpers.checkpoints import build, save, steps_on_disk, take_steps

from jaxgpt.run import checkpoint
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.restore import CheckpointError
from jaxgpt.training.build import Training


@pytest.fixture(scope="module")
def training() -> Training:
    return build()


def raising(fault: BaseException):
    def fail(*_: object, **__: object) -> None:
        raise fault

    return fail


def test_a_state_that_is_not_finite_is_not_saved(training, tmp_path) -> None:
    state = training.init()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, state)
        state = take_steps(training, state, 1)
        bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.params)
        with pytest.raises(
            CheckpointError, match=r"step 1 are not finite.*checkpoint 0 in .* is kept"
        ):
            save(checkpoints, state._replace(params=bad))
    assert steps_on_disk(tmp_path) == [0]


def test_an_error_in_the_run_is_not_hidden_by_its_last_save(training, tmp_path) -> None:
    def fail_after_a_save() -> None:
        with Checkpoints(tmp_path, 1) as checkpoints:
            save(checkpoints, training.init())
            raise KeyError("the reason")

    with pytest.raises(KeyError, match="the reason"):
        fail_after_a_save()
    assert steps_on_disk(tmp_path) == [0]


def test_a_save_whose_evaluation_fails_is_taken_back(training, tmp_path) -> None:
    def fail_in_the_evaluation() -> None:
        with Checkpoints(tmp_path, 1) as checkpoints:
            save(checkpoints, training.init())
            state = take_steps(training, training.init(), 1)
            checkpoints.begin(state, config={}, data={})
            raise KeyError("the reason")

    with pytest.raises(KeyError, match="the reason"):
        fail_in_the_evaluation()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["0"]


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be created .* choose another --out-dir"):
        Checkpoints(tmp_path / "file" / "run", 1)


def test_a_save_without_room_is_told_at_once_and_the_next_one_is_made(
    training, tmp_path, monkeypatch
) -> None:
    state, told = training.init(), []
    with Checkpoints(tmp_path, 2, told.append) as checkpoints:
        save(checkpoints, state)
        checkpoints.wait()
        state = take_steps(training, state, 1)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
            save(checkpoints, state)
            checkpoints.poll()
            (line,) = told
            assert re.search(
                r"step 1 could not be saved in .*MB are needed and 0.0 MB are free\); checkpoint 0 "
                r"is kept; check .*; training continues",
                line,
            )
            with pytest.raises(CheckpointError, match="step 1 could not be saved"):
                checkpoints.wait()
        save(checkpoints, state)
    assert told == [line]
    assert steps_on_disk(tmp_path) == [0, 1]


def test_what_a_failed_save_left_takes_no_room_from_the_next(
    training, tmp_path, monkeypatch
) -> None:
    """Orbax's threads may have put it back after it was deleted."""
    left = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp"
    with Checkpoints(tmp_path, 1) as checkpoints:
        save(checkpoints, training.init())
        checkpoints.wait()
        (left / "state").mkdir(parents=True)
        free = lambda _: SimpleNamespace(free=1000 if left.exists() else 10**9)  # noqa: E731
        monkeypatch.setattr(shutil, "disk_usage", free)
        save(checkpoints, take_steps(training, training.init(), 2))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_folder_that_somebody_deleted_is_made_again(training, tmp_path) -> None:
    with Checkpoints(tmp_path / "run", 1) as checkpoints:
        save(checkpoints, training.init())
        checkpoints.wait()
        shutil.rmtree(tmp_path / "run")
        save(checkpoints, take_steps(training, training.init(), 1))
    assert steps_on_disk(tmp_path / "run") == [1]


def test_weights_that_were_not_finite_from_the_start_are_not_trained_on(training, tmp_path) -> None:
    state = training.init()
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.params)
    with (
        pytest.raises(CheckpointError, match=r"parameters of step 0 are not finite.*--init-from"),
        Checkpoints(tmp_path, keep=1) as checkpoints,
    ):
        save(checkpoints, state._replace(params=bad))


def test_a_commit_whose_manifest_cannot_be_written_is_taken_back(
    training, tmp_path, monkeypatch
) -> None:
    state, told = training.init(), []
    with Checkpoints(tmp_path, 1, told.append) as checkpoints:
        save(checkpoints, state)
        checkpoints.wait()
        full = raising(OSError(28, "No space left on device"))
        monkeypatch.setattr(checkpoint, "write_manifest", full)
        state = take_steps(training, state, 1)
        save(checkpoints, state)
        deadline = time.monotonic() + 30
        while not told and time.monotonic() < deadline:
            checkpoints.poll()
        assert "step 1 could not be saved" in told[0]
        assert "No space left on device" in told[0]
        monkeypatch.undo()
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["0"]
        save(checkpoints, state)
    assert steps_on_disk(tmp_path) == [1]


def test_a_run_that_cannot_save_at_all_is_stopped(training, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with (
        pytest.raises(CheckpointError, match=r"there is no earlier one; check that .*, or"),
        Checkpoints(tmp_path, 1, print) as checkpoints,
    ):
        save(checkpoints, training.init())
