"""The order of runs in a comparison with nanoGPT, and the ratios computed from them."""

import json
from pathlib import Path
from types import SimpleNamespace

import compare_nanogpt
import pytest

ARGS = SimpleNamespace(
    nanogpt=Path("nanoGPT"), torch_python="python", device="gpu", rounds=2, windows=5,
    window_seconds=2.0, timeout=300.0, bench_flags="",
)  # fmt: skip
FIGURES = {"peak_bytes": 10, "card_bytes": None, "mfu": None, "versions": {}, "device": "card"}


@pytest.fixture
def turns(monkeypatch):
    """The commands that `compare` runs, and tokens a second by a word of the command."""
    made: list[list[str]] = []
    speeds: dict[str, float] = {}

    def run(command: list[str], args) -> dict:
        made.append(command)
        word = next(word for word in speeds if word in command)
        if not speeds[word]:
            raise compare_nanogpt.RunError("out of memory")
        return {**FIGURES, "tokens_per_second": speeds[word]}

    monkeypatch.setattr(compare_nanogpt, "run", run)
    return made, speeds


def keep(run: dict) -> dict:
    return run


def kinds(commands: list[list[str]]) -> str:
    """A letter per run: j for jaxgpt, d and c for nanoGPT with default and cuDNN attention."""
    return "".join(
        "j" if "jaxgpt.bench" in command else "c" if "cudnn" in command else "d"
        for command in commands
    )


@pytest.mark.parametrize(
    ("default", "cudnn", "order", "setting", "ratio"),
    [
        (100.0, 200.0, "dc" + "jcjc", "compiled, cuDNN attention", 2.0),
        # The faster one ran first, so it runs again next to ours.
        (200.0, 100.0, "dc" + "djdjd", "compiled", 2.0),
        (100.0, 0.0, "dc" + "djdjd", "compiled", 4.0),
    ],
)
def test_the_best_setting_alternates_with_ours(
    turns, default, cudnn, order, setting, ratio
) -> None:
    made, speeds = turns
    speeds |= {"jaxgpt.bench": 400.0, "cudnn": cudnn, "--compile": default}
    found = compare_nanogpt.compare("gpt2-124m-b32", ARGS, keep)
    assert kinds(made) == order
    assert (found["nanogpt_setting"], found["speed_ratio"]) == (setting, ratio)
    assert len(found["runs"]) == len(made)
    assert [run["setting"] for run in found["runs"] if "failed" in run] == (
        [] if cudnn else ["compiled, cuDNN attention"]
    )


def test_if_no_setting_runs_there_is_no_comparison(turns) -> None:
    made, speeds = turns
    speeds |= {"cudnn": 0.0, "--compile": 0.0}
    with pytest.raises(compare_nanogpt.RunError, match="out of memory"):
        compare_nanogpt.compare("gpt2-124m-b32", ARGS, keep)
    assert kinds(made) == "dc"


def test_ours_trains_with_nanogpts_optimizer(turns) -> None:
    made, speeds = turns
    speeds |= {"jaxgpt.bench": 1.0, "--compile": 1.0}
    compare_nanogpt.compare("tiny", ARGS, keep)
    ours = next(command for command in made if "jaxgpt.bench" in command)
    assert ours[ours.index("--optimizer") + 1] == "adamw"


def test_a_run_that_fails_leaves_the_runs_before_it_in_the_file(
    turns, tmp_path, monkeypatch
) -> None:
    _, speeds = turns
    speeds |= {"jaxgpt.bench": 0.0, "cudnn": 100.0, "--compile": 200.0}
    path = tmp_path / "speed.json"
    (tmp_path / "model.py").touch()
    here = {"nanogpt": tmp_path, "shapes": ["gpt2-124m-b32"], "json": path}
    monkeypatch.setattr(
        compare_nanogpt, "parse_args", lambda argv: SimpleNamespace(**vars(ARGS) | here)
    )
    with pytest.raises(SystemExit, match="out of memory"):
        compare_nanogpt.main([])
    runs = json.loads(path.read_text())["unfinished"]["gpt2-124m-b32"]
    assert [run["tokens_per_second"] for run in runs] == [200.0, 100.0, 200.0]
