"""Errors of users and of ours, and the one way in which every command ends with them.

Exit codes: 0 done; 2 something for the user to fix, said in a sentence; 1 a bug of ours, with its
traceback; 130 interrupted by Ctrl-C.
"""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

BUG, USER_ERROR, INTERRUPTED = 1, 2, 130


class UserError(ValueError):
    """Something for the user to fix: the message names the thing, the reason and the remedy."""


def run_command(prog: str, command: Callable[[], int]) -> int:
    """Run a whole command and return its exit code.

    What a user can cause leaves the process with exit code 2 and a sentence on standard error.

    Raises:
        SystemExit: with code 2 or 130.
    """
    try:
        return command()
    except UserError as error:
        fail(prog, str(error))
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        fail(prog, "interrupted", INTERRUPTED)
    except MemoryError:
        fail(prog, "this machine's memory is full; close other programs, or ask for less at a time")
    except OSError as error:
        if error.strerror is None:
            return report_bug(prog, error)
        where = f"{error.filename}: " if error.filename else ""
        fail(prog, f"{where}{error.strerror}; fix that and run the same command again")
    except Exception as error:
        return report_bug(prog, error)


def report_bug(prog: str, error: BaseException) -> int:
    """Print the traceback of an error that is ours, and ask for a report; returns the exit code."""
    traceback.print_exception(error)
    print(
        f"{prog}: this is a bug in jaxgpt; please report it with the lines above", file=sys.stderr
    )
    return BUG


def fail(prog: str, message: str, code: int = USER_ERROR) -> NoReturn:
    """Print one plain message to standard error and leave with `code`."""
    print(f"{prog}: {message}".replace("\n", "\n  "), file=sys.stderr)
    sys.exit(code)


def warn(message: str) -> None:
    """Print a line to standard error and go on."""
    print(message, file=sys.stderr, flush=True)


def first_line(error: BaseException, limit: int = 200) -> str:
    """What an error says in one line of at most `limit` characters; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


@contextmanager
def explain_out_of_memory(remedy: Callable[[], str]) -> Iterator[None]:
    """Turn XLA's error of a full device into a sentence, followed by what `remedy` says.

    Raises:
        UserError: in place of XLA's error.
    """
    try:
        yield
    except RuntimeError as error:  # XLA's is one of these
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device's memory is full: {first_line(error)}\n{remedy()}") from None
