"""Checkpoints of a run, through Orbax: saved in the background, newest and best kept, exact.

Orbax saves nothing more once a process ends, and says so with exit code 0: every path out of a run
goes through `close`. Its V1 interface is still marked experimental, so it is used here only.
"""

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxgpt.errors import UserError
from jaxgpt.model.gpt import Params
from jaxgpt.training.step import TrainState

VAL_LOSS = "val_loss"
# Orbax logs each phase of each save; what a user has to know, the run says itself.
logging.getLogger("absl").setLevel(logging.ERROR)


class CheckpointError(UserError):
    """A checkpoint that cannot be read; the message names it and what can be done."""


class Restored(NamedTuple):
    """What a checkpoint held."""

    state: TrainState
    config: dict[str, Any]  # flat, as `config.flat_values` wrote it
    data: dict[str, Any]  # where the run was in its data


class Checkpoints:
    """The checkpoints of one run, in `<out_dir>/checkpoints/<step>/`.

    The newest `keep` are kept by one rule and the best by validation loss by another, so that a
    best checkpoint never pushes out the newest.
    """

    def __init__(self, out_dir: Path, keep: int):
        policies = ocp.training.preservation_policies
        folder = (out_dir / "checkpoints").absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise CheckpointError(
                f"{folder} cannot be made ({fault.strerror}); choose another --out-dir"
            ) from None
        self._orbax = ocp.training.Checkpointer(
            folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[VAL_LOSS],
                        reverse=True,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
        )
        self._pending: Any = None
        self._last_save = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        # The error on its way out says more than one about the save it interrupted.
        with contextlib.suppress(Exception):
            self.close()

    @property
    def latest_step(self) -> int | None:
        """The newest step on disk, or None."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, validation loss) of the best checkpoint, or None before the first evaluation."""
        scored = [
            (checkpoint.metrics[VAL_LOSS], checkpoint.step)
            for checkpoint in self._orbax.checkpoints
            if checkpoint.metrics
        ]
        if not scored:
            return None
        loss, step = min(scored)
        return step, loss

    def save(
        self,
        state: TrainState,
        *,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        val_loss: float | None,
    ) -> None:
        """Start to save `state`, whose arrays may be donated as soon as this returns.

        Waits for the save before it, and raises what went wrong in that one.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest_step:
            return
        self._pending = self._orbax.save_checkpointables_async(
            step,
            {"state": _stored(state)},
            metrics=None if val_loss is None else {VAL_LOSS: val_loss},
            custom_metadata={"config": dict(config), "data": dict(data)},
            force=True,
        )
        self._last_save = time.monotonic()

    def restore(self, step: int, like: TrainState) -> Restored:
        """Read a checkpoint into the shapes, dtypes and shardings of `like`.

        Raises:
            CheckpointError: if there is no such step, or it does not fit `like`.
        """
        target = _stored(jax.tree.map(_abstract, like))
        try:
            stored = self._orbax.load_checkpointables(step, {"state": target})["state"]
            notes = self._orbax.checkpointables_metadata(step).custom_metadata
        except Exception as fault:  # Orbax raises a dozen kinds for damaged files
            folder = Path(self._orbax.directory) / str(step)
            raise CheckpointError(
                f"checkpoint {step} cannot be read ({_first_line(fault)}); delete {folder} to go "
                "on from the one before, or start anew with another --out-dir"
            ) from fault
        acc_grads = jax.tree.map(_zeros, like.opt_state.acc_grads)
        stored["opt_state"] = stored["opt_state"]._replace(acc_grads=acc_grads)
        return Restored(TrainState(**stored), notes["config"], notes["data"])

    def minutes_since_save(self) -> float:
        """Minutes since a save was started, or since the run was opened."""
        return (time.monotonic() - self._last_save) / 60

    def wait(self) -> None:
        """Return when the save under way is on disk; raises what went wrong in it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as fault:  # a full disk is a ValueError here
            raise CheckpointError(
                f"a checkpoint could not be saved in {self._orbax.directory} "
                f"({_first_line(fault)}); the ones before it are as they were: make room there and "
                "give the same command again"
            ) from fault

    def close(self) -> None:
        """Wait for the save under way and let go of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()


def load_params(out_dir: Path, step: int, like: Params) -> Params:
    """The parameters of a checkpoint alone, in the shapes and shardings of `like`.

    Reads and writes nothing else, so a run may be training in the same folder.

    Raises:
        CheckpointError: if the checkpoint cannot be read or does not fit `like`.
    """
    folder = (out_dir / "checkpoints" / str(step)).absolute()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            params = ocp.load_checkpointables(folder, {"state": {"params": like}})
        return jax.tree.map(_fitting, params["state"]["params"], like)
    except Exception as fault:  # Orbax raises a dozen kinds for damaged files
        raise CheckpointError(
            f"checkpoint {folder} cannot be read ({_first_line(fault)}); choose another with "
            "--checkpoint, or see whether the config.json beside it is the run's own"
        ) from fault


def load_notes(out_dir: Path, step: int) -> dict[str, Any]:
    """What was saved beside the state: the flat `config`, and `data`, where the run was in it."""
    folder = (out_dir / "checkpoints" / str(step)).absolute()
    return ocp.checkpointables_metadata(folder).custom_metadata


def _fitting(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    # Orbax hands back what it did not find as it was asked for.
    if not isinstance(leaf, jax.Array) or leaf.shape != like.shape:
        raise ValueError(f"it has no parameter of shape {like.shape} where there must be one")
    return leaf


def _first_line(fault: Exception) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0][:200]


def _stored(state: TrainState) -> dict[str, Any]:
    # The accumulator is zero between steps: a quarter of the state that need not be written.
    opt_state = state.opt_state._replace(acc_grads=())
    return {**state._asdict(), "opt_state": opt_state}


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _zeros(leaf: jax.Array) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
