import re
import subprocess
import sys
import threading
import time

import pytest

from jaxgpt.training import stalls
from jaxgpt.training.stalls import LEAST_SECONDS, TIMES, StallWatch


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
        assert watch.limit("step") == TIMES * 12
        assert watch.limit("evaluation") == TIMES * 100


def test_short_steps_are_given_some_minutes(clock) -> None:
    with StallWatch() as watch:
        took(watch, clock, "step", 0.1, 0.1)
        assert watch.limit("step") == LEAST_SECONDS


def test_what_may_be_compiling_is_not_watched(clock) -> None:
    with StallWatch() as watch:
        assert watch.limit("step") is None
        took(watch, clock, "step", 900.0)
        assert watch.limit("step") is None


def test_leaving_ends_the_watch() -> None:
    with StallWatch() as watch:
        for what in ("step", "save", "step", "save", "step", "save"):
            watch.begin(what)
        assert any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    time.sleep(0.1)
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


STALLED = """
import sys, time
from jaxgpt.training import stalls
stalls.LEAST_SECONDS = 0.5
stalls.REARM_SECONDS = 0.0
def read_from_a_lost_disk():
    {stall}
with stalls.StallWatch() as watch:
    for _ in range(20):
        watch.begin("step")
        time.sleep(0.01)
    watch.begin("step")
    read_from_a_lost_disk()
"""


def stderr_of(stall: str) -> str:
    code = STALLED.format(stall=stall)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def test_a_stall_is_said_in_a_sentence_with_the_place_of_every_thread() -> None:
    err = stderr_of("time.sleep(1.6)")
    assert re.search(r"no end of the step begun \d+ s ago, which usually takes 0\.\d+ s", err)
    assert "in read_from_a_lost_disk" in err
    assert err.index("Where every thread stands") < err.index("in read_from_a_lost_disk")


def test_a_stall_that_stops_all_of_python_shows_its_place_all_the_same() -> None:
    # A regular expression holds the interpreter's lock as long as it takes.
    err = stderr_of("import re; re.match('(a+)+b', 'a' * 26)")
    assert "in read_from_a_lost_disk" in err


def test_steps_that_follow_each_other_say_nothing() -> None:
    assert stderr_of("pass") == ""
