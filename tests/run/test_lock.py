import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.files import LOCK_FILE, FolderLock, LockedError

HOLD = """
import sys, time
from pathlib import Path
from jaxgpt.files import FolderLock
with FolderLock(Path(sys.argv[1]), "--out-dir") as lock:
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
        FolderLock(tmp_path / "run", "--out-dir") as lock,
    ):
        lock.take()
    who = rf"process {holder.pid} on {socket.gethostname()}, since 20\d\d-.*"
    message = rf"is in use by {who}; stop it first.* --out-dir .*delete"
    assert re.search(message, str(refused.value))
    assert (tmp_path / "run" / LOCK_FILE).exists(), "only its owner may remove the lock file"


def test_a_lock_that_a_killed_process_left_is_no_obstacle(holder, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    path = tmp_path / "run" / LOCK_FILE
    assert json.loads(path.read_text())["pid"] == holder.pid
    with FolderLock(tmp_path / "run", "--out-dir") as lock:
        lock.take()
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b"{}", b"x" * 5000])
def test_a_lock_file_of_any_bytes_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    with FolderLock(tmp_path, "--out-dir") as lock:
        lock.take()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_holder_that_cannot_be_read_is_refused_all_the_same(holder, tmp_path: Path) -> None:
    (tmp_path / "run" / LOCK_FILE).write_text("[]")
    with (
        pytest.raises(LockedError, match="by another process"),
        FolderLock(tmp_path / "run", "--out-dir") as lock,
    ):
        lock.take()


def test_what_ends_leaves_no_lock_and_what_never_began_no_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "new", "--out-dir") as lock:
        lock.take()
    assert not (tmp_path / "new").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with FolderLock(tmp_path / "run", "--out-dir") as lock:
        lock.take()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_lock_that_was_not_taken_touches_nothing(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "new", "--out-dir"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_lock_deleted_between_opening_and_locking_is_taken_anew(tmp_path, monkeypatch) -> None:
    flock, calls = files.fcntl.flock, []

    def flock_after_the_last_holder_has_left(file: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(file)
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", flock_after_the_last_holder_has_left)
    with FolderLock(tmp_path, "--out-dir") as lock:
        lock.take()
        assert len(calls) == 2
        assert (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--out-dir .* cannot be locked .*choose another folder"),
        FolderLock(tmp_path / "file" / "run", "--out-dir") as lock,
    ):
        lock.take()


def test_without_locks_of_the_system_a_file_is_enough_to_refuse(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    with FolderLock(tmp_path, "--out-dir") as lock:
        lock.take()
        with (
            pytest.raises(LockedError, match=f"delete {tmp_path}"),
            FolderLock(tmp_path, "--out-dir") as second,
        ):
            second.take()
    with FolderLock(tmp_path, "--out-dir") as lock:
        lock.take()


def test_a_symlink_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    for target in (tmp_path / "precious", tmp_path / "missing"):
        link = tmp_path / "run" / LOCK_FILE
        link.symlink_to(target)
        with (
            pytest.raises(UserError, match=r"cannot be locked .*symbolic link"),
            FolderLock(tmp_path / "run", "--out-dir") as lock,
        ):
            lock.take()
        link.unlink()
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "missing").exists()


def test_a_lock_file_of_another_owner_is_not_removed(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "--out-dir") as lock:
        lock.take()
        (tmp_path / LOCK_FILE).unlink()  # somebody takes it for stale
        (tmp_path / LOCK_FILE).write_text("another's")
    assert (tmp_path / LOCK_FILE).read_text() == "another's"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_and_used(
    tmp_path: Path, monkeypatch, capsys, number: int
) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with FolderLock(tmp_path, "--out-dir") as lock:
        lock.take()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert f"{tmp_path}: this file system has no locks" in capsys.readouterr().err
    assert not tmp_path.exists()  # it was empty


def test_a_folder_that_was_deleted_is_locked_again_unless_another_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with FolderLock(folder, "--out-dir") as lock, FolderLock(folder, "--out-dir") as other:
        lock.take()
        shutil.rmtree(folder)
        assert not lock.is_held()
        lock.renew()
        assert lock.is_held()
        shutil.rmtree(folder)
        other.take()
        with pytest.raises(LockedError, match="is in use by process"):
            lock.renew()
        assert not lock.is_held()
        assert other.is_held()
