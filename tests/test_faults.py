"""Faults of the machine and of the user, through the command line: docs/faults.md lists them all.

Each test looks at the sentence, at the exit code, and at what is on disk afterwards.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_train import SMALL, last_params, losses, train

import jaxgpt
from jaxgpt.data.loader import WindowLoader
from jaxgpt.data.shards import write_shard
from jaxgpt.hardware import preflight
from jaxgpt.training import checkpoint, stalls
from jaxgpt.training.integrity import MANIFEST, verify
from jaxgpt.training.lock import RunLock
from jaxgpt.training.records import read_metrics
from jaxgpt.training.retention import finished_steps

ROOT = Path(jaxgpt.__file__).parents[1]
STEPS = ("--max-iters", "8")


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run of eight steps, with checkpoints at 4 and 8; tests take copies of it."""
    out_dir = tmp_path_factory.mktemp("runs") / "straight"
    assert train(out_dir, *STEPS) == 0
    return out_dir


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


@pytest.fixture
def refused(capsys):
    """The answer to a run that ends with exit code 2."""

    def answer(out_dir: Path, *flags: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            train(out_dir, *flags)
        err = capsys.readouterr().err
        assert left.value.code == 2
        assert err.startswith("python -m jaxgpt.train: ")
        assert "Traceback" not in err
        return err

    return answer


def saved_steps(out_dir: Path) -> list[int]:
    return finished_steps(out_dir / "checkpoints")


def assert_same_end(out_dir: Path, straight: Path) -> None:
    assert last_params(out_dir) == last_params(straight)
    assert losses(out_dir) == losses(straight)


# ---------------------------------------------------------------- data (rows 2-6, 8, 9, 11)

GOOD = np.arange(400, dtype=np.uint16) % 256
HEADER = np.zeros(256, "<i4")


def header(*words: int) -> bytes:
    whole = HEADER.copy()
    whole[: len(words)] = words
    return whole.tobytes()


FAULTY_SHARDS = {
    "2 magic": (header(12345, 1, 400) + GOOD.tobytes(), "starts with 12345"),
    "2 llama-3": (header(20240801, 1, 400) + GOOD.tobytes(), "a llama-3 shard"),
    "2 version": (header(20240520, 2, 400) + GOOD.tobytes(), "is a shard of version 2"),
    "3 truncated": (header(20240520, 1, 400) + GOOD.tobytes()[:-9], "is truncated"),
    "3 over-long": (header(20240520, 1, 400) + GOOD.tobytes() * 2, "is too long"),
    "3 negative": (header(20240520, 1, -5), "is too long"),
    "4 empty": (b"", "is empty"),
    "4 no tokens": (header(20240520, 1, 0), "holds a header and no tokens"),
    "6 id": (header(20240520, 1, 400) + (GOOD + 2).tobytes(), "outside the tokenizer's 257"),
    "8 short": (header(20240520, 1, 9) + GOOD[:9].tobytes(), "has 9 tokens"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("fault", FAULTY_SHARDS)
def test_a_faulty_shard_is_named_before_anything_is_made(tmp_path, refused, fault, split) -> None:
    content, reason = FAULTY_SHARDS[fault]
    for name in ("train", "val"):
        write_shard(tmp_path / f"x_{name}_000000.bin", GOOD)
    path = tmp_path / f"x_{split}_000000.bin"
    path.write_bytes(content)
    err = refused(tmp_path / "run", "--dataset", "x", "--data-dir", str(tmp_path))
    assert str(tmp_path) in err
    assert reason in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (GOOD.tobytes() + b"x", "an odd number"),
        (np.arange(4000, dtype=np.uint32).tobytes(), "as in uint32 or int64 tokens"),
    ],
)
def test_faulty_tokens_without_a_header_are_named(tmp_path, refused, content, reason) -> None:
    GOOD.tofile(tmp_path / "val.bin")
    (tmp_path / "train.bin").write_bytes(content)
    err = refused(tmp_path / "run", "--dataset", "x", "--data-dir", str(tmp_path))
    assert f"{tmp_path / 'train.bin'}: " in err
    assert reason in err


def test_other_data_of_the_same_size_is_refused(tmp_path, refused) -> None:
    data = ("--dataset", "x", "--data-dir", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        write_shard(tmp_path / f"data/x_{name}_000000.bin", GOOD)
    assert train(tmp_path / "run", *data, "--max-iters", "1") == 0
    before = saved_steps(tmp_path / "run")
    write_shard(tmp_path / "data/x_train_000000.bin", GOOD[::-1].copy())
    err = refused(tmp_path / "run", *data, "--max-iters", "2")
    assert re.search(r"was trained on \(train_fingerprint \w+ -> \w+\); give it back its data", err)
    assert saved_steps(tmp_path / "run") == before


def test_a_folder_that_no_file_system_takes_is_said_in_a_sentence(tmp_path, refused) -> None:
    err = refused(tmp_path, "--dataset", "x", "--data-dir", "x" * 300)
    assert "cannot be read (File name too long)" in err


def test_a_pickle_beside_the_data_is_never_opened(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "executed"))
    for name in ("train", "val"):
        GOOD.tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch $MARK'\ntR.")
    flags = ("--dataset", "x", "--data-dir", str(tmp_path), "--max-iters", "1")
    assert train(tmp_path / "run", *flags) == 0
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- going on (12-15, 29, 31)


def test_a_damaged_checkpoint_is_named_and_the_one_before_gone_on_from(
    straight, run, capsys
) -> None:
    """Row 14: whatever is flipped, cut or deleted, the run ends as if nothing had been."""
    newest = run / "checkpoints" / "8"
    array = max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)
    assert train(run, *STEPS) == 0
    out, err = capsys.readouterr()
    assert f"checkpoint 8 is damaged and put aside as 8.damaged: {array} is not what was" in err
    assert "from step 4 to step 8" in out
    assert_same_end(run, straight)


def test_half_a_checkpoint_counts_as_none(straight, run, capsys) -> None:
    """Rows 14 and 28: a commit without its manifest, and what a killed save left."""
    (run / "checkpoints" / "8" / MANIFEST).unlink()
    (run / "checkpoints" / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert train(run, *STEPS) == 0
    assert "from step 4 to step 8" in capsys.readouterr().out
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
    """Row 15."""
    before = sorted(run.rglob("*"))
    assert "of which step 8 is saved" in refused(run, "--max-iters", "9", "--resume", "never")
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
    assert "has metrics of steps that were taken" in refused(run, *STEPS)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_has_changed_is_shown(run, capsys) -> None:
    """Rows 13 and 31."""
    flags = ("--max-iters", "9", "--learning-rate", "1e-3", "--dtype", "bfloat16")
    assert train(run, *flags) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Changed since the run was saved: " in out
    for change in ("max_iters 8 -> 9", "learning_rate 0.006 -> 0.001", "dtype float32 -> bfloat16"):
        assert change in out


def test_a_second_process_is_refused(run, refused) -> None:
    """Row 29."""
    with RunLock(run) as lock:
        lock.take()
        err = refused(run, "--max-iters", "9")
    assert f"process {os.getpid()} on " in err
    assert saved_steps(run)[-1] == 8


# ---------------------------------------------------------------- disks and memory (16, 24, 25)


def test_a_last_save_without_room_is_not_called_done(
    straight, tmp_path, refused, monkeypatch
) -> None:
    """Row 16, at the end of a run."""
    save, usage = checkpoint.Checkpoints.save, shutil.disk_usage

    def fill_the_disk_before_step_8(self, state, **notes) -> None:
        if int(state.step) == 8:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        save(self, state, **notes)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", fill_the_disk_before_step_8)
    err = refused(tmp_path / "run", *STEPS)
    assert "step 8 could not be saved" in err
    assert "checkpoint 4 stays; make room there" in err
    assert "then give the same command again" in err
    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    assert train(tmp_path / "run", *STEPS) == 0
    assert_same_end(tmp_path / "run", straight)


def test_a_disk_that_is_full_for_a_while_costs_only_that_save(tmp_path: Path) -> None:
    """Row 16, with writes that really fail; SIGUSR1 saves when the test says so."""
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
            r"checkpoint 0 stays; make room there: training goes on, .*\n",
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


@pytest.mark.parametrize("name", ["train_step", "eval_step"])
def test_a_full_device_is_answered_and_what_was_saved_stays(
    straight, run, refused, monkeypatch, name
) -> None:
    """Rows 24 and 25."""
    shutil.rmtree(run / "checkpoints" / "8")

    def run_out(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers:\n" * 99)

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
    first, last = map(int, re.search(r"steps in a row, (\d+) to (\d+), had", err).groups())
    assert (last - first, "smaller --learning-rate" in err) == (9, True)
    assert out.count(" skipped: loss ") == 9
    logged = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r]
    assert logged[-1]["step"] == last
    assert logged[-1]["train/skipped_steps"] == 10
    assert saved_steps(tmp_path / "run") == [0]
    assert_finite(tmp_path / "run")


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, refused) -> None:
    # 1e39 is finite for Python and infinite in float32: one step ruins the parameters.
    flags = ("--learning-rate", "1e39", "--warmup-iters", "1", "--eval-interval", "3")
    err = refused(tmp_path / "run", *flags, "--max-iters", "100")
    assert "step 3 are not finite, so they are not saved; checkpoint 0 in " in err
    assert saved_steps(tmp_path / "run") == [0]
    assert_finite(tmp_path / "run")


# ---------------------------------------------------------------- signals, kills, stalls (27, 30)


def send_while_saving(monkeypatch, number: signal.Signals, step: int) -> None:
    """Get the signal while the save of `step` is under way, some steps after it."""
    write, batch, sent = checkpoint.write_manifest, WindowLoader.batch, threading.Event()

    def sending(folder: Path, notes) -> None:
        if folder.name == str(step):
            os.kill(os.getpid(), number)
            time.sleep(0.3)
            sent.set()
        write(folder, notes)

    def held_back(self, index: int, *sizes: int):
        if index > step + 1:
            assert sent.wait(60)
        return batch(self, index, *sizes)

    monkeypatch.setattr(checkpoint, "write_manifest", sending)
    monkeypatch.setattr(WindowLoader, "batch", held_back)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_save_loses_nothing(
    straight, tmp_path, monkeypatch, capsys, number
) -> None:
    """Row 27."""
    with monkeypatch.context() as patch:
        send_while_saving(patch, number, step=4)
        assert train(tmp_path / "run", *STEPS) == 0
    stopped = int(re.search(rf"{number.name}: saved step (\d+)", capsys.readouterr().out)[1])
    assert 4 < stopped < 8
    assert saved_steps(tmp_path / "run")[-2:] == [4, stopped]
    for step in saved_steps(tmp_path / "run"):
        verify(tmp_path / "run" / "checkpoints" / str(step))
    assert train(tmp_path / "run", *STEPS) == 0
    assert_same_end(tmp_path / "run", straight)


def test_sigusr1_saves_and_goes_on(straight, tmp_path, monkeypatch, capsys) -> None:
    send_while_saving(monkeypatch, signal.SIGUSR1, step=4)
    assert train(tmp_path / "run", *STEPS, "--keep-checkpoints", "9") == 0
    saved = int(re.search(r"SIGUSR1: saving step (\d+)", capsys.readouterr().out)[1])
    assert saved_steps(tmp_path / "run") == [0, 4, saved, 8]
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
    batch = WindowLoader.batch

    def read_from_a_lost_disk(self, step: int, *sizes: int):
        if step == 60:
            time.sleep(3)
        return batch(self, step, *sizes)

    monkeypatch.setattr(WindowLoader, "batch", read_from_a_lost_disk)
    monkeypatch.setattr(stalls, "LEAST_SECONDS", 1.0)
    monkeypatch.setattr(stalls, "TIMES", 1)
    monkeypatch.setattr(stalls, "REARM_SECONDS", 0.0)
    assert train(tmp_path / "run", "--max-iters", "64", "--eval-interval", "100") == 0
    err = capfd.readouterr().err
    assert re.search(r"no end of the step begun \d+ s ago, which usually takes", err)
    assert "in read_from_a_lost_disk" in err


# ---------------------------------------------------------------- the machine (36)

WITHOUT = {
    "jax": "raise RuntimeError('jaxlib version 0.4.1 is older than 0.10.0')",
    "jaxlib": "raise ImportError('libcuda.so.1: cannot open shared object file')",
}


@pytest.mark.parametrize("module", WITHOUT)
def test_versions_that_do_not_fit_are_named(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text(WITHOUT[module])
    command = [sys.executable, "-m", "jaxgpt.train", *SMALL, "--out-dir", str(tmp_path / "run")]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"JAX cannot be imported \(.*\); this is Python 3.* with jax \d", done.stderr)
    assert "pip install -U -e '.[cuda]'" in done.stderr
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- helpers


def started(out_dir: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxgpt.train", *SMALL, "--out-dir", str(out_dir), *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


# ---------------------------------------------------------------- security


def test_nothing_in_the_package_can_load_a_pickle() -> None:
    loads = re.compile(
        r"^\s*(import|from) (pickle|joblib|dill|shelve|marshal|torch)\b|allow_pickle|np\.load\(",
        re.MULTILINE,
    )
    sources = sorted((ROOT / "jaxgpt").rglob("*.py"))
    assert len(sources) > 30
    assert [path.name for path in sources if loads.search(path.read_text())] == []


# ---------------------------------------------------------------- the table


def test_every_row_of_the_table_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "faults.md").read_text().partition("## The table")[2]
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    rows = [row for row in rows if len(row) == 3 and row[2] not in ("tests", "")]
    assert len(rows) > 45
    for fault, _, tests in rows:
        for module, names in re.findall(r"(\w+): ([^;]+)", tests):
            source = (ROOT / "tests" / f"test_{module}.py").read_text()
            for name in names.split(", "):
                assert f"def {name}(" in source, f"{fault}: tests/test_{module}.py has no {name}"
        assert "test_" in tests, fault
