"""Who the processes of a run are, and what they say when they cannot meet or one has failed."""

import os
import re
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from jaxgpt.errors import UserError
from jaxgpt.files import LockedError
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.processes import (
    SINGLE_PROCESS,
    Address,
    Processes,
    StepRequests,
    StepSync,
    connect,
    is_lost_connection,
)

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


def test_a_folder_that_another_run_has_taken_ends_the_run_on_every_process(monkeypatch) -> None:
    for taken, kind in ((True, LockedError), (False, UserError)):
        answers = iter([True, taken])  # another process has failed, because the folder is taken
        monkeypatch.setattr(Processes, "any_process", lambda *_, a=answers: next(a))
        with pytest.raises(UserError) as raised, Processes(1, 2).fail_together():
            pass
        assert type(raised.value) is kind


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
