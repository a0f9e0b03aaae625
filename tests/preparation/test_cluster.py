"""Preparation on a Dask cluster: a real scheduler and two real workers, on this machine."""

import gc
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import Client
from helpers.preparing import SMALL, contents, refusal, start, wait_for, wait_until

from jaxgpt.preparation.cluster import connect


class Dask:
    """A scheduler and workers of one thread, as users start them."""

    def __init__(self, children: list[subprocess.Popen], folder: Path):
        self._children, self._folder = children, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{port}"
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", str(port))

    def start_workers(self, n: int) -> list[subprocess.Popen]:
        """Start workers, and wait until the cluster has this many."""
        options = ("--nthreads", "1", "--no-nanny")
        workers = [self._start("worker", self.address, *options) for _ in range(n)]
        with connect(self.address) as cluster:
            wait_until(lambda: cluster.workers() == n)
        return workers

    def _start(self, *command: str) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-m", "dask", *command, "--no-dashboard"],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._children.append(child)
        return child


def finished_units(out: Path) -> list[str]:
    journal = out / ".prepare" / "units.jsonl"
    return journal.read_text().splitlines() if journal.exists() else []


@pytest.mark.slow  # two workers, which import for seconds, twice
def test_a_cluster_makes_the_same_bytes_whatever_dies(
    fineweb_like: Path, prepared: Path, tmp_path: Path, children: list[subprocess.Popen]
) -> None:
    dask, out = Dask(children, tmp_path), tmp_path / "out"
    command = (fineweb_like, "--out", out, *SMALL, "--cluster", dask.address)
    stopped, working = dask.start_workers(2)

    os.kill(stopped.pid, signal.SIGSTOP)  # it is given a unit, and never finishes it
    child = start(children, *command)
    wait_for(out, ".prepare/parts/??????.train")
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 130
    assert errors == "\npython -m jaxgpt.prepare: stopped; run the same command again to resume\n"

    before = finished_units(out)
    child = start(children, *command)
    wait_until(lambda: len(finished_units(out)) > len(before))
    dask.scheduler.kill()
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 2, errors
    assert f"prepare: --cluster {dask.address}: the scheduler is gone; start it" in errors
    assert len(errors.strip().splitlines()) == 1, errors
    before = finished_units(out)
    for worker in (stopped, working):
        worker.kill()

    dask = Dask(children, tmp_path)
    stopped, _ = dask.start_workers(2)
    os.kill(stopped.pid, signal.SIGSTOP)
    child = start(children, *command[:-1], dask.address)
    wait_until(lambda: len(finished_units(out)) > len(before))
    stopped.kill()
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert finished_units(out)[: len(before)] == before, "what was finished is not done again"
    assert contents(out) == contents(prepared)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense", "tcp://host", "a://b:1"])
def test_an_address_without_a_scheduler_is_refused(
    texts: Path,
    tmp_path: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("jaxgpt.preparation.cluster.CONNECT_SECONDS", 0.3)
    gc.disable()  # what is collected is so explicitly
    try:
        message = refusal(capsys, texts, "--out", tmp_path / "out", "--cluster", address)
        left = [item for item in gc.get_objects() if isinstance(item, Client)]
    finally:
        gc.enable()
    assert f"--cluster {address}: no scheduler answers (" in message
    assert not left, "freed while another client starts, it would deadlock"


def test_without_dask_the_command_that_installs_it_is_named(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    message = refusal(capsys, texts, "--out", tmp_path / "out", "--cluster", "tcp://a:1")
    assert "needs Dask; install it: pip install -e '.[cluster]'" in message
