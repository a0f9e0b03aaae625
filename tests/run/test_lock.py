import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt.errors import UserError
from jaxgpt.run import lock as lock_module
from jaxgpt.run.lock import LOCK_FILE, LockedError, RunLock

HOLD = """
import sys, time
from pathlib import Path
from jaxgpt.run.lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.take()
    print("taken", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of tmp_path / 'run'."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_whose_the_folder_is(holder, tmp_path: Path) -> None:
    with (
        pytest.raises(LockedError) as refused,
        RunLock(tmp_path / "run") as lock,
    ):
        lock.take()
    who = rf"process {holder.pid} on {socket.gethostname()}, since 20\d\d-"
    assert re.search(rf"being trained in by {who}.* --out-dir .*delete", str(refused.value))
    assert (tmp_path / "run" / LOCK_FILE).exists(), "who is refused must not take the lock away"


def test_a_lock_that_a_killed_process_left_is_no_obstacle(holder, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    path = tmp_path / "run" / LOCK_FILE
    assert json.loads(path.read_text())["pid"] == holder.pid
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b"{}", b"x" * 5000])
def test_a_lock_file_of_any_bytes_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    with RunLock(tmp_path) as lock:
        lock.take()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_holder_that_cannot_be_read_is_refused_all_the_same(holder, tmp_path: Path) -> None:
    (tmp_path / "run" / LOCK_FILE).write_text("[]")
    with pytest.raises(LockedError, match="by another process"), RunLock(tmp_path / "run") as lock:
        lock.take()


def test_what_ends_leaves_no_lock_and_what_never_began_no_folder(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new") as lock:
        lock.take()
    assert not (tmp_path / "new").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with RunLock(tmp_path / "run") as lock:
        lock.take()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_lock_that_was_not_taken_touches_nothing(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_lock_deleted_between_opening_and_locking_is_taken_anew(tmp_path, monkeypatch) -> None:
    flock, calls = lock_module.fcntl.flock, []

    def flock_after_the_last_holder_has_left(file: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(file)
        flock(file, how)

    monkeypatch.setattr(lock_module.fcntl, "flock", flock_after_the_last_holder_has_left)
    with RunLock(tmp_path) as lock:
        lock.take()
        assert len(calls) == 2
        assert (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"its lock cannot be taken .*choose another folder"),
        RunLock(tmp_path / "file" / "run") as lock,
    ):
        lock.take()


def test_without_locks_of_the_system_a_file_is_enough_to_refuse(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock_module, "fcntl", None)
    with RunLock(tmp_path) as lock:
        lock.take()
        with pytest.raises(LockedError, match=f"delete {tmp_path}"), RunLock(tmp_path) as second:
            second.take()
    with RunLock(tmp_path) as lock:
        lock.take()
