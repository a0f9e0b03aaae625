"""What the log does where it cannot write, or the folder is no longer its own."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.events import expected, lines_by_step, log_steps, read_events, tags_by_step

from jaxgpt.run.metrics import MetricsLog
from jaxgpt.run.tensorboard_events import event_files


def test_a_full_disk_is_reported_once_and_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def write_half(file: int, data: bytes) -> int:
        write(file, bytes(data[: len(data) // 2]))
        raise OSError(28, "No space left on device")

    complaints: list[str] = []
    with MetricsLog(tmp_path, on_error=complaints.append) as log:
        log_steps(log, range(2))
        monkeypatch.setattr(os, "write", write_half)
        log_steps(log, range(2, 7))
        assert not log.flush()
        assert lines_by_step(tmp_path) == expected(range(2))
        assert tags_by_step(tmp_path) == expected(range(2), "sample/text_summary")
        monkeypatch.setattr(os, "write", write)
        log_steps(log, range(7, 9))
        assert log.flush()
    assert complaints == [
        "metrics cannot be written, training continues: [Errno 28] No space left on device"
    ]
    assert lines_by_step(tmp_path) == expected(range(9))
    assert tags_by_step(tmp_path) == expected(range(9), "sample/text_summary")


FILES_OF_4_KB_AT_MOST = """
import sys
from pathlib import Path
from jaxgpt.run.metrics import MetricsLog

with MetricsLog(Path(sys.argv[1]), int(sys.argv[2]), on_error=print) as log:
    for step in range(100):
        log.scalars(step, {"train/loss": 1.0})
    print(log.flush())
"""


def test_a_file_that_may_not_grow_does_not_end_the_run(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log_steps(log, range(100))
    process = subprocess.run(
        [sys.executable, "-c", FILES_OF_4_KB_AT_MOST, str(tmp_path), "90"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        capture_output=True,
        text=True,
        check=True,
    )
    complaint, flushed = process.stdout.splitlines()
    assert complaint.endswith("training continues: [Errno 27] File too large")
    assert flushed == "False"
    assert {*tmp_path.iterdir()} == {tmp_path / "metrics.jsonl", *event_files(tmp_path)}
    assert lines_by_step(tmp_path) == expected(range(91))  # shortened, which needs no room
    assert len(read_events(tmp_path)) > 140


def test_a_disk_that_is_full_when_a_run_resumes_leaves_no_step_twice(
    tmp_path: Path, monkeypatch
) -> None:
    with MetricsLog(tmp_path) as log:
        log_steps(log, range(9))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"no record\n" + path.read_bytes())  # so that it has to be written again

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        complaints: list[str] = []
        log = MetricsLog(tmp_path, resume_step=4, on_error=complaints.append)
        log_steps(log, range(5, 7))
        assert lines_by_step(tmp_path) == expected(range(9))
    log_steps(log, range(7, 9))
    log.close()
    assert len(complaints) == 1
    assert lines_by_step(tmp_path) == expected(range(9))


def test_a_folder_that_another_run_has_taken_is_not_written_to(tmp_path: Path) -> None:
    ours = [True]
    with MetricsLog(tmp_path / "run", is_ours=lambda: ours[0]) as log:
        log_steps(log, range(2))
        shutil.rmtree(tmp_path / "run")
        ours[0] = False
        log_steps(log, range(2, 4))
        assert log.flush()
        assert not (tmp_path / "run").exists()
        ours[0] = True
        log_steps(log, range(4, 6))
    assert lines_by_step(tmp_path / "run") == expected(range(2, 6))


def test_a_folder_that_cannot_be_made_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="metrics cannot be written"):
        log = MetricsLog(tmp_path / "file" / "run")
    log_steps(log, range(3))
    assert not log.flush()
    log.close()
