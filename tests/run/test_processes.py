"""Several processes as one run: real ones, over loopback, with two CPU devices each."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.runs import SMALL, last_params, losses, train

from jaxgpt.data.token_file import write_shard
from jaxgpt.errors import UserError
from jaxgpt.files import FolderLock
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.integrity import verify
from jaxgpt.run.metrics_file import read_metrics
from jaxgpt.run.processes import (
    SINGLE_PROCESS,
    Address,
    Processes,
    StepRequests,
    StepSync,
    connect,
    is_lost_connection,
)
from jaxgpt.run.retention import finished_steps

COUNT = 2
# Four devices hold one window each; the effective batch of 8 is that of test_train's runs.
FLAGS = [*SMALL, "--batch-size", "1", "--num-processes", str(COUNT)]
ENDLESS = ("--max-iters", "100000", "--eval-interval", "100000", "--lr-decay-iters", "100000")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


class Pair:
    """Two processes that train in `out_dir`; killed at the end if they are still there."""

    def __init__(self, out_dir: Path, *flags: str):
        self.out_dir = out_dir
        address = ("--coordinator-address", f"127.0.0.1:{free_port()}")
        env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        command = [sys.executable, "-m", "jaxgpt.train", *FLAGS, *address, *flags]
        self.processes = [
            subprocess.Popen(
                [*command, "--out-dir", str(out_dir), "--process-id", str(i)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=env,
            )
            for i in range(COUNT)
        ]

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 400
        log = self.out_dir / "metrics.jsonl"
        while time.monotonic() < deadline:
            if log.exists() and any(r["step"] >= step for r in read_metrics(log)):
                return
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.1)
        raise AssertionError(f"step {step} was not reached")

    def end(self) -> tuple[list[int], list[str]]:
        """Exit codes and outputs."""
        outputs = [process.communicate(timeout=400)[0] for process in self.processes]
        return [process.returncode for process in self.processes], outputs


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> list[str]:
    """Two sources, whose second stage begins after step 9."""
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "val"):
        write_shard(folder / f"x_{split}_000000.bin", 48 + np.arange(2000) % 10)
    return ["--dataset", f"embedded:3,{folder}:1", "--mixture-at", "9", f"{folder}:3,embedded:1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, mixture) -> Path:
    """Ten steps on one device."""
    out_dir = tmp_path_factory.mktemp("runs") / "alone"
    assert train(out_dir, *mixture, "--max-iters", "10") == 0
    return out_dir


def assert_same_curve(out_dir: Path, alone: Path) -> None:
    got, expected = (np.array(list(losses(d).values()), float) for d in (out_dir, alone))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4", "data=2,fsdp=2"])
def test_two_processes_are_one_run_and_any_number_goes_on_with_it(
    tmp_path, mixture, alone, mesh
) -> None:
    out_dir = tmp_path / "run"
    flags = [*mixture, "--mesh", mesh, "--max-iters", "8", "--lr-decay-iters", "10"]
    with Pair(out_dir, *flags) as pair:
        codes, outputs = pair.end()
    assert codes == [0, 0], "\n".join(outputs)
    assert "= batch_size 1 x 4 devices x 2 accumulated" in outputs[0]
    assert "Done: 8 steps" in outputs[0]
    assert "step" not in outputs[1]  # one process speaks
    checkpoints = out_dir / "checkpoints"
    assert finished_steps(checkpoints)[-1] == 8
    files = verify(checkpoints / "8").files
    assert {name.split("/")[1] for name in files if "ocdbt" in name} >= {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    assert train(out_dir, *mixture, "--max-iters", "10") == 0  # on one device
    assert_same_curve(out_dir, alone)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_on_all_and_they_go_on(tmp_path) -> None:
    with Pair(tmp_path, "--mesh", "fsdp=4", *ENDLESS) as pair:
        pair.wait_for_step(5)
        pair.processes[1].send_signal(signal.SIGUSR1)
        pair.processes[1].send_signal(signal.SIGTERM)
        codes, outputs = pair.end()
    assert codes == [0, 0], "\n".join(outputs)
    stopped = int(re.search(r"SIGTERM: saved step ([\d,]+)", outputs[0])[1].replace(",", ""))
    assert finished_steps(tmp_path / "checkpoints")[-1] == stopped
    more = ("--max-iters", str(stopped + 3), "--lr-decay-iters", "100000")
    with Pair(tmp_path, *more, "--eval-interval", "100000") as pair:  # over data
        codes, outputs = pair.end()
    assert codes == [0, 0], "\n".join(outputs)
    assert f"from step {stopped:,} to step {stopped + 3:,}" in " ".join(outputs[0].split())
    assert list(losses(tmp_path)) == list(range(stopped + 4))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_is_killed_the_other_leaves_and_the_run_goes_on(tmp_path, killed) -> None:
    with Pair(tmp_path, *ENDLESS) as pair:
        pair.wait_for_step(3)
        pair.processes[killed].kill()
        since = time.monotonic()
        codes, _ = pair.end()
        assert time.monotonic() - since < 60
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] != 0
    assert train(tmp_path, "--max-iters", "2", "--eval-interval", "100000") == 0
    assert last_params(tmp_path)


AGREE = """
import sys
from jaxgpt.run.device import import_jax
from jaxgpt.run.processes import Address, connect

me = int(sys.argv[2])
with connect(Address(sys.argv[1], 2, me), import_jax, int) as processes:
    smallest = [processes.min_over_processes(x) for x in (70 * 2**30 + me, None if me else 1)]
    print(*smallest, processes.any_process(me))
    print(processes.broadcast_from_main(7 if me == 0 else None))
"""


@pytest.mark.slow
def test_a_folder_in_use_is_said_by_both_processes_and_neither_is_aborted(tmp_path) -> None:
    with FolderLock(tmp_path / "run", "--out-dir") as lock:
        lock.take()
        with Pair(tmp_path / "run", "--max-iters", "10") as pair:
            codes, outputs = pair.end()
    assert codes == [2, 2], outputs
    for output in outputs:
        assert f"run is in use by process {os.getpid()} on " in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_collectives_return_the_same_in_every_process() -> None:
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen([sys.executable, "-c", AGREE, address, str(i)], stdout=subprocess.PIPE)
        for i in range(COUNT)
    ]
    said = [process.communicate(timeout=200)[0].decode() for process in started]
    for text in said:  # after what Gloo says of its connections
        assert text.splitlines()[-2:] == [f"{70 * 2**30} None True", "7"], text


# ---------------------------------------------------------------- who is there


@pytest.fixture
def no_launcher(monkeypatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "JOB_COMPLETION", "JAX_")):
            monkeypatch.delenv(name)


def no_import() -> None:
    pytest.fail("imported")


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize(
    ("address", "answer"),
    [
        (Address("host:1", None, 0), "must be given together"),
        (Address("host", 2, 0), "--coordinator-address host must be HOST:PORT"),
        (Address("host:0", 2, 0), "host:0: a port is a number from 1 to 65535"),
        (Address("host:100000", 2, 0), "host:100000: a port is a number from 1 to 65535"),
        (Address("host:1", 2, 2), "--process-id 2 must be at least 0 and below --num-processes 2"),
        (Address("host:1", 0, 0), "--num-processes 0 must be at least 1"),
        (Address("no.such.invalid:1", 2, 1), "no machine of that name is known here"),
        (Address("a..b:1", 2, 1), "no machine of that name is known here"),
    ],
)
def test_an_address_that_cannot_be_is_refused_before_jax_is_imported(address, answer) -> None:
    with pytest.raises(UserError, match=re.escape(answer)):
        connect(address, no_import, no_import)


@pytest.mark.usefixtures("no_launcher")
def test_an_address_of_another_run_is_refused_by_the_process_that_would_listen_there() -> None:
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="its port is in use here"):
            connect(Address(address, 2, 0), no_import, no_import)
        assert connect(Address(address, 2, 1), fake_jax, no_import).count == 2


@pytest.mark.usefixtures("no_launcher")
def test_a_single_process_needs_no_exchange_and_no_import() -> None:
    assert connect(Address(), no_import, no_import) is SINGLE_PROCESS
    sync = StepSync(SINGLE_PROCESS, layout=None)
    assert sync.exchange("SIGTERM", save=False) == StepRequests("SIGTERM", False)
    assert sync.exchange(None, save=True, now=True) == StepRequests(None, True)
    assert SINGLE_PROCESS.broadcast_from_main(3) == 3
    assert SINGLE_PROCESS.min_over_processes(None) is None
    with pytest.raises(OSError, match="full"), SINGLE_PROCESS.fail_together():
        raise OSError("full")


def test_a_process_that_did_not_fail_itself_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Processes, "any_process", lambda *_: True)  # the main one fails
    with pytest.raises(UserError, match=r"^another process of the run has failed"):
        Checkpoints(tmp_path, 1, processes=Processes(1, 2)).recover(print)


@pytest.mark.usefixtures("no_launcher")
def test_one_of_many_that_a_launcher_started_may_be_a_run_of_its_own(monkeypatch) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert connect(Address(num_processes=1), no_import, no_import) is SINGLE_PROCESS


def fake_jax(**calls: Any) -> SimpleNamespace:
    """A JAX that connects to no one: `initialize` records its arguments, or raises `error`."""

    def initialize(**arguments: object) -> None:
        calls["arguments"] = arguments
        if "error" in calls:
            raise calls["error"]

    return SimpleNamespace(
        config=SimpleNamespace(update=lambda *_: None),
        distributed=SimpleNamespace(initialize=initialize),
        process_index=lambda: 1,
        process_count=lambda: 2,
        calls=calls,
    )


SLURM_STEP = {
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.mark.usefixtures("no_launcher")
def test_jax_gets_the_cards_that_a_process_uses(monkeypatch) -> None:
    jax = fake_jax()
    connect(Address("localhost:1", 2, 1), lambda: jax, no_import)
    # Or it would look at the variables of the shell in which the process was started by hand.
    assert jax.calls["arguments"]["cluster_detection_method"] == "deactivate"
    for name, value in SLURM_STEP.items():
        monkeypatch.setenv(name, value)
    joined = connect(Address(), lambda: jax, lambda: 8)
    assert (joined.index, joined.count) == (1, 2)
    assert jax.calls["arguments"]["local_device_ids"] == ()  # all eight, where JAX would take one
    assert jax.calls["arguments"]["cluster_detection_method"] is None
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "3")
    connect(Address(), lambda: jax, lambda: 8)
    assert jax.calls["arguments"]["local_device_ids"] is None


@pytest.mark.usefixtures("no_launcher")
def test_a_process_whose_peer_has_exited_gets_a_sentence() -> None:
    def lost() -> int:
        raise RuntimeError("UNAVAILABLE: Connection reset by peer")

    jax = fake_jax()
    jax.process_index = lost
    with pytest.raises(UserError, match=r"cannot connect .*reset by peer"):
        connect(Address("localhost:1", 2, 1), lambda: jax, no_import)


@pytest.mark.usefixtures("no_launcher")
def test_processes_that_cannot_meet_are_told_what_their_launcher_needs(monkeypatch) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    jax = fake_jax(error=ValueError("coordinator_address should be defined."))
    with pytest.raises(UserError, match="pip install kubernetes; or use --num-processes 1"):
        connect(Address(), lambda: jax, lambda: 0)


def test_a_lost_connection_is_told_from_other_errors() -> None:
    gone = RuntimeError("FAILED_PRECONDITION: Gloo all-reduce: Connection closed by peer")
    assert is_lost_connection(gone)
    assert not is_lost_connection(RuntimeError("INTERNAL: a bug"))
    assert not is_lost_connection(UserError("Connection refused"))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("Gloo: Connection closed"), 2, "another process of the run has died or"),
        (UserError("no such mesh"), 2, "no such mesh\n"),
        (OSError(28, "No space left on device"), 2, "No space left on device; fix that"),
        (KeyError("k"), 1, "this is a bug in jaxgpt"),
    ],
)
def test_a_process_of_several_exits_at_once_after_an_error(
    monkeypatch, capsys, error, code, message
) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left, Processes(1, 2):
        raise error
    assert left.value.code == code
    assert f"process 1 of 2: {message}" in capsys.readouterr().err
