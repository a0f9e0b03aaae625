import re
import subprocess
import sys
import threading

import pytest

from jaxgpt.run import watchdog as stalls
from jaxgpt.run.watchdog import MIN_STALL_SECONDS, STALL_FACTOR, StallWatch


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stalls.time, "monotonic", lambda: now[0])

    def turn(seconds: float) -> None:
        now[0] += seconds

    return turn


def took(watch: StallWatch, clock, what: str, *seconds: float) -> None:
    for length in seconds:
        watch.begin(what)
        clock(length)
    watch.begin("something else")


def test_the_limit_is_many_times_the_median_of_the_same_thing(clock) -> None:
    with StallWatch() as watch:
        took(watch, clock, "step", 10.0, 12.0, 500.0)
        took(watch, clock, "evaluation", 100.0, 100.0)
        assert watch.limit("step") == STALL_FACTOR * 12
        assert watch.limit("evaluation") == STALL_FACTOR * 100


def test_short_steps_are_given_some_minutes(clock) -> None:
    with StallWatch() as watch:
        took(watch, clock, "step", 0.1, 0.1)
        assert watch.limit("step") == MIN_STALL_SECONDS


def test_what_may_be_compiling_is_not_watched(clock) -> None:
    with StallWatch() as watch:
        assert watch.limit("step") is None
        took(watch, clock, "step", 900.0)
        assert watch.limit("step") is None


def test_leaving_ends_the_watch() -> None:
    with StallWatch() as watch:
        watch.begin("step")
        assert "stalls" in {thread.name for thread in threading.enumerate()}
    assert "stalls" not in {thread.name for thread in threading.enumerate()}


STALLED = """
import sys, time
from jaxgpt.run import watchdog as stalls
stalls.MIN_STALL_SECONDS = 0.5
stalls.CHECK_SECONDS = 0.1
def read_from_a_lost_disk():
    {stall}
with stalls.StallWatch() as watch:
    for _ in range(20):
        watch.begin("step")
        time.sleep(0.01)
    watch.begin("step")
    read_from_a_lost_disk()
"""


def stalled(stall: str) -> subprocess.CompletedProcess[str]:
    code = STALLED.format(stall=stall)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def stderr_of(stall: str) -> str:
    return stalled(stall).stderr


def test_a_stall_is_said_in_a_sentence_with_the_place_of_every_thread() -> None:
    err = stderr_of("time.sleep(1.6)")
    assert re.search(r"the step has taken \d+ s so far, and usually takes 0\.\d+ s", err)
    assert "in read_from_a_lost_disk" in err
    assert err.index("Stack of every thread") < err.index("in read_from_a_lost_disk")


BUSY = """
    import gc, threading
    def busy(depth=0):
        return busy(depth + 1) if depth < 50 else time.sleep(0)
    def come_and_go():
        while time.monotonic() < end:
            threads = [threading.Thread(target=busy) for _ in range(4)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
    stalls.MIN_STALL_SECONDS = stalls.CHECK_SECONDS = stalls.STALL_FACTOR = 0.001
    # Where looking makes objects, their garbage is collected meanwhile, and that lets others run.
    gc.callbacks.append(lambda *_: time.sleep(0))
    gc.set_threshold(3)
    end = time.monotonic() + 3
    come_and_go()
"""


def test_threads_that_move_meanwhile_are_shown_and_go_on() -> None:
    """What looks at them without the interpreter's lock ends the process sooner or later."""
    done = stalled(BUSY)
    assert done.returncode == 0
    assert done.stderr.count("Stack of every thread") > 50
    assert "in come_and_go" in done.stderr


def test_a_stall_is_said_once_each_time_the_limit_passes() -> None:
    err = stderr_of("stalls.MIN_STALL_SECONDS = 1.0; time.sleep(3.5)")
    assert err.count("Stack of every thread") == 3


def test_steps_that_follow_each_other_say_nothing() -> None:
    assert stderr_of("pass") == ""
