"""Two processes as one run: real ones, over loopback, with two CPU devices each."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import SMALL, last_params, losses, train
from msgspec.structs import replace

from jaxgpt.data.token_file import write_shard
from jaxgpt.files import FolderLock
from jaxgpt.run.integrity import read_manifest, verify, write_manifest
from jaxgpt.run.metrics_file import read_metrics
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


@pytest.mark.slow
def test_a_checkpoint_that_holds_another_step_costs_only_itself(tmp_path) -> None:
    assert train(tmp_path, "--max-iters", "8") == 0
    newest, older = tmp_path / "checkpoints" / "8", tmp_path / "checkpoints" / "4"
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    write_manifest(newest, replace(read_manifest(older), step=None))
    with Pair(tmp_path, "--max-iters", "8") as pair:
        codes, outputs = pair.end()
    assert codes == [0, 0], "\n".join(outputs)
    assert "checkpoint 8 is damaged and was renamed to 8.damaged: " in outputs[0]
    assert finished_steps(newest.parent) == [4, 8]


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
