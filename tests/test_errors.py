"""How a command ends: its exit code and what it prints."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib

import msgspec
import pytest

from jaxgpt.errors import Stopped, UserError, first_line, run_command


def raising(error: BaseException):
    def command() -> int:
        raise error

    return command


def decoding(decode, *arguments):
    return lambda: decode(*arguments)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (raising(UserError("no such preset\nthere are: a, b")), "no such preset\n  there are: a"),
        (raising(MemoryError()), "out of memory; close other programs"),
        (raising(RuntimeError("RESOURCE_EXHAUSTED: 9 bytes")), "the device's memory is full: "),
        (raising(RuntimeError("can't start new thread")), "allows no more threads; raise the"),
        (raising(RecursionError("maximum recursion depth exceeded")), "cannot be decoded: maximum"),
        (decoding(b"\xff".decode), "cannot be decoded: 'utf-8' codec"),
        (decoding(json.loads, "{"), "cannot be decoded: Expecting"),
        (decoding(tomllib.loads, "="), "cannot be decoded: Invalid"),
        (decoding(lambda: msgspec.convert("x", int)), "cannot be decoded: Expected `int`"),
        (decoding("\ud800".encode), "cannot be encoded: 'utf-8' codec"),
        (decoding(open, "/no/such/file"), "/no/such/file: No such file or directory; fix that and"),
        (raising(OSError(28, "No space left on device")), "No space left on device; fix that"),
        (raising(BrokenPipeError(32, "Broken pipe")), "Broken pipe; fix that"),  # not our output's
    ],
)
def test_what_a_user_can_cause_is_a_sentence(capsys, command, message) -> None:
    with pytest.raises(SystemExit) as left:
        run_command("prog", command)
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert err.startswith("prog: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("x"), KeyError("k"), OSError("by a library"), BaseException("a panic")),
        FileNotFoundError("of a library, with the current folder in place"),
    ],
)
def test_a_bug_is_a_traceback_and_a_request_to_report_it(capsys, error) -> None:
    assert run_command("prog", raising(error)) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("prog: this is a bug in jaxgpt; please report it with the lines above\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped(signal.SIGTERM), 143, "interrupted"),
        (Stopped(signal.SIGINT, "stopped; run it again"), 130, "stopped; run it again"),
    ],
)
def test_an_interrupted_command_returns_128_and_the_signal(capsys, error, code, message) -> None:
    assert run_command("prog", raising(error)) == code
    assert capsys.readouterr().err == f"\nprog: {message}\n"


def test_what_a_command_returns_and_its_own_exit_are_passed_on(capsys) -> None:
    assert run_command("prog", lambda: 0) == 0
    with pytest.raises(SystemExit) as left:
        run_command("prog", raising(SystemExit(7)))
    assert left.value.code == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("count", [1, 10_000])
def test_a_reader_that_leaves_is_no_error(monkeypatch, count: int) -> None:
    """Neither if a print fails, nor if the output is still in the buffer at the end."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    code = f"""
import sys
from jaxgpt.errors import run_command
def command():
    sys.stdin.read()
    for _ in range({count}):
        print("x" * 99)
    return 0
sys.exit(run_command("prog", command))
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (0, b"")


def test_the_first_line_of_an_error_is_short_and_never_empty() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError("x" * 300)) == "x" * 200
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_that_the_output_cannot_encode_is_printed_without_it(encoding: str) -> None:
    code = """
import sys
from jaxgpt.errors import run_command
sys.exit(run_command("prog", lambda: print("caf\\udce9 \\u00e9")))
"""
    env = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    shown = {"utf-8": "caf? é\n", "ascii": "caf? ?\n"}[encoding]
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, shown, b"")


def test_a_closed_standard_stream_is_the_null_device_and_its_number_is_no_files() -> None:
    code = """
import os, sys
from jaxgpt.errors import run_command
def command():
    print("x")
    sys.stderr.write("y")
    return 0 if os.open(os.devnull, os.O_RDONLY) > 2 and sys.stdin.read() == "" else 3
sys.exit(run_command("prog", command))
"""
    shell = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(shell, env=env).returncode == 0


def test_a_deleted_current_folder_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(SystemExit):
        run_command("prog", decoding(os.getcwd))
    assert "prog: the current folder has been deleted; change to" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command("prog", raising(UserError("runs: no such folder")))
    assert "the current folder has been deleted; change to" in capsys.readouterr().err


SWALLOWING = """
import os, signal, sys, time
from jaxgpt.errors import make_main, raise_on_ctrl_c

def run(argv):
    if "raise" in sys.argv:
        raise_on_ctrl_c()
    print("ready", flush=True)
    print("the last line")
    try:
        time.sleep(30)
    except KeyboardInterrupt:
        return 7
    return 0

sys.exit(make_main("prog", run, read_only="writes" not in sys.argv)())
"""


@pytest.mark.parametrize(("words", "code"), [((), 130), (("raise",), 7), (("writes",), 7)])
def test_ctrl_c_ends_a_command_that_only_reads_whatever_catches_it(words, code, children) -> None:
    command = [sys.executable, "-c", SWALLOWING, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, **pipes)
    children.append(child)
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.3)  # it prints the last line
    child.send_signal(signal.SIGINT)
    assert child.wait(20) == code
    assert child.stdout.read() == "the last line\n"
    assert ("prog: interrupted" in child.stderr.read()) == (code == 130)
