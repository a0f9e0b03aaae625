"""The progress of a preparation."""

import io

import pytest
from rich.console import Console

from jaxgpt.preparation import progress
from jaxgpt.preparation.progress import PreparationConsole


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines_of(console: PreparationConsole, width: int = 200) -> io.StringIO:
    written = io.StringIO()
    console.console = Console(file=written, width=width)
    return written


def test_a_line_has_tokens_documents_speed_remaining_bytes_and_time(clock: list[float]) -> None:
    console = PreparationConsole(total_bytes=50_000_000, done_bytes=10_000_000)
    written = lines_of(console)
    clock[0] += 40
    console.update(30_000_000, tokens=80_000_000, documents=120_000)
    assert written.getvalue() == (
        "80.0M tokens (2.00M/s) · 120,000 documents · 20.0 MB left · 40 s to go\n"
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_names_of_files_are_shown_as_they_are(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    name, written = "downloading [/x] [red]a.bin[/] :cat:", io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    monkeypatch.setenv("COLUMNS", "150")
    with PreparationConsole(total_bytes=100, done_bytes=0) as console:
        clock[0] += 40
        console.update(1, 0, 0, name)
        console.say(name)
    assert written.getvalue().count(name) >= 2


def test_lines_are_printed_from_time_to_time_without_a_terminal(clock: list[float]) -> None:
    console = PreparationConsole(total_bytes=100, done_bytes=0)
    written = lines_of(console)
    for done in range(100):
        clock[0] += 1
        console.update(done, tokens=done, documents=done, note="waiting for a download")
    assert len(written.getvalue().splitlines()) == 3
    assert "waiting for a download" in written.getvalue()
