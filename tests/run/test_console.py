import re
import shlex
import sys
import time
from types import SimpleNamespace

import pytest
from helpers.configs import parse, resolved

from jaxgpt.config.fields import Config
from jaxgpt.config.presets import load_preset
from jaxgpt.run import console, report, reporter
from jaxgpt.run.console import duration, print_table
from jaxgpt.run.metrics import NoLog
from jaxgpt.run.reporter import Pace, Reporter, SkipCounter


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test turns: `clock(seconds)` lets that much time pass."""
    now = 1000.0

    def turn(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(reporter.time, "monotonic", lambda: now)
    return turn


def pace_of(clock, *laps: float, tokens_per_step: int = 100) -> Pace:
    pace = Pace(tokens_per_step)
    pace.lap()
    for seconds in laps:
        clock(seconds)
        pace.lap()
    return pace


# ---------------------------------------------------------------- pace


def test_pace_is_unknown_until_a_step_follows_another(clock):
    pace = Pace(100)
    clock(60)  # the compiler's minute
    pace.lap()
    assert pace.tokens_per_second is None
    clock(2)
    pace.lap()
    assert pace.tokens_per_second == 50
    assert pace.eta(10, 0) == 20


def test_pace_follows_a_change_and_forgives_one_slow_step(clock):
    pace = pace_of(clock, *[1.0] * 50, 3.0)
    assert 85 < pace.tokens_per_second < 100
    pace = pace_of(clock, *[1.0] * 50, *[2.0] * 100)
    assert pace.tokens_per_second == pytest.approx(50, rel=0.01)


def test_evaluations_are_left_out_of_the_pace_but_not_of_the_time_to_go(clock):
    pace = pace_of(clock, 1.0, 1.0)
    clock(30)
    pace.leave_out_pause()
    clock(1.0)
    pace.lap()
    assert pace.tokens_per_second == pytest.approx(100)
    assert pace.eta(10, 2) == pytest.approx(10 + 2 * 30)


def test_a_save_alone_is_left_out_and_taken_for_no_evaluation(clock):
    pace = pace_of(clock, 1.0, 1.0)
    clock(30)
    pace.leave_out_pause(evaluated=True)
    clock(2)
    pace.leave_out_pause(evaluated=False)
    clock(1.0)
    pace.lap()
    assert pace.tokens_per_second == pytest.approx(100)
    assert pace.eta(0, 1) == pytest.approx(30)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3599, "59:59 min")),
        *((3600, "1:00 h"), (7 * 3600 + 12 * 60, "7:12 h"), (48 * 3600, "2 d 0 h")),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations_are_told_in_the_two_units_that_matter(seconds, text):
    assert duration(seconds) == text


# ---------------------------------------------------------------- lines and the bar

METRICS = {"loss": 4.56789, "grad_norm": 1.0, "skipped_steps": 0}


def make_reporter() -> Reporter:
    """Of a run of 2,000 steps of 768 tokens, logged every ten."""
    cfg = resolved(load_preset("demo"), max_iters=2000)
    device = SimpleNamespace(device_kind="cpu", memory_stats=lambda: None)
    return Reporter(cfg, device, NoLog(), SkipCounter(0), start=0)


def pretend_terminal(monkeypatch) -> None:
    """Have what pytest captures count as a terminal."""
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    for name, value in {"TERM": "xterm", "COLUMNS": "120", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "where", ["file", "file with FORCE_COLOR", "terminal of TERM=dumb", "terminal of a notebook"]
)
def test_where_no_bar_can_be_drawn_a_run_prints_plain_lines(clock, capsys, monkeypatch, where):
    monkeypatch.setenv("COLUMNS", "40")  # which must not break a line of a log
    if "FORCE_COLOR" in where:
        monkeypatch.setenv("FORCE_COLOR", "1")
    if "dumb" in where:
        monkeypatch.setenv("TERM", "dumb")
    if "notebook" in where:
        monkeypatch.setenv("JPY_PARENT_PID", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: "terminal" in where)
    with make_reporter() as lines:
        lines.log_if_due(10, lines.read(10, METRICS))
        clock(2)
        lines.log_if_due(100, lines.read(100, METRICS))
        lines.log_if_due(101, lines.read(101, METRICS))
        lines.say("step 100  [bold]not markup[/bold]")
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "step 10/2,000  loss 4.5679",
        "step 100/2,000  loss 4.5679  384 tokens/s  1:03 h to go",
        "step 100  [bold]not markup[/bold]",
    ]


def test_on_a_terminal_a_run_shows_a_bar_with_step_loss_speed_and_time_to_go(
    clock, capsys, monkeypatch
):
    pretend_terminal(monkeypatch)
    with make_reporter() as bar:
        bar.read(99, METRICS)
        clock(2)
        bar.log_if_due(100, bar.read(100, METRICS))  # the bar says it already
        bar.say("step 100  validation loss 4.4")
    out = plain(capsys.readouterr().out)
    assert "step 100  validation loss 4.4\n" in out
    last = out.strip().splitlines()[-1]
    for part in ("step 100/2,000", "loss 4.5679", "384 tokens/s", "1:03 h to go"):
        assert part in last


NAME = "runs/[/x] [red]a[/] :cat:"


def test_names_of_the_users_are_shown_as_they_are(capsys, monkeypatch):
    pretend_terminal(monkeypatch)
    bar = console.make_bar(console.make_console(), "left")
    bar.add_task("", total=1, status=NAME)
    bar.start()
    bar.stop()
    assert NAME in plain(capsys.readouterr().out)
    print_table(NAME, {NAME: NAME})
    assert plain(capsys.readouterr().out).count(NAME) == 3
    with make_reporter() as lines:
        lines.say(NAME)
    assert NAME in plain(capsys.readouterr().out)
    with console.waiting(NAME):
        time.sleep(0.2)
    assert NAME in plain(capsys.readouterr().err)


def plain(output: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)


def test_a_table_keeps_names_and_values_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    print_table("title", {"name": "a value that is longer than the line", "other": "x"})
    out = " ".join(capsys.readouterr().out.split())
    assert out == "title name a value that is longer than the line other x"


# ---------------------------------------------------------------- the next commands


def finished(argv: list[str], capsys) -> tuple[Config, str, dict[str, list[str]]]:
    """What a finished run of `argv` says, and the commands in it, by what they are for."""
    cfg = parse(argv)
    result = report.Result(1.25, "Once upon\na time")
    report.print_finished(resolved(cfg), "train", argv, (100, 1.2), result)
    out = capsys.readouterr().out
    pairs = re.findall(r"^  (\S.*)\n      (\S.*)$", out, re.MULTILINE)
    return cfg, out, {what: shlex.split(command) for command, what in pairs}


def parsed(command: list[str]) -> Config:
    assert command[0] == "train"
    return parse(command[1:])


@pytest.mark.parametrize(("step", "told"), [(600, "2.5000"), (700, "2.5000 at step 600")])
def test_a_run_that_was_stopped_says_of_which_step_its_loss_is(tmp_path, capsys, step, told):
    (tmp_path / "metrics.jsonl").write_text('{"step": 600, "time": 0, "val/loss": 2.5}\n')
    cfg = resolved(load_preset("demo"), out_dir=tmp_path)
    report.print_finished_before(cfg, "train", [], step, None, [])
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"{tmp_path} is finished: {step} steps, validation loss {told}"


def test_a_finished_run_says_its_result_and_a_sample(capsys):
    _, out, _ = finished(["--preset=demo", "--max-iters=2000"], capsys)
    assert "Done: 2,000 steps, validation loss 1.2500 (best: 1.2000 at step 100)" in out
    assert "Once upon\na time" in out


@pytest.mark.parametrize(("card", "named"), [("80gb", "80gb"), (None, "24gb")])
def test_a_finished_demo_names_the_preset_of_this_machines_card(capsys, monkeypatch, card, named):
    monkeypatch.setattr(report, "preset_of_this_machine", lambda: card)
    _, out, _ = finished(["--preset=demo"], capsys)
    assert f"  train --preset {named}\n      a real model, " in out


@pytest.mark.parametrize(
    "argv",
    [
        ["--preset=demo"],
        ["--preset", "demo", "--max_iters", "20", "--out_dir", "runs/my run", "--seed=3"],
        ["--preset=16gb", "--max-iters=20", "--out-dir=a/b", "--n-layer", "3"],
    ],
)
def test_the_commands_it_names_do_what_they_say(argv, capsys):
    cfg, _, commands = finished(argv, capsys)
    longer, decaying = [
        parsed(c) for what, c in commands.items() if what.startswith("train longer")
    ]
    for one, decay_end in ((longer, None), (decaying, 2 * cfg.max_iters)):
        assert (one.out_dir, one.max_iters) == (cfg.out_dir, 2 * cfg.max_iters)
        assert one.optimizer.lr_decay_iters == decay_end
    anew = parsed(commands["start anew"])
    assert (anew.out_dir, anew.max_iters) == (
        cfg.out_dir.with_name(f"{cfg.out_dir.name}-2"),
        cfg.max_iters,
    )
    for again in (longer, anew):
        assert (again.model, again.seed, again.preset) == (cfg.model, cfg.seed, cfg.preset)


def test_a_closed_pipe_is_an_error_that_run_command_answers() -> None:
    with pytest.raises(BrokenPipeError):
        console.OutputConsole().on_broken_pipe()
