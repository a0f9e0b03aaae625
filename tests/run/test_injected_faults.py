"""File operations that fail one after another, and signals at them: nothing is ever lost."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.injected.sitecustomize import Injection, install
from helpers.runs import ROOT, STEPS, assert_same_end, train


@contextmanager
def injected(operation: str, number: str, error: int, folder: Path) -> Iterator[Injection]:
    injection = Injection(f"{operation} {number} {error} {folder}")
    undo = install(injection)
    try:
        yield injection
    finally:
        undo()


def exit_code(out_dir: Path) -> int:
    try:
        return train(out_dir, *STEPS)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize(
    ("operation", "number", "error"),
    [("fsync", "37+", errno.ENOSPC), ("rename", "4", errno.EIO)],  # both in the save of step 4
)
def test_a_run_whose_files_fail_says_so_and_resumes_to_the_same_end(
    straight, tmp_path, capsys, operation: str, number: str, error: int
) -> None:
    out_dir = tmp_path / "run"
    with injected(operation, number, error, out_dir) as injection:
        code = exit_code(out_dir)
    assert injection.counts[operation] >= int(number.rstrip("+"))
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert os.strerror(error) in err
    assert code == (2 if number.endswith("+") else 0)
    assert train(out_dir, *STEPS) == 0
    assert_same_end(out_dir, straight)


@pytest.mark.slow
@pytest.mark.parametrize("command", [("train", "--every", "60"), ("prepare", "--every", "18")])
def test_a_sample_of_all_faults_at_all_operations_breaks_no_promise(command) -> None:
    """Minutes; benchmarks/inject_faults.py tries them all in hours."""
    script = str(ROOT / "benchmarks" / "inject_faults.py")
    faults = ("--faults", "ENOSPC", "EIO", "SIGTERM", "SIGKILL")
    done = subprocess.run(
        [sys.executable, script, *command, *faults],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exit code") > 20
