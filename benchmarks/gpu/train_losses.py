"""Run `jaxgpt.train` in a new folder and print what it logged as one JSON object.

    python benchmarks/gpu/train_losses.py FOLDER --preset demo --max-iters 60

Flags after the folder are `train`'s.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt.run.metrics_file import METRICS_FILE, read_metrics


def main(argv: Sequence[str] | None = None) -> int:
    folder, *flags = sys.argv[1:] if argv is None else argv
    command = [sys.executable, "-m", "jaxgpt.train", *flags, "--out-dir", folder]
    code = subprocess.run(command, stdout=sys.stderr).returncode
    records = read_metrics(Path(folder, METRICS_FILE))
    print(
        json.dumps(
            {
                "exit_code": code,
                "losses": losses_of(Path(folder)),
                "val": [(r["step"], r["val/loss"]) for r in records if "val/loss" in r],
                "tokens_per_second": last(records, "speed/tokens_per_second"),
                "peak_bytes": last(records, "memory/peak_bytes"),
            }
        )
    )
    return code


def losses_of(run: Path) -> dict[int, float]:
    """The training loss that a run logged at each step."""
    return {
        r["step"]: r["train/loss"] for r in read_metrics(run / METRICS_FILE) if "train/loss" in r
    }


def last(records: Sequence[dict], tag: str) -> float | None:
    """The newest value of a tag, None if there is none."""
    return next((r[tag] for r in reversed(records) if tag in r), None)


if __name__ == "__main__":
    sys.exit(main())
