"""Output of a running command: a live bar on a terminal, plain lines anywhere else.

User text is never printed as rich markup: a path may well contain [/b] or :cat:.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from jaxgpt.errors import discard


class OutputConsole(Console):
    """rich's, but a closed pipe raises BrokenPipeError, which `run_command` handles."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def make_console(stderr: bool = False) -> Console:
    """A console that prints text as it is; `is_terminal` is whether a bar can be drawn on it."""
    stream = sys.stderr if stderr else sys.stdout
    is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    # A notebook gives its commands a terminal, and keeps every state of a bar.
    in_notebook = "JPY_PARENT_PID" in os.environ
    is_terminal = stream is not None and stream.isatty() and not (is_dumb or in_notebook)
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    return OutputConsole(stderr=stderr, force_terminal=None if is_terminal else False, **plain)


def make_bar(console: Console, left: str) -> Progress:
    """A progress bar between `left` and the task's `status`; only on a terminal."""
    return Progress(
        TextColumn(left),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
        expand=True,
        refresh_per_second=2,  # rich's default of ten takes more than 1 % of a core
        disable=not console.is_terminal,
    )


class LiveConsole:
    """Prints lines, and keeps one bar below them if the output is a terminal."""

    def __init__(self, left: str, start: int, total: int, status: str):
        """`left` and `status` are on the two sides of the bar."""
        self.console, self._total = make_console(), total
        self._bar = make_bar(self.console, left)
        self._task = self._bar.add_task("", total=max(total, 1), completed=start, status=status)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop updating the bar and leave it on the screen."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, soft_wrap=True)


class Unfailing:
    """A stream that discards what it cannot write, and writes `?` for what it cannot encode."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Returns the length of `text`, as if all of it had been written."""
        encoding = self._stream.encoding or "utf-8"
        with suppress(OSError):
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def finish(self) -> None:
        """Discard what could not be written, or flushing it at exit would change the exit code."""
        try:
            self._stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                discard(self._stream.fileno())


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Inside, printing never fails: a long run must not end because a pipe or a terminal was
    closed, or the disk with its log is full.
    """
    out, err = (Unfailing(stream) if stream else None for stream in (sys.stdout, sys.stderr))
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        for stream in filter(None, (out, err)):
            stream.finish()


def waiting(text: str) -> AbstractContextManager[Any]:
    """Show a spinner with `text` until the context ends, if standard error is a terminal."""
    console = make_console(stderr=True)
    return console.status(Text(text)) if console.is_terminal else nullcontext()


def make_table(rows: dict[str, str]) -> Table:
    """Names and values in two columns."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def print_table(title: str, rows: dict[str, str]) -> None:
    """Print a title, then names and values in two columns."""
    console = make_console()
    # Not as the table's title, which rich wraps at the table's width, in the middle of a path.
    console.print(title, style="italic", soft_wrap=True)
    console.print(make_table(rows))


def counted(number: int, noun: str) -> str:
    """'1 shard', '2 shards'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """'42 s', '3:05 min', '7:12 h' or '3 d 4 h'."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60}:{s % 60:02} min"
    if s < 48 * 3600:
        return f"{s // 3600}:{s % 3600 // 60:02} h"
    return f"{s // 86400} d {s % 86400 // 3600} h"
