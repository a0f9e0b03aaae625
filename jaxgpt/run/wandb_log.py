"""A run's metrics on Weights & Biases, besides its files: `--wandb-project NAME`.

A failure of wandb costs its curves alone: it is reported once, and the run goes on.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from jaxgpt.errors import first_line
from jaxgpt.files import FormatError, decode_json, read_file, write_json
from jaxgpt.run.metrics import MetricsLog
from jaxgpt.run.metrics_file import METRICS_FILE, read_metrics

WANDB_FILE = "wandb.json"
INIT_SECONDS = "30"  # to answer at the start, unless WANDB_INIT_TIMEOUT is set; wandb's own is 90
FINISH_SECONDS = 60.0  # to upload what is left at the end; `wandb sync` can do it later
MISSING = (
    "wandb is not installed, so metrics go to TensorBoard and metrics.jsonl alone; install it with "
    "pip install -e '.[wandb]'"
)


class Sent(msgspec.Struct):
    """The contents of wandb.json in the run's folder."""

    id: str  # of the run on Weights & Biases
    step: int  # the last that was logged there by earlier starts, which it refuses to log again


class WandbLog(MetricsLog):
    """A MetricsLog that also logs to a project of Weights & Biases; texts only to TensorBoard."""

    def __init__(
        self,
        project: str,
        out_dir: Path,
        resume_step: int | None,
        on_error: Callable[[str], object],
        is_ours: Callable[[], bool],
    ) -> None:
        """Open the log of a run as MetricsLog does, and continue its run on Weights & Biases."""
        sent = None if resume_step is None else _earlier_start(out_dir)
        super().__init__(out_dir, resume_step, on_error, is_ours)
        self._sent = sent or Sent(secrets.token_hex(4), -1)
        self._run: Any = None
        try:
            from wandb import Settings, init  # a folder wandb/ can be imported, but has no names

            os.environ.setdefault("WANDB_INIT_TIMEOUT", INIT_SECONDS)
            out_dir.mkdir(parents=True, exist_ok=True)
            write_json(out_dir / WANDB_FILE, msgspec.to_builtins(self._sent))
            self._run = init(
                project=project,
                dir=out_dir,
                id=self._sent.id,
                name=out_dir.resolve().name,
                resume="allow",
                settings=Settings(console="off", finish_timeout=FINISH_SECONDS),
            )
        except ImportError:
            on_error(f"--wandb-project {project}: {MISSING}")
        except Exception as error:
            self._give_up(error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        super().scalars(step, values)
        if step > self._sent.step:
            self._call(lambda run: run.log(dict(values), step=step))

    def hparams(self, values: Mapping[str, Any], metrics: tuple[str, ...] = ()) -> None:
        super().hparams(values, metrics)
        self._call(lambda run: run.config.update(dict(values), allow_val_change=True))

    def close(self) -> None:
        super().close()
        self._call(lambda run: run.finish())
        self._run = None

    def _call(self, call: Callable[[Any], object]) -> None:
        try:
            if self._run is not None:
                call(self._run)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._on_error(
            "Weights & Biases gets no more metrics; training continues, and the run's own files "
            f"have them all: {first_line(error)}"
        )


def _earlier_start(out_dir: Path) -> Sent | None:
    """What earlier starts of the run logged, as far as the files say; read before they are cut."""
    with suppress(OSError, FormatError):
        sent = decode_json(read_file(out_dir / WANDB_FILE), Sent)
        steps = [record["step"] for record in read_metrics(out_dir / METRICS_FILE)]
        return Sent(sent.id, max(sent.step, *steps, -1))
    return None
