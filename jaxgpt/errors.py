"""User errors and bugs, and how every command ends on them.

Exit codes: 0 done; 2 an error that the user can fix, explained in a sentence; 1 a bug, with its
traceback; 130 interrupted by Ctrl-C (128 and the signal's number).
"""

import json
import os
import select
import signal
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

import msgspec

NO_CURRENT_FOLDER = "the current folder has been deleted; change to another one"
BUG, USER_ERROR, INTERRUPTED = 1, 2, 130
DECODE_ERRORS = (
    *(UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError, msgspec.DecodeError),
    RecursionError,  # raised by parsers for input that is nested too deeply
)


class UserError(ValueError):
    """Something for the user to fix: the message names the thing, the reason and the remedy."""


class Stopped(KeyboardInterrupt):
    """A signal ended the command; raise it from the signal's handler."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number


def run_command(prog: str, command: Callable[[], int]) -> int:
    """Run a whole command, `prog`, and return its exit code; every `main` goes through it.

    A closed pipe, as in `| head`, is no error; all other errors go to `report_error`. What the
    output cannot encode, a name that is not UTF-8 for instance, is printed as question marks. A
    closed standard stream becomes the null device.

    Raises:
        SystemExit: with code 2, for an error that a user can cause.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = command()
        if sys.stdout is not None:
            sys.stdout.flush()  # otherwise Python does at exit, where nothing catches an error
        return code
    except SystemExit:
        raise
    except BaseException as error:  # the panics of libraries in Rust are no Exception
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return 0
        code = report_error(prog, error)
        if code == USER_ERROR:
            sys.exit(code)
        return code


def make_main(
    prog: str, run: Callable[[Sequence[str]], int], *, read_only: bool = False
) -> Callable[..., int]:
    """The `main` of a command: `run(argv)`, by default with the process's own arguments.

    `read_only`: the command writes nothing that must be complete, so that Ctrl-C may end its
    process at once.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        if read_only and argv is None:
            _exit_on_ctrl_c(prog)
        return run_command(prog, lambda: run(sys.argv[1:] if argv is None else argv))

    return main


def _exit_on_ctrl_c(prog: str) -> None:
    """Have Ctrl-C end the process at once, until `raise_on_ctrl_c`.

    A KeyboardInterrupt can be swallowed in an import or a callback, be reported as another error,
    and leave Orbax's threads to wait forever or to crash at exit.
    """

    def leave(*_: object) -> NoReturn:
        with suppress(Exception):  # the signal may have interrupted such a call
            sys.stdout.flush()
        with suppress(OSError):
            os.write(2, f"\n{prog}: interrupted\n".encode())
        os._exit(128 + signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def raise_on_ctrl_c() -> None:
    """Have Ctrl-C raise KeyboardInterrupt, unless it is ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _open_closed_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:  # the next file would get the number, and what libraries print there
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # for workers, too
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


def report_error(prog: str, error: BaseException) -> int:
    """Print a sentence, or the traceback of a bug, to standard error; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        # On a new line: the terminal has just shown ^C, or the current line is unfinished.
        print(f"\n{prog}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    message = _explain(error)
    if message is None:
        traceback.print_exception(error)
        message = "this is a bug in jaxgpt; please report it with the lines above"
        print(f"{prog}: {message}", file=sys.stderr)
        return BUG
    _print_message(prog, message)
    return USER_ERROR


def _explain(error: BaseException) -> str | None:
    """Thing, reason and remedy of an error that a user can cause; None for any other."""
    if isinstance(error, UserError):
        return str(error) if _current_folder_exists() else f"{error}\n{NO_CURRENT_FOLDER}"
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or process less at a time"
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return "the system allows no more threads; raise the limit (ulimit -u), or free memory"
    if device_is_full(error):
        return f"the device's memory is full: {first_line(error)}; close other programs that use it"
    if isinstance(error, DECODE_ERRORS):
        return f"input cannot be decoded: {first_line(error)}; check the input files"
    if isinstance(error, UnicodeEncodeError):
        return f"output cannot be encoded: {first_line(error)}; set PYTHONIOENCODING=utf-8"
    if isinstance(error, FileNotFoundError) and not _current_folder_exists():
        return NO_CURRENT_FOLDER
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; fix that and run the same command again"
    return None


def _current_folder_exists() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _reader_has_left() -> bool:
    """Whether standard output is a pipe without a reader; if so, the rest of it is discarded."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError):  # there is none
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    discard(output)
    return True


def discard(descriptor: int) -> None:
    """Redirect a descriptor to the null device, so that flushing it at exit cannot fail."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)


def fail(prog: str, message: str) -> NoReturn:
    """Print a message to standard error and exit with code 2."""
    _print_message(prog, message)
    sys.exit(USER_ERROR)


def _print_message(prog: str, message: str) -> None:
    print(f"{prog}: {message}".replace("\n", "\n  "), file=sys.stderr)


def warn(message: str) -> None:
    """Print a line to standard error and continue."""
    print(message, file=sys.stderr, flush=True)


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, at most `limit` characters; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def first_few(names: Iterable[str]) -> str:
    """At most eight of the names, shortened, and how many more there are; 'none' if none."""
    found = [name if len(name) <= 40 else f"{name[:37]}..." for name in names]
    more = f" and {len(found) - 8:,} more" if len(found) > 8 else ""
    return ", ".join(found[:8]) + more or "none"


def device_is_full(error: BaseException) -> bool:
    """Whether this is XLA's out-of-memory error."""
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextmanager
def explain_out_of_memory(remedy: Callable[[], str]) -> Iterator[None]:
    """Turn XLA's out-of-memory error into a sentence that ends with `remedy()`.

    Raises:
        UserError: in place of XLA's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not device_is_full(error):
            raise
        raise UserError(f"the device's memory is full: {first_line(error)}\n{remedy()}") from None
