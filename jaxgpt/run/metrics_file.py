"""Names of a run's metrics files, and reading metrics.jsonl.

Separate from `metrics`, which writes them and imports tensorboardX: that takes a second, and three
where PyTorch is installed.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec

from jaxgpt.files import FormatError, decode_json, read_file

METRICS_FILE = "metrics.jsonl"
EVENT_FILES = "events.out.tfevents.*"
OLDER_EVENTS_FOLDER = "tensorboard"  # in the run's folder, where older versions wrote them

# No integer that is too large for a float.
Value = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | float | None


def events_folder(out_dir: Path) -> Path:
    """The folder of a run's event files: the run's own, after which TensorBoard names the run."""
    older = out_dir / OLDER_EVENTS_FOLDER
    return older if any(older.glob(EVENT_FILES)) else out_dir


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the order written; [] without the file.

    Each is {'step': int, 'time': seconds since 1970, tag: value, ...}, with NaN for `null`. Lines
    that are not records, such as the last one before a crash, are skipped.
    """
    records = map(parse_record, read_file(path).splitlines() if path.exists() else [])
    return [
        {tag: math.nan if value is None else value for tag, value in record.items()}
        for record in records
        if record is not None
    ]


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line, None if it is not a record."""
    try:
        record = decode_json(line, dict[str, Value])
    except FormatError:
        return None
    return record if type(record.get("step")) is int else None
