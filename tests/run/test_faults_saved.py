"""Faults that a run meets when it goes on from its checkpoints or saves them: docs/faults.md."""

import os
import re
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.runs import STEPS, assert_same_end, saved_steps, started, train, wait_for
from msgspec.structs import replace

from jaxgpt.files import FolderLock
from jaxgpt.model.generate import Generator
from jaxgpt.run import checkpoint, preflight
from jaxgpt.run.integrity import MANIFEST, Manifest, read_manifest, verify, write_manifest
from jaxgpt.run.metrics_file import read_metrics
from jaxgpt.weights.source import WeightsFlags, open_weights

# ---------------------------------------------------------------- going on


def test_a_damaged_checkpoint_is_named_and_the_one_before_gone_on_from(
    straight, run, capsys
) -> None:
    """Whatever is flipped, cut or deleted, the run ends as if nothing had been."""
    newest = run / "checkpoints" / "8"
    array = max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)
    assert train(run, *STEPS) == 0
    out, err = capsys.readouterr()
    assert f"checkpoint 8 is damaged and was renamed to 8.damaged: {array} is corrupt" in err
    assert "from step 4 to step 8" in " ".join(out.split())  # a long path wraps its line
    assert_same_end(run, straight)


def other_shape(manifest: Manifest) -> Manifest:
    name = next(name for name in manifest.arrays if name.endswith("mu/wte/embedding"))
    return replace(manifest, arrays={**manifest.arrays, name: "float32(7,)"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: replace(m, config={}), "its config is not the run's"),
        (lambda m: replace(m, config={**m.config, "n_layer": "x"}), "its config is not the run's"),
        (lambda m: replace(m, config={**m.config, "seed": 5}), "its config is not the run's"),
        (other_shape, "mu/wte/embedding: saved as float32(320, 16), now float32(7,)"),
    ],
)
def test_a_signed_manifest_that_does_not_fit_costs_only_its_checkpoint(
    straight, run, capsys, change, reason: str
) -> None:
    newest = run / "checkpoints" / "8"
    write_manifest(newest, change(read_manifest(newest)))
    assert train(run, *STEPS) == 0
    err = capsys.readouterr().err
    assert "checkpoint 8 is damaged and was renamed to 8.damaged: " in err
    assert reason in err
    assert_same_end(run, straight)


def test_a_checkpoint_that_holds_another_step_is_damaged(straight, run, capsys) -> None:
    """Manifests of older versions do not name their step."""
    newest, older = run / "checkpoints" / "8", run / "checkpoints" / "4"
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    write_manifest(newest, replace(read_manifest(older), step=None))
    assert train(run, *STEPS) == 0
    err = capsys.readouterr().err
    assert "checkpoint 8 is damaged and was renamed to 8.damaged: " in err
    assert "holds step 4" in err
    assert_same_end(run, straight)


def test_half_a_checkpoint_counts_as_none(straight, run, capsys) -> None:
    """A commit without its manifest, and what a killed save left."""
    (run / "checkpoints" / "8" / MANIFEST).unlink()
    (run / "checkpoints" / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert train(run, *STEPS) == 0
    assert "from step 4 to step 8" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"0", "4", "8"} - (
        set() if (straight / "checkpoints" / "0").exists() else {"0"}
    )
    assert_same_end(run, straight)


def test_where_no_checkpoint_is_sound_the_run_is_neither_resumed_nor_begun_anew(
    run, refused
) -> None:
    for step in saved_steps(run):
        (run / "checkpoints" / str(step) / MANIFEST).write_text("{}")
    before = sorted(run.rglob("*"))
    err = refused(run, *STEPS)
    assert "no checkpoint in" in err
    assert all(f"checkpoint {step}: " in err for step in saved_steps(run))
    assert sorted(run.rglob("*")) == before


def test_what_resume_says_is_done(run, tmp_path, refused) -> None:
    before = sorted(run.rglob("*"))
    assert "saved at step 8" in refused(run, "--max-iters", "9", "--resume", "never")
    assert "no finished checkpoint" in refused(tmp_path / "new", "--resume=must")
    assert not (tmp_path / "new").exists()
    (run / "checkpoints" / "8" / "state" / "_METADATA").write_text("{}")
    err = refused(run, *STEPS, "--resume", "must")
    assert "checkpoint 8 is damaged" in err
    assert "--resume auto falls back" in err
    assert sorted(run.rglob("*")) == before


def test_a_run_without_its_configuration_is_still_not_taken_for_another(run, refused) -> None:
    (run / "config.json").unlink()
    assert re.search(r"seed +1337 +1\n", refused(run, "--seed", "1"))
    assert re.search(r"eval_iters +2 +3\n", refused(run, "--eval-iters", "3"))


def test_metrics_without_their_checkpoints_are_not_thrown_away(run, refused) -> None:
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    assert "has metrics of earlier steps" in refused(run, *STEPS)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_has_changed_is_shown(run, capsys) -> None:
    flags = ("--max-iters", "9", "--learning-rate", "1e-3", "--dtype", "bfloat16")
    assert train(run, *flags) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Changed since the run was saved: " in out
    for change in ("max_iters 8 -> 9", "learning_rate 0.006 -> 0.001", "dtype float32 -> bfloat16"):
        assert change in out


def test_a_second_process_is_refused(run, refused) -> None:
    with FolderLock(run, "--out-dir") as lock:
        lock.take()
        err = refused(run, "--max-iters", "9")
    assert f"process {os.getpid()} on " in err
    assert saved_steps(run)[-1] == 8


# ---------------------------------------------------------------- disks and memory (16, 24, 25)


def test_a_last_save_without_room_is_not_called_done(
    straight, tmp_path, refused, monkeypatch
) -> None:
    """At the end of a run."""
    begin, usage = checkpoint.Checkpoints.begin, shutil.disk_usage

    def fill_the_disk_before_step_8(self, state, **notes) -> None:
        if int(state.step) == 8:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        begin(self, state, **notes)

    monkeypatch.setattr(checkpoint.Checkpoints, "begin", fill_the_disk_before_step_8)
    err = refused(tmp_path / "run", *STEPS)
    assert "step 8 could not be saved" in err
    assert "checkpoint 4 is kept; check that the disk has space" in err
    assert "then run the same command again to resume" in err
    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(checkpoint.Checkpoints, "begin", begin)
    assert train(tmp_path / "run", *STEPS) == 0
    assert_same_end(tmp_path / "run", straight)


def test_a_disk_that_is_full_from_the_start_is_told_before_a_step_is_taken(
    tmp_path, refused, monkeypatch
) -> None:
    """At the start of a run."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    err = refused(tmp_path / "run", *STEPS)
    assert re.search(r"step 0 could not be saved in .* MB are needed and 0.0 MB are free", err)
    assert "there is no earlier one; check that the disk has space and is writable, or" in err
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0]


def test_a_disk_that_is_full_for_a_while_costs_only_that_save(tmp_path: Path) -> None:
    """With writes that really fail; SIGUSR1 saves when the test says so."""
    out_dir, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    flags = ["--eval-interval", "100000", "--max-iters", "100000", "--log-interval", "20"]
    with started(tmp_path / "run", *flags) as process:
        wait_for(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 2)
        unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
        process.send_signal(signal.SIGUSR1)
        told = process.stderr.readline()
        assert re.fullmatch(
            rf"step [\d,]+ could not be saved in {tmp_path}/run/checkpoints \(File too large\); "
            r"checkpoint 0 is kept; check .*; training continues, .*\n",
            told,
        )
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: len(saved_steps(tmp_path / "run")) == 2)
        # Threads of Orbax's may write on after their save has failed, until the next one.
        wait_for(lambda: set(os.listdir(folder)) == {str(step) for step in saved_steps(out_dir)})
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 3, err  # the signal's line, and perhaps the metrics'
    stopped = int(re.search(r"SIGTERM: saved step ([\d,]+)", out)[1].replace(",", ""))
    failed = int(re.search(r"step ([\d,]+) could", told)[1].replace(",", ""))
    assert saved_steps(tmp_path / "run")[-1] == stopped > failed
    steps = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert all(step % 20 == 0 for step in steps)
    assert len(steps) == stopped // 20 + 1


def test_a_folder_deleted_under_a_run_is_made_again_with_all_that_makes_it_a_run(
    tmp_path, monkeypatch
) -> None:
    begin = checkpoint.Checkpoints.begin

    def begin_without_a_folder(self, state, **notes) -> None:
        if state.step == 4:
            shutil.rmtree(tmp_path / "run")
        begin(self, state, **notes)

    monkeypatch.setattr(checkpoint.Checkpoints, "begin", begin_without_a_folder)
    assert train(tmp_path / "run", *STEPS) == 0
    weights = open_weights(WeightsFlags(out_dir=tmp_path / "run"))
    assert (saved_steps(tmp_path / "run"), weights.step) == ([4, 8], 8)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 8


def run_out(*_: object, **__: object) -> None:
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers:\n" * 99)


def test_a_device_too_full_to_sample_does_not_take_the_save_along(
    straight, tmp_path, refused, monkeypatch
) -> None:
    flags = (*STEPS, "--sample-tokens", "8")  # first drawn after the first interval
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", run_out)
        assert "the device's memory is full" in refused(tmp_path / "run", *flags)
    assert saved_steps(tmp_path / "run") == [0, 4]
    assert train(tmp_path / "run", *STEPS) == 0
    assert_same_end(tmp_path / "run", straight)


def test_a_checkpoint_that_only_orbax_cannot_read_is_not_called_damaged(
    run, monkeypatch, refused
) -> None:
    def fail(folder: Path) -> None:
        raise KeyError("a format of a later version")

    monkeypatch.setattr("orbax.checkpoint.v1.checkpointables_metadata", fail)
    said = refused(run, *STEPS)
    assert "is intact, but cannot be read ('a format of a later version'); it was written" in said
    assert saved_steps(run) == [4, 8]


def test_a_device_too_full_to_go_on_is_not_taken_for_a_damaged_checkpoint(
    straight, run, refused, monkeypatch
) -> None:
    shutil.rmtree(run / "checkpoints" / "8")
    before = sorted(run.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.v1.load_checkpointables", run_out)
        err = refused(run, *STEPS)
    assert "the device's memory is full" in err
    assert "damaged" not in err
    assert sorted(run.rglob("*")) == before
    assert train(run, *STEPS) == 0
    assert_same_end(run, straight)


@pytest.mark.parametrize("name", ["train_step", "eval_step"])
def test_a_full_device_is_answered_and_what_was_saved_stays(
    straight, run, refused, monkeypatch, name
) -> None:
    shutil.rmtree(run / "checkpoints" / "8")

    class Full:
        def __init__(self, compiled) -> None:
            self.memory_analysis = compiled.memory_analysis

        __call__ = run_out

    compile_it = getattr(preflight, f"compile_{name}")
    with monkeypatch.context() as patch:
        patch.setattr(preflight, f"compile_{name}", lambda *a: Full(compile_it(*a)))
        err = refused(run, *STEPS)
    assert "the device's memory is full" in err
    assert "batch_size" in err or "--batch-size" in err
    assert len(err.splitlines()) < 20
    verify(run / "checkpoints" / str(saved_steps(run)[-1]))
    assert train(run, *STEPS) == 0
    assert_same_end(run, straight)
