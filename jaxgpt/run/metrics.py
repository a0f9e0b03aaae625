"""The run's numbers on disk: one JSON object a line in metrics.jsonl, and curves for TensorBoard.

Both are append-only, and a resumed run first takes out whatever lies after the checkpoint it
starts from, so that no step is in them twice. A number that is not finite is `null` in
metrics.jsonl (strict JSON knows no NaN) and keeps its value in the event files.

Writing here never stops a run: a full disk is reported once, what could not be written waits in
memory (some 300 bytes a record) and goes out with the first call that finds room. That, and
`flush` meaning fsync, is why tensorboardX gives us its protocol buffers but not its SummaryWriter:
an error ends its writer thread unseen, and after ten more events `add_scalar` waits for ever.
"""

import json
import logging
import math
import os
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxgpt.errors import UserError
from jaxgpt.run.metrics_file import EVENTS_FOLDER, METRICS_FILE, parse_record
from jaxgpt.run.tensorboard_events import as_record, event_files, merged, next_name, whole_records

# It has a word to say about every NaN, and a run has said that already.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


class MetricsLog:
    """Writes a run's metrics: `with MetricsLog(out_dir, resume_step) as log: ...`

    Every call hands its record to the operating system at once, so that a killed process loses
    nothing; `flush` makes it outlive a power failure too.
    """

    def __init__(
        self,
        out_dir: Path,
        resume_step: int | None = None,
        on_error: Callable[[str], object] = warnings.warn,
    ) -> None:
        """Opens the log of a new run, or of one that goes on after step `resume_step`.

        Args:
            out_dir: the run's folder; made if missing.
            resume_step: step of the checkpoint to continue from: records of that step and before
                stay, later ones are removed. None is a new run's, which takes out what one that
                died before its first checkpoint has left.
            on_error: told, once, that metrics cannot be written.

        Raises:
            UserError: if the run is new and the folder has metrics of steps that were taken: those
                of a run whose checkpoints are gone, or of another program.
        """
        self._on_error = on_error
        self._told = False
        self._has_hparams = False
        lines, folder = out_dir / METRICS_FILE, out_dir / EVENTS_FOLDER
        if resume_step is None:
            _refuse_foreign(lines, folder)
        last_step = -1 if resume_step is None else resume_step
        self._softly(_cut_lines, lines, last_step)
        for path in event_files(folder):
            self._softly(self._cut_events, path, last_step)
        self._lines = _Appender(lines)
        self._events = _Appender(folder / next_name(event_files(folder)))
        self._add_event(0, time.time(), file_version="brain.Event:2")
        # Each start but the first has a TensorBoard that is already open forget what was removed.
        start = SessionLog(status=SessionLog.START)
        self._add_event(last_step + 1, time.time(), session_log=start)
        self._drain()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records the numbers of one step: {'train/loss': 3.1, ...}."""
        now = time.time()
        numbers = {tag: float(value) for tag, value in values.items()}
        finite = {tag: x if math.isfinite(x) else None for tag, x in numbers.items()}
        self._add_line(step, now, finite)
        self._add_event(step, now, summary=merged(summary.scalar(*n) for n in numbers.items()))
        self._drain()

    def text(self, step: int, tag: str, text: str) -> None:
        """Shows a text, such as a generated sample, in TensorBoard only, unformatted."""
        now = time.time()
        code_block = textwrap.indent(_as_utf8(text), "    ")
        self._add_event(step, now, summary=summary.text(tag, code_block))
        self._drain()

    def hparams(self, values: Mapping[str, Any], metrics: tuple[str, ...] = ()) -> None:
        """Records the configuration for TensorBoard's HPARAMS tab, once a run: later calls pass.

        Args:
            values: the configuration; sections (dicts) become 'section.name'.
            metrics: tags of the scalars to compare runs by, such as 'val/loss'.
        """
        if self._has_hparams:
            return
        self._has_hparams = True
        # The library's add_hparams would put them into a run of their own, in a folder below.
        parts = summary.hparams(_flatten(values), dict.fromkeys(metrics, 0.0))
        self._add_event(0, time.time(), summary=merged(parts))
        self._drain()

    def flush(self) -> bool:
        """Puts everything on disk for good; False (and no exception) if that failed."""
        return all([self._softly(self._lines.sync), self._softly(self._events.sync)])

    def close(self) -> None:
        """Flushes and lets go of the files."""
        self.flush()
        self._lines.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_line(self, step: int, now: float, values: Mapping[str, Any]) -> None:
        assert not {"step", "time"} & values.keys()
        line = json.dumps({"step": int(step), "time": round(now, 3), **values}, allow_nan=False)
        self._lines.pending += line.encode() + b"\n"

    def _add_event(self, step: int, now: float, **what: Any) -> None:
        event = Event(step=int(step), wall_time=now, **what)
        self._events.pending += as_record(event.SerializeToString())

    def _drain(self) -> None:
        self._softly(self._lines.drain)
        self._softly(self._events.drain)

    def _softly(self, write: Callable[..., None], *args: object) -> bool:
        try:
            write(*args)
        except OSError as error:
            if not self._told:
                self._told = True
                self._on_error(f"metrics cannot be written, training goes on: {error}")
            return False
        return True

    def _cut_events(self, path: Path, last_step: int) -> None:
        """Keeps what lies not after `last_step`; headers and hparams are of step 0."""
        data = path.read_bytes()
        events = [(record, Event.FromString(record)) for record in whole_records(data)]
        kept = [(record, event) for record, event in events if event.step <= last_step]
        tags = [value.tag for _, event in kept for value in event.summary.value]
        self._has_hparams |= any(tag.startswith("_hparams_/") for tag in tags)
        _replace(path, data, b"".join(as_record(record) for record, _ in kept))


class NoLog(MetricsLog):
    """For a process of several that logs nothing."""

    def __init__(self) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing, as the methods below."""

    def text(self, step: int, tag: str, text: str) -> None: ...

    def hparams(self, values: Mapping[str, Any], metrics: tuple[str, ...] = ()) -> None: ...

    def flush(self) -> bool:
        return True

    def close(self) -> None: ...


class _Appender:
    """Appends what is `pending` to a file, all or nothing, or raises OSError and keeps it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending = bytearray()
        self.file: int | None = None

    def drain(self) -> None:
        """Hands what is pending to the operating system; a failure leaves no half of a record."""
        if self.file is not None and not os.fstat(self.file).st_nlink:
            self.close()  # somebody deleted it, and nobody could read what it is given
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self.file).st_size
        done = 0
        try:
            while done < len(self.pending):
                done += os.write(self.file, self.pending[done:])
        except OSError:
            os.ftruncate(self.file, size)
            raise
        self.pending.clear()

    def sync(self) -> None:
        """Drains, and returns once the disk has it."""
        self.drain()
        assert self.file is not None
        os.fsync(self.file)

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


def _refuse_foreign(lines: Path, folder: Path) -> None:
    try:
        data = lines.read_bytes() if lines.exists() else b""
        # The last line may be torn; any other that is no record of step 0 is somebody's work.
        whole = [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
        records = [parse_record(line) for line in whole]
        files = [path.read_bytes() for path in event_files(folder)]
        events = [Event.FromString(record) for data in files for record in whole_records(data)]
    except OSError as error:
        raise UserError(f"{error}; move it away, or choose another --out-dir") from None
    if any(
        record is None or record["step"] > 0
        for record in records + [{"step": e.step} for e in events]
    ):
        raise UserError(
            f"{lines.parent} has metrics of steps that were taken, and no checkpoint to go on "
            f"from; move {METRICS_FILE} and {EVENTS_FOLDER}/ away, or choose another --out-dir"
        )


def _cut_lines(path: Path, last_step: int) -> None:
    data = path.read_bytes() if path.exists() else b""
    parsed = [(line, parse_record(line)) for line in data.splitlines()]
    kept = [line + b"\n" for line, record in parsed if record and record["step"] <= last_step]
    _replace(path, data, b"".join(kept))


def _replace(path: Path, old: bytes, new: bytes) -> None:
    """Rewrites a file in one motion: after a crash it is the old or the new, nothing between."""
    if new == old:
        return
    # The name must be none that TensorBoard reads: it takes all with 'tfevents' in them.
    temporary = path.parent / "rewriting.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if not new:
        path.unlink()


def _as_utf8(text: str) -> str:
    """`text` with a question mark for what protocol buffers refuse, as in names of other bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | str | float]:
    flat: dict[str, bool | str | float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            number = isinstance(value, bool | int | float)
            flat[prefix + name] = value if number else _as_utf8(str(value))
    return flat
