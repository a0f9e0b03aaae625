"""Progress of a preparation: a bar on a terminal, a line from time to time elsewhere."""

import time
from typing import Self

from rich.filesize import decimal

from jaxgpt.run.console import duration, make_bar, make_console

LINE_SECONDS = 30  # between two lines if the output is not a terminal


class PreparationConsole:
    """Prints lines, with one bar below them if the output is a terminal."""

    def __init__(self, total_bytes: int, done_bytes: int):
        self.console = make_console()
        self._total, self.done_before = total_bytes, done_bytes
        self._began = self._last_line = time.monotonic()
        self._bar = make_bar(self.console, "{task.percentage:3.0f} %")
        self._task = self._bar.add_task(
            "prepare", total=max(total_bytes, 1), completed=done_bytes, status="starting"
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done_bytes: int, tokens: int, documents: int, note: str = "") -> None:
        """Show the bytes of input done, and the tokens and documents made by this process."""
        status = self._status(done_bytes, tokens, documents) + (f" · {note}" if note else "")
        self._bar.update(self._task, completed=min(done_bytes, self._total), status=status)
        if not self.console.is_terminal and time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(status)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, soft_wrap=True)

    def _status(self, done_bytes: int, tokens: int, documents: int) -> str:
        elapsed = max(time.monotonic() - self._began, 1e-6)
        bytes_left = max(self._total - done_bytes, 0)
        parts = [f"{decimal(bytes_left)} left"]
        if tokens:  # short, to fit into 80 columns
            made = f"{tokens / 1e6:,.1f}M tokens ({tokens / elapsed / 1e6:.2f}M/s)"
            parts = [made, f"{documents:,} documents", *parts]
        speed = (done_bytes - self.done_before) / elapsed
        if speed > 0 and elapsed > 1:
            parts.append(f"{duration(bytes_left / speed)} to go")
        return " · ".join(parts)
