"""A pipe in place of a file, which would block who opens it, is named at once."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxgpt.config.resolved import load_config
from jaxgpt.data import manifest
from jaxgpt.data.tasks import load_task
from jaxgpt.data.token_file import inspect_file
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.data.tokenizer_files import find_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import LARGEST_READ, read_file, sha256_of
from jaxgpt.preparation.work_files import Journal, Plan, Record
from jaxgpt.run.compile_cache import remove_damaged
from jaxgpt.run.integrity import MANIFEST, read_manifest
from jaxgpt.run.metrics import MetricsLog
from jaxgpt.run.metrics_file import METRICS_FILE, read_metrics
from jaxgpt.sample import read_prompt

BYTES = load_tokenizer("byte")
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": load_config,
    "manifest.json": lambda path: manifest.load_manifest(path.parent),
    MANIFEST: lambda path: read_manifest(path.parent),
    METRICS_FILE: read_metrics,
    "x_train_0.bin": inspect_file,
    "plan.json": Plan.load,
    "units.jsonl": lambda path: Journal(path, Record),
    "tokenizer.json": lambda path: find_tokenizer(str(path), ()),
    "an array": sha256_of,
    "prompt.txt": lambda path: read_prompt(f"FILE:{path}"),
    "hellaswag_val.jsonl": lambda path: load_task("hellaswag", str(path), BYTES, 16),
}


@pytest.fixture
def five_seconds(monkeypatch):
    def too_long(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.usefixtures("five_seconds")
def test_a_pipe_in_place_of_a_file_is_named_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises((UserError, OSError), match="is a pipe, a socket or a device") as refused:
        READERS[name](tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


@pytest.mark.usefixtures("five_seconds")
def test_pipes_in_a_runs_folder_and_in_the_cache_stop_no_start(tmp_path: Path) -> None:
    for name in (METRICS_FILE, "events.out.tfevents.1.here"):
        os.mkfifo(tmp_path / name)
    told: list[str] = []
    with MetricsLog(tmp_path, resume_step=0, on_error=told.append) as log:
        log.scalars(1, {"train/loss": 1.0})
    assert len(told) == 1
    assert "is a pipe, a socket or a device, not a file" in told[0]
    entry = f"jit_step-{'0' * 64}-cache"
    os.mkfifo(tmp_path / entry)
    assert remove_damaged(tmp_path) == [entry]
    assert not (tmp_path / entry).exists()


def test_a_file_too_large_to_be_read_as_a_whole_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hellaswag_val.jsonl"
    path.touch()
    os.truncate(path, LARGEST_READ + 1)
    with pytest.raises(OSError, match="larger than 2 GiB") as refused:
        read_file(path)
    assert str(path) in str(refused.value)
