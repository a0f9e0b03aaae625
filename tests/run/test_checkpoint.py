import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers.checkpoints import build, save, steps_on_disk, take_steps
from helpers.trees import assert_trees_equal
from orbax.checkpoint import v1 as ocp

from jaxgpt.errors import UserError
from jaxgpt.run import checkpoint
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.restore import CheckpointError
from jaxgpt.run.retention import FOLDER
from jaxgpt.training.build import Training


@pytest.fixture(scope="module")
def training() -> Training:
    return build()


def copy(state):
    return jax.tree.map(jnp.copy, state)


def test_a_state_comes_back_bit_for_bit_though_it_was_donated_while_being_saved(
    training, tmp_path
) -> None:
    state, saved = training.init(), {}
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        for _ in range(6):
            state = take_steps(training, state, 1)
            saved[int(state.step)] = copy(state)
            save(checkpoints, state, config={"a": 1}, data={"b": [2]})
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        assert checkpoints.latest_step == 6
        for step, expected in saved.items():
            restored = checkpoints.restore(step, training.state_like)
            assert_trees_equal(restored, expected)
            manifest = checkpoints.manifest(step)
            assert (manifest.config, manifest.data) == ({"a": 1}, {"b": [2]})


def test_a_restored_state_trains_on_bit_for_bit(training, tmp_path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state = take_steps(training, training.init(), 3)
        save(checkpoints, state)
        straight = take_steps(training, state, 3)
        checkpoints.wait()
        restored = checkpoints.restore(3, training.state_like)
    assert_trees_equal(take_steps(training, restored, 3), straight)


def test_the_newest_and_the_best_are_kept_by_two_rules(training, tmp_path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: 2.4}
    state = training.init()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for loss in losses.values():
            state = take_steps(training, state, 1)
            save(checkpoints, state, loss)
        checkpoints.wait()
        assert checkpoints.best == (2, 1.0)
        assert checkpoints.latest_step == 6
    assert steps_on_disk(tmp_path) == [2, 5, 6]


def test_the_accumulator_is_not_written(training, tmp_path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, training.init())
    (stored,) = (tmp_path / "checkpoints").rglob("_METADATA")
    assert "('opt_state', 'inner_opt_state', '2', 'mu', 'wte', 'embedding')" in stored.read_text()
    assert "'acc_grads', 'wte'" not in stored.read_text()


def test_a_step_that_is_saved_already_is_not_saved_again(training, tmp_path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for _ in range(2):
            save(checkpoints, training.init())
    assert steps_on_disk(tmp_path) == [0]


def test_a_checkpoint_of_another_run_is_not_resumed_from(training, tmp_path) -> None:
    """Also not with the same configuration; a run that was resumed is still the same."""
    state = training.init()
    for run, steps in (("a", 1), ("a", 1), ("b", 3)):
        with Checkpoints(tmp_path / run, keep=9) as checkpoints:
            checkpoints.recover(print)
            state = take_steps(training, state, steps)
            save(checkpoints, state)
    copied = tmp_path / "a" / FOLDER / "5"
    shutil.copytree(tmp_path / "b" / FOLDER / "5", copied)
    with Checkpoints(tmp_path / "a", keep=9) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoints of 2 runs \(1, 2\) and \(5\); move"):
            checkpoints.recover(print)
        shutil.rmtree(copied)
        assert checkpoints.recover(print) == 2


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_that_is_not_there_is_said_in_a_sentence(training, tmp_path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.best is None
        assert checkpoints.recover(print) is None
        with pytest.raises(CheckpointError, match=r"checkpoint 7 is missing or damaged: .*No such"):
            checkpoints.restore(7, training.state_like)


def test_a_flipped_bit_in_any_file_is_named_and_the_checkpoint_before_is_gone_on_from(
    training, tmp_path
) -> None:
    first = take_steps(training, training.init(), 1)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, first)
        second = take_steps(training, copy(first), 1)
        save(checkpoints, second)
    newest = tmp_path / "checkpoints" / "2"
    names = [p.relative_to(newest) for p in newest.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(names) > 5
    shutil.copytree(newest, tmp_path / "good")
    for name in names:
        damage(newest / name)
        told: list[str] = []
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            with pytest.raises(CheckpointError, match=f"{name} is corrupt: "):
                checkpoints.restore(2, training.state_like)
            assert checkpoints.recover(told.append) == 1
            assert len(told) == 1
            assert str(newest / name) in told[0]
            restored = checkpoints.restore(1, training.state_like)
        shutil.rmtree(newest.with_name("2.damaged"))
        shutil.copytree(tmp_path / "good", newest)
    assert_trees_equal(restored, first)


def test_another_shape_or_dtype_is_named_before_anything_is_read(training, tmp_path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, training.init())
        checkpoints.wait()
        like = training.state_like
        wider = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype), like.params)
        with pytest.raises(
            CheckpointError,
            match=r"another model; .* delete it.*\n.*float32.*, now float32.* 2\)",
        ):
            checkpoints.restore(0, like._replace(params=wider))
        half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), like.params)
        with pytest.raises(CheckpointError, match=r"saved as float32.*now bfloat16"):
            checkpoints.restore(0, like._replace(params=half))


@pytest.mark.parametrize("fault", [RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), MemoryError()])
def test_a_full_device_is_not_taken_for_a_damaged_checkpoint(
    training, tmp_path, monkeypatch, fault
) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, training.init())
        checkpoints.wait()
        monkeypatch.setattr(ocp, "load_checkpointables", raising(fault))
        with pytest.raises(type(fault)) as raised:
            checkpoints.restore(0, training.state_like)
        assert raised.value is fault
        monkeypatch.setattr(ocp, "load_checkpointables", raising(ValueError("no such handler")))
        with pytest.raises(CheckpointError, match=r"is intact, but .*no such handler.*jax \d"):
            checkpoints.restore(0, training.state_like)
    assert steps_on_disk(tmp_path) == [0]


def raising(fault: BaseException):
    def fail(*_: object, **__: object) -> None:
        raise fault

    return fail


def test_a_validation_loss_that_is_no_number_is_no_best(training, tmp_path) -> None:
    state = training.init()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for loss in (2.0, float("nan"), 3.0, float("inf")):
            state = take_steps(training, state, 1)
            save(checkpoints, state, loss)
        checkpoints.wait()
        assert checkpoints.best == (1, 2.0)
    assert steps_on_disk(tmp_path) == [1, 4]


def test_a_save_is_no_checkpoint_before_its_evaluation_has_ended(training, tmp_path) -> None:
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.begin(training.init(), config={}, data={})
        time.sleep(0.5)
        assert checkpoints.latest_step is None
        checkpoints.finish(1.5)
        checkpoints.settle()
        assert (checkpoints.latest_step, checkpoints.best) == (0, (0, 1.5))


def test_a_save_begins_early_by_as_long_as_the_last_one_took(
    training, tmp_path, monkeypatch
) -> None:
    """But not before half of its minutes are over."""
    now, checksum_files = [0.0], checkpoint.checksum_files
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    def slowly(folder: Path) -> object:
        now[0] += 60
        return checksum_files(folder)

    monkeypatch.setattr(checkpoint, "checksum_files", slowly)

    def first_due(checkpoints: Checkpoints, minutes: float) -> float:
        begun, now[0] = now[0], now[0] - 60 * 60
        while not checkpoints.due(minutes):
            now[0] += 5
        due, now[0] = now[0], begun
        return due

    with Checkpoints(tmp_path, 1) as checkpoints:
        assert first_due(checkpoints, 15) == 15 * 60
        save(checkpoints, training.init())  # at 0, and on disk a minute later
        checkpoints.settle()
        assert first_due(checkpoints, 15) == 14 * 60
        assert first_due(checkpoints, 1) == 30
    monkeypatch.undo()


DEVICES = """
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, sys.argv[2])
from helpers.trees import assert_trees_equal
from helpers.checkpoints import build, save, steps_on_disk, take_steps

from jaxgpt.run.checkpoint import Checkpoints

devices = np.array(jax.devices())
assert len(devices) == 4
training = build()
with Checkpoints(Path(sys.argv[1]), keep=9) as checkpoints:
    one = checkpoints.restore(1, training.state_like)
    for count in (4, 2):
        mesh = Mesh(devices[:count], "d")
        def spread(x):
            rows = x.ndim and x.shape[0] % count == 0
            spec = PartitionSpec("d") if rows else PartitionSpec()
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        like = jax.tree.map(spread, training.state_like)
        many = checkpoints.restore(1, like)
        assert len(many.params["wte"]["embedding"].sharding.device_set) == count
        assert_trees_equal(many, one)
        again = many._replace(step=many.step + count)
        save(checkpoints, again)
        checkpoints.wait()
        back = checkpoints.restore(1 + count, training.state_like)
        assert_trees_equal(back._replace(step=one.step), one)
"""


def test_a_state_is_restored_onto_other_numbers_of_devices(training, tmp_path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state = take_steps(training, training.init(), 1)
        save(checkpoints, state)
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, str(tmp_path), str(Path(__file__).parents[1])],
        **dict(env=env, capture_output=True, text=True, timeout=120),
    )
    assert done.returncode == 0, done.stderr
