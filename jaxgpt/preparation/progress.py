"""Progress of a preparation: a bar on a terminal, a line from time to time elsewhere."""

import time

from rich.filesize import decimal

from jaxgpt.run.console import LiveConsole, duration

LINE_SECONDS = 30  # between two lines if the output is not a terminal


class PreparationConsole(LiveConsole):
    """The progress of a preparation, in bytes of its input."""

    def __init__(self, total_bytes: int, done_bytes: int):
        super().__init__("{task.percentage:3.0f} %", done_bytes, total_bytes, "starting")
        self.done_before = self._done = done_bytes
        self._began = self._last_line = time.monotonic()

    def advance(self, n_bytes: int) -> None:
        """Show that so many more bytes are done."""
        self.update(self._done + n_bytes, 0, 0)

    def update(self, done_bytes: int, tokens: int, documents: int, note: str = "") -> None:
        """Show the bytes of input done, and the tokens and documents made by this process."""
        self._done = done_bytes
        status = self._status(done_bytes, tokens, documents) + (f" · {note}" if note else "")
        self._bar.update(self._task, completed=min(done_bytes, self._total), status=status)
        if not self.console.is_terminal and time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(status)

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
