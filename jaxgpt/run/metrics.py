"""A run's metrics on disk: a JSON object per line in metrics.jsonl, and TensorBoard's event files.

Both are append-only. A resumed run first removes the records after its checkpoint, so that no step
is logged twice. A number that is not finite is `null` in metrics.jsonl (strict JSON has no NaN) and
keeps its value in the event files.

A failed write never stops a run. A full disk is reported once; what could not be written (some 300
bytes per record) waits in memory and is written by the first call that finds room.
"""

import json
import logging
import math
import os
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxgpt.errors import UserError
from jaxgpt.files import atomic_write, read_file
from jaxgpt.run.metrics_file import EVENT_FILES, METRICS_FILE, events_folder, parse_record
from jaxgpt.run.tensorboard_events import (
    decode_events,
    encode_event,
    event_files,
    merge_summaries,
    next_file_name,
)

# It warns of every NaN, which the run itself reports.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


class MetricsLog:
    """Writes a run's metrics: `with MetricsLog(out_dir, resume_step) as log: ...`

    Every call passes its record to the operating system, so that a killed process loses nothing;
    after `flush` a power failure loses nothing either.
    """

    def __init__(
        self,
        out_dir: Path,
        resume_step: int | None = None,
        on_error: Callable[[str], object] = warnings.warn,
        is_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        """Open the log of a new run, or of a run that resumes from step `resume_step`.

        Args:
            out_dir: the run's folder; created if missing.
            resume_step: step of the checkpoint to resume from: later records are removed. None for
                a new run, which removes the records of one that died before its first checkpoint.
            on_error: called with a message the first time that metrics cannot be written.
            is_ours: whether the folder is still the run's own. Only then is a file created again
                that was deleted with it; until then, records wait in memory.

        Raises:
            UserError: if the run is new and the folder has metrics of steps after 0: of a run whose
                checkpoints are gone, or of another program.
        """
        self._on_error = on_error
        self._reported = False
        self._has_hparams = False
        lines, folder = out_dir / METRICS_FILE, events_folder(out_dir)
        if resume_step is None:
            _refuse_earlier_metrics(lines, folder)
        last_step = -1 if resume_step is None else resume_step
        for path in event_files(folder):
            self._try(self._drop_events_after, last_step, path)
        self._lines = _Appender(lines, is_ours, partial(_drop_lines_after, last_step))
        self._events = _Appender(folder / next_file_name(event_files(folder)), is_ours)
        self._add_event(0, time.time(), file_version="brain.Event:2")
        # Each start but the first makes an open TensorBoard discard the events from this step on.
        start = SessionLog(status=SessionLog.START)
        self._add_event(last_step + 1, time.time(), session_log=start)
        self._drain()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of one step, such as {'train/loss': 3.1}."""
        now = time.time()
        numbers = {tag: float(value) for tag, value in values.items()}
        finite = {tag: x if math.isfinite(x) else None for tag, x in numbers.items()}
        self._add_line(step, now, finite)
        parts = (summary.scalar(tag, x) for tag, x in numbers.items())
        self._add_event(step, now, summary=merge_summaries(parts))
        self._drain()

    def text(self, step: int, tag: str, text: str) -> None:
        """Log a text, such as a generated sample, to TensorBoard only, as a code block."""
        if not text:
            return
        now = time.time()
        code_block = textwrap.indent(_as_utf8(text), "    ")
        self._add_event(step, now, summary=summary.text(tag, code_block))
        self._drain()

    def hparams(self, values: Mapping[str, Any], metrics: tuple[str, ...] = ()) -> None:
        """Log the configuration for TensorBoard's HPARAMS tab; only the first call of a run does.

        Args:
            values: the configuration, by name.
            metrics: tags of the scalars to compare runs by, such as 'val/loss'.
        """
        if self._has_hparams:
            return
        self._has_hparams = True
        # The library's add_hparams would create another run in a subfolder.
        plain = {name: _as_hparam(value) for name, value in values.items()}
        parts = summary.hparams(plain, dict.fromkeys(metrics, 0.0))
        self._add_event(0, time.time(), summary=merge_summaries(parts))
        self._drain()

    def flush(self) -> bool:
        """Write everything to disk (fsync); returns False if that failed."""
        return all([self._try(self._lines.sync), self._try(self._events.sync)])

    def close(self) -> None:
        """Flush and close the files."""
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
        self._events.pending += encode_event(Event(step=int(step), wall_time=now, **what))

    def _drain(self) -> None:
        self._try(self._lines.drain)
        self._try(self._events.drain)

    def _try(self, write: Callable[..., None], *args: object) -> bool:
        try:
            write(*args)
        except OSError as error:
            if not self._reported:
                self._reported = True
                self._on_error(f"metrics cannot be written, training continues: {error}")
            return False
        return True

    def _drop_events_after(self, last_step: int, path: Path) -> None:
        data = read_file(path)  # its header and hparams are of step 0
        kept = [(entry, event) for entry, event in decode_events(data) if event.step <= last_step]
        tags = [value.tag for _, event in kept for value in event.summary.value]
        self._has_hparams |= any(tag.startswith("_hparams_/") for tag in tags)
        _rewrite(path, data, b"".join(entry for entry, _ in kept))


class NoLog(MetricsLog):
    """Discards everything, in all processes but the main one."""

    def __init__(self) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, tag: str, text: str) -> None: ...

    def hparams(self, values: Mapping[str, Any], metrics: tuple[str, ...] = ()) -> None: ...

    def flush(self) -> bool:
        return True

    def close(self) -> None: ...


class _Appender:
    """Appends `pending` to a file, all or nothing; on OSError it stays pending."""

    def __init__(
        self,
        path: Path,
        is_ours: Callable[[], bool],
        clean: Callable[[Path], object] = lambda _: None,
    ) -> None:
        """`clean` is called until it succeeds, before anything is appended."""
        self.path, self._is_ours, self._clean = path, is_ours, clean
        self._is_clean = False
        self.pending = bytearray()
        self.file: int | None = None

    def drain(self) -> None:
        """Pass `pending` to the operating system; a failure leaves no partial record."""
        if not self._is_clean:
            self._clean(self.path)
            self._is_clean = True
        if self.file is not None and not os.fstat(self.file).st_nlink:
            self.close()  # somebody deleted it
        if self.file is None and not self._is_ours():
            return
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
        """Drain, and flush the file to disk."""
        self.drain()
        if self.file is not None:
            os.fsync(self.file)

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


def _refuse_earlier_metrics(lines: Path, folder: Path) -> None:
    try:
        data = read_file(lines) if lines.exists() else b""
        files = [read_file(path) for path in event_files(folder)]
    except OSError as error:
        raise UserError(f"{error}; move it away, or choose another --out-dir") from None
    # The last line may be incomplete; any other that is not a record of step 0 is somebody's work.
    complete = [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
    steps = [record["step"] if record else None for record in map(parse_record, complete)]
    steps += [event.step for data in files for _, event in decode_events(data)]
    if any(step is None or step > 0 for step in steps):
        raise UserError(
            f"{lines.parent} has metrics of earlier steps, and no checkpoint to resume from; move "
            f"{METRICS_FILE} and {EVENT_FILES} away, or choose another --out-dir"
        )


def _drop_lines_after(last_step: int, path: Path) -> None:
    data = read_file(path) if path.exists() else b""
    parsed = [(line, parse_record(line)) for line in data.splitlines()]
    kept = [line + b"\n" for line, record in parsed if record and record["step"] <= last_step]
    _rewrite(path, data, b"".join(kept))


def _rewrite(path: Path, old: bytes, new: bytes) -> None:
    if not new:
        path.unlink(missing_ok=True)
    elif old.startswith(new):  # the usual case; truncating works on a full disk, too
        os.truncate(path, len(new))
    else:
        # TensorBoard reads every file with 'tfevents' in its name, so this one has another.
        with atomic_write(path, path.with_name("rewriting.tmp")) as file:
            file.write(new)


def _as_utf8(text: str) -> str:
    """`text` with a question mark for lone surrogates, which protocol buffers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _as_hparam(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float) else _as_utf8(str(value))
