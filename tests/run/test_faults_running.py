"""Faults that a run meets while it trains: numbers, signals, kills, stalls: docs/faults.md."""

import os
import pty
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import STEPS, assert_same_end, last_params, saved_steps, started, train, wait_for

from jaxgpt.data.mixture import MixtureLoader
from jaxgpt.run import checkpoint
from jaxgpt.run import watchdog as stalls
from jaxgpt.run.integrity import verify
from jaxgpt.run.metrics_file import read_metrics
from jaxgpt.run.signals import StopRequest

# ---------------------------------------------------------------- numbers (26)


def assert_finite(out_dir: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    for step in saved_steps(out_dir):
        tree = ocp.load_checkpointables(out_dir / "checkpoints" / str(step))["state"]
        tree.pop("key")
        import jax

        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path, capsys) -> None:
    flags = ("--learning-rate", "1e30", "--warmup-iters", "1", "--eval-interval", "1000")
    with pytest.raises(SystemExit) as left:
        train(tmp_path / "run", *flags, "--max-iters", "100")
    out, err = capsys.readouterr()
    assert left.value.code == 2
    first, last = map(int, re.search(r"steps in a row, (\d+) to (\d+), were skipped", err).groups())
    assert (last - first, "smaller --learning-rate" in err) == (9, True)
    assert out.count(" skipped: loss ") == 9
    logged = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r]
    assert logged[-1]["step"] == last
    assert logged[-1]["train/skipped_steps"] == 10
    assert saved_steps(tmp_path / "run") == [0]
    assert_finite(tmp_path / "run")


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, refused) -> None:
    # Their product is infinite in float32: one step ruins the parameters.
    flags = ("--learning-rate", "1e20", "--weight-decay", "1e30")
    flags += ("--warmup-iters", "1", "--eval-interval", "3")
    err = refused(tmp_path / "run", *flags, "--max-iters", "100")
    assert "step 3 are not finite, so they are not saved; checkpoint 0 in " in err
    assert saved_steps(tmp_path / "run") == [0]
    assert_finite(tmp_path / "run")


def test_spikes_are_skipped_on_demand_and_judged_by_the_same_steps_after_a_restart(
    tmp_path, capsys
) -> None:
    # The rate still rises, and with it how far losses lie apart: enough to call some a spike.
    flags = ("--skip-spikes", "1", "--warmup-iters", "200", "--eval-interval", "30")
    assert train(tmp_path / "straight", *flags, "--max-iters", "90") == 0
    told = re.findall(r"step (\d+) skipped: loss [\d.]+, gradient norm", capsys.readouterr().out)
    assert told
    assert all(int(step) > 64 for step in told), "half a window has to be known first"
    for steps in ("77", "90"):
        assert train(tmp_path / "run", *flags, "--max-iters", steps) == 0
    assert last_params(tmp_path / "run") == last_params(tmp_path / "straight")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["train/skipped_steps"] == len(told)


# ---------------------------------------------------------------- signals, kills, stalls (27, 30)


def save_at(monkeypatch, step: int) -> list[int]:
    """Have one save begin at `step`, between two evaluations, as if its minutes were over.

    Returns the steps that have been taken, as they come.
    """
    taken: list[int] = []

    def due(*_: object) -> bool:  # asked for once after each step
        taken.append(len(taken) + 1)
        return taken[-1] == step

    monkeypatch.setattr(checkpoint.Checkpoints, "due", due)
    return taken


def send_while_saving(monkeypatch, number: signal.Signals, step: int) -> None:
    """Get the signal while the save of `step` is under way, after a step more if one is taken."""
    write, batch, sent = checkpoint.write_manifest, MixtureLoader.batch, threading.Event()
    taken = save_at(monkeypatch, 1)
    note, noted = StopRequest._note, threading.Event()

    def noting(self, *received, **how) -> None:
        note(self, *received, **how)
        noted.set()

    def sending(folder: Path, *content) -> None:
        if folder.name == str(step):
            wait_for(lambda: taken[-1] > step or step == 4)
            os.kill(os.getpid(), number)
            assert noted.wait(60)
            sent.set()
        write(folder, *content)

    def held_back(self, index: int, *sizes: int):
        if index > step:
            assert sent.wait(60)
        return batch(self, index, *sizes)

    monkeypatch.setattr(StopRequest, "_note", noting)
    monkeypatch.setattr(checkpoint, "write_manifest", sending)
    monkeypatch.setattr(MixtureLoader, "batch", held_back)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 4])
def test_a_signal_in_the_middle_of_a_save_loses_nothing(
    straight, tmp_path, monkeypatch, capsys, number, step
) -> None:
    """Row 27: while it trains (the save of step 1), and while it waits for the save (of step 4)."""
    with monkeypatch.context() as patch:
        send_while_saving(patch, number, step)
        assert train(tmp_path / "run", *STEPS) == 0
    stopped = int(re.search(rf"{number.name}: saved step (\d+)", capsys.readouterr().out)[1])
    assert 1 < stopped < 4 if step == 1 else stopped == 4
    assert saved_steps(tmp_path / "run")[-2:] == [1, stopped]
    for saved in saved_steps(tmp_path / "run"):
        verify(tmp_path / "run" / "checkpoints" / str(saved))
    assert train(tmp_path / "run", *STEPS) == 0
    assert_same_end(tmp_path / "run", straight)


@pytest.mark.parametrize("evaluated", [True, False])
def test_no_step_is_taken_past_an_evaluation_that_is_not_on_disk(
    straight, tmp_path, monkeypatch, evaluated
) -> None:
    """Row 28: a kill costs one interval at most; saves between evaluations hold nobody up."""
    write, reached = checkpoint.write_manifest, []
    step = 4 if evaluated else 1

    def slowly(folder: Path, *content) -> None:
        if folder.name == str(step):
            time.sleep(0.5)
            steps = {r["step"] for r in read_metrics(folder.parents[1] / "metrics.jsonl")}
            reached.append(max(steps))
        write(folder, *content)

    monkeypatch.setattr(checkpoint, "write_manifest", slowly)
    save_at(monkeypatch, 1)
    assert train(tmp_path / "run", *STEPS) == 0
    assert reached[0] == 4 if evaluated else reached[0] > 1
    assert_same_end(tmp_path / "run", straight)


def test_sigusr1_saves_and_goes_on(straight, tmp_path, monkeypatch, capsys) -> None:
    send_while_saving(monkeypatch, signal.SIGUSR1, step=1)
    assert train(tmp_path / "run", *STEPS, "--keep-checkpoints", "9") == 0
    saved = int(re.search(r"SIGUSR1: saving step (\d+)", capsys.readouterr().out)[1])
    assert saved_steps(tmp_path / "run") == sorted({0, 1, saved, 4, 8})
    assert_same_end(tmp_path / "run", straight)


def test_a_run_saves_at_least_every_so_many_minutes(straight, tmp_path) -> None:
    flags = ("--checkpoint-minutes", "0.00001", "--keep-checkpoints", "99")
    assert train(tmp_path / "run", *STEPS, *flags) == 0
    assert saved_steps(tmp_path / "run") == list(range(9))
    assert_same_end(tmp_path / "run", straight)


def test_a_run_whose_data_stops_coming_shows_where_every_thread_stands(
    tmp_path, monkeypatch, capfd
) -> None:
    """Row 30."""
    batch = MixtureLoader.batch

    def read_from_a_lost_disk(self, step: int, *sizes: int):
        if step == 60:
            time.sleep(3)
        return batch(self, step, *sizes)

    monkeypatch.setattr(MixtureLoader, "batch", read_from_a_lost_disk)
    monkeypatch.setattr(stalls, "MIN_STALL_SECONDS", 1.0)
    monkeypatch.setattr(stalls, "STALL_FACTOR", 1)
    monkeypatch.setattr(stalls, "CHECK_SECONDS", 0.2)
    assert train(tmp_path / "run", "--max-iters", "64", "--eval-interval", "100") == 0
    err = capfd.readouterr().err
    assert re.search(r"the step has taken \d+ s so far, and usually takes", err)
    assert "in read_from_a_lost_disk" in err


# ---------------------------------------------------------------- what it says (17)


def gone(where: str) -> tuple[int, int | None]:
    """(an end to write to, one to close once the run speaks, if it is not gone before)."""
    if where == "full disk":
        return os.open("/dev/full", os.O_WRONLY), None
    reader, writer = os.pipe() if where == "pipe" else pty.openpty()
    return writer, reader


@pytest.mark.parametrize("where", ["full disk", "pipe", "terminal"])
def test_a_run_goes_on_when_nobody_takes_what_it_says(straight, tmp_path, where) -> None:
    writer, reader = gone(where)
    with started(tmp_path / "run", *STEPS, out=writer) as process:
        if reader is not None:
            assert os.read(reader, 1)
            os.close(reader)
        assert process.wait(120) == 0
    os.close(writer)
    assert_same_end(tmp_path / "run", straight)


def test_what_a_terminal_has_no_letters_for_is_said_without_them(straight, tmp_path) -> None:
    with started(tmp_path / "run", *STEPS, PYTHONIOENCODING="ascii") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Done: 8 steps" in out
    assert_same_end(tmp_path / "run", straight)
