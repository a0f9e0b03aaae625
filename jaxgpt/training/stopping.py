"""Asked to stop: SIGTERM and the first Ctrl-C set a flag that the loop reads between steps."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, `name` is None until the process is asked to stop, then the signal's name.

    The first signal puts the old handlers back, so a second Ctrl-C ends the process at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self._put_back()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
