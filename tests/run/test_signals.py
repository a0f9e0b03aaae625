import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxgpt.errors import INTERRUPTED
from jaxgpt.run.signals import StopRequest


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_sets_what_the_loop_reads(number) -> None:
    with StopRequest() as stop:
        assert (stop.name, stop.save_now) == (None, False)
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.name is not None)
        assert stop.name == number.name


def test_sigusr1_asks_for_a_save_and_for_no_stop() -> None:
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: stop.save_now)
            stop.save_now = False
        assert stop.name is None


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: stop.save_now)
            assert stop.name is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_sigterm_changes_nothing(monkeypatch) -> None:
    left: list[int] = []
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            stop._note(number, exit_now=left.append)
        assert stop.name == "SIGINT"
        assert left == []
        stop._note(signal.SIGINT, exit_now=left.append)
    assert left == [INTERRUPTED]


def test_everything_is_as_before_afterwards() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    threads = threading.active_count()
    with StopRequest():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1
    wait_until(lambda: threading.active_count() <= threads)  # others may have ended meanwhile


# The main thread is in C, as it is in XLA, and Python's own handlers have to wait.
BUSY = """
import hashlib, sys
from jaxgpt.errors import INTERRUPTED
from jaxgpt.run.signals import StopRequest
with StopRequest() as stop:
    print("entered", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 40_000_000)
    print("computed", stop.name, flush=True)
"""


def test_a_busy_process_answers_the_first_ctrl_c_at_once_and_leaves_at_the_second() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
    )
    assert process.stdout.readline() == "entered\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    assert process.stderr.readline().startswith("SIGINT: stopping after this step; Ctrl-C again")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=5)
    assert process.returncode == INTERRUPTED == 130
    assert "run the same command again to resume from the newest checkpoint" in err
    assert "computed" not in out
    assert "Traceback" not in err
