"""What a run's folder calls its numbers, and reading them back.

Apart from `metrics`, which writes them: behind that lies tensorboardX, which takes a second to
import, and three where PyTorch is installed.
"""

import json
import math
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the order written, [] if there is no such file.

    Each is {'step': int, 'time': seconds since 1970, tag: value, ...}; a `null` comes back as NaN.
    Lines that a crash left incomplete are passed over.
    """
    records = map(parse_record, path.read_bytes().splitlines() if path.exists() else [])
    return [
        {tag: math.nan if value is None else value for tag, value in record.items()}
        for record in records
        if record is not None
    ]


def parse_record(line: bytes) -> dict[str, Any] | None:
    """A line as the record it is, None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(map(_is_number, record.values())):
        return None
    return record if type(record.get("step")) is int else None


def _is_number(value: object) -> bool:
    """Or `null`, and no whole number that is too large for a float."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)
