import dataclasses
import gzip
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.configs import resolved

import jaxgpt
from jaxgpt import bench
from jaxgpt.config.fields import Config
from jaxgpt.planning.gpus import find_gpu
from jaxgpt.planning.speed import model_flops_per_token
from jaxgpt.run import bench_record as bench_report
from jaxgpt.training.layout import Layout

ROOT = Path(jaxgpt.__file__).parents[1]
PROMISED = (
    *("step_ms", "tokens_per_second", "mfu", "peak_bytes", "compile_seconds"),
    *("first_step_seconds", "versions", "device", "command", "date"),
)
TINY = (
    *("--preset", "demo", "--n-layer", "1", "--n-head", "2", "--n-embd", "16"),
    *("--block-size", "8", "--batch-size", "2", "--effective-batch-size", "4"),
    *("--windows", "3", "--window-seconds", "0.01"),
)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """The JSON of one measurement, which also wrote a trace."""
    folder = tmp_path_factory.mktemp("trace")
    return {**measured(*TINY, "--profile", str(folder)), "folder": folder}


def measured(*argv: str) -> dict:
    capture = pytest.MonkeyPatch()
    said: list[str] = []
    capture.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    try:
        assert bench.main([*argv, "--json"]) == 0
    finally:
        capture.undo()
    return json.loads(next(text for text in said if text.startswith("{")))


@pytest.fixture
def refused(capsys):
    """The message that a command line ends with."""

    def refuse(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            bench.main(argv)
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (2, "")
        assert "Traceback" not in err
        return " ".join(err.split())

    return refuse


def test_a_measurement_has_all_that_is_promised_and_adds_up(result) -> None:
    assert set(PROMISED) <= result.keys()
    assert result["data"] == "the embedded text (train)"
    assert result["command"].startswith("python -m jaxgpt.bench --preset demo --n-layer 1")
    assert result["tokens_per_step"] == 4 * 8
    assert len(result["step_ms_windows"]) == 3
    assert min(result["step_ms_windows"]) <= result["step_ms"] <= max(result["step_ms_windows"])
    assert result["tokens_per_second"] == pytest.approx(32e3 / result["step_ms"])
    assert 0 < result["compile_seconds"] < result["first_step_seconds"]
    assert result["versions"]["jax"] == jax.__version__


def test_a_cpu_has_no_mfu_and_its_memory_is_the_compiled_steps(result) -> None:
    assert result["mfu"] is None
    assert result["mfu_formula"] is None
    assert result["peak_bytes"] == result["compiled_peak_bytes"] > 4 * 4 * result["parameters"]
    assert result["peak_bytes_from"] == "compiled memory_analysis"


def test_the_trace_is_one_that_tensorboard_and_perfetto_open(result) -> None:
    folder = Path(result["folder"])
    (profile,) = folder.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(profile)).planes
    steps = [e.name for plane in planes for line in plane.lines for e in line.events]
    assert any("train_step" in name for name in steps)
    (perfetto,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    assert any("train_step" in event.get("name", "") for event in events)


def test_mfu_is_on_the_dense_bf16_peak_of_a_known_card() -> None:
    cfg = resolved(Config(), "bfloat16", vocab_size=50304)
    h200 = types.SimpleNamespace(device_kind="NVIDIA H200")
    figures = bench_report.speeds(cfg, h200, [1.0, 1.1, 9.0])
    assert figures["step_ms"] == pytest.approx(1100)
    flops = cfg.tokens_per_step / 1.1 * model_flops_per_token(cfg.model)
    assert figures["mfu"] == pytest.approx(flops / find_gpu("h200").half_flops)
    assert "dense half-precision peak" in figures["mfu_formula"]
    for device_kind, dtype in (("NVIDIA H201", "bfloat16"), ("NVIDIA H200", "float32")):
        device = types.SimpleNamespace(device_kind=device_kind)
        other = dataclasses.replace(cfg, dtype=dtype)
        assert bench_report.speeds(other, device, [1.0])["mfu"] is None


def test_both_peaks_are_told_where_the_device_counts() -> None:
    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7})
    told = bench_report.memory(device, 5)
    assert told == {
        "peak_bytes": 7,
        "peak_bytes_from": "memory_stats",
        "compiled_peak_bytes": 5,
    }


def test_random_tokens_are_the_tokenizers_and_never_the_same_twice_in_a_row() -> None:
    cfg = resolved(Config(), batch_size=2, effective_batch_size=4, block_size=64, n_vocab=257)
    make_batch, name = bench.make_batches(cfg, Layout(jax.devices("cpu")[0]), None)
    first, second = make_batch(0), make_batch(1)
    assert name == "random tokens"
    assert first.shape == (2, 2, 65)
    assert first.dtype == np.uint16
    assert 0 < first.max() < 257
    assert len(np.unique(first)) > 100
    assert (first != second).any()


def test_windows_are_as_long_as_asked_for_and_follow_the_warm_up() -> None:
    calls: list[int] = []

    def train_step(state, tokens):
        calls.append(tokens)
        return state, {}

    _, seconds, steps = bench.time_steps(train_step, 0, iter(range(10**9)), 2, 0.001)
    assert len(seconds) == 2
    assert steps >= 1
    assert calls == list(range(bench.WARM_UP_STEPS + 2 * steps))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--windows", "0"], "windows 0 must be at least 1"),
        (["--window-seconds", "nan"], "window_seconds nan must be finite and above 0"),
        (["--init-from", "gpt2"], "speed does not depend on the weights"),
        (["--profile", str(ROOT / "LICENSE")], "is a file; name a folder"),
        (["--dataset", "nowhere"], "data/nowhere"),
        (["--batch-size", "3"], "effective_batch_size 4 is not a multiple of batch_size 3"),
        (["--windoes", "3"], "--windows INT"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(refused, argv, words) -> None:
    assert words in refused(*TINY, *argv)


def test_a_preset_for_a_card_needs_one(refused) -> None:
    assert "add --device cpu" in refused("--preset", "24gb")


def test_the_table_names_both_memories_and_says_why_there_is_no_mfu(result, capsys) -> None:
    bench_report.print_result(result)
    text = " ".join(capsys.readouterr().out.split())
    assert "GiB by compiled memory_analysis" in text
    assert "MFU unknown: the card's half-precision peak is not known" in text
