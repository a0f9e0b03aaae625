"""The one kind of error that is a user's to mend: commands print it and leave with exit code 2."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """The message names the thing, the reason and the remedy; no traceback is shown."""


@contextmanager
def out_of_memory_in_words(remedy: Callable[[], str]) -> Iterator[None]:
    """Turns XLA's pages on a full device into a sentence, followed by what `remedy` says.

    Raises:
        UserError: in place of XLA's error.
    """
    try:
        yield
    except RuntimeError as fault:  # XLA's is one of these
        if "RESOURCE_EXHAUSTED" not in str(fault):
            raise
        line = str(fault).strip().splitlines()[0][:200]
        raise UserError(f"the device's memory is full: {line}\n{remedy()}") from None
