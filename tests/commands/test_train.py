"""The command line from end to end, on the text in the package."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.configs import resolved
from helpers.events import tags_by_step
from helpers.runs import last_params, losses, started, train, wait_for

from jaxgpt.config.fields import Config
from jaxgpt.data.token_file import write_shard
from jaxgpt.run.metrics_file import EVENT_FILES, read_metrics
from jaxgpt.run.processes import StepRequests
from jaxgpt.run.tensorboard_events import event_files
from jaxgpt.train import Due, due_after


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run of ten steps that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("runs") / "straight"
    assert train(out_dir, "--max-iters", "10") == 0
    return out_dir


def test_a_run_leaves_its_curves_configuration_and_checkpoints(straight: Path) -> None:
    by_step = losses(straight)
    assert list(by_step) == list(range(11))
    assert [step for step, (_, val) in by_step.items() if val is not None] == [0, 4, 8, 10]
    assert all(train is not None for step, (train, _) in by_step.items() if step)
    assert json.loads((straight / "config.json").read_text())["n_embd"] == 16
    names = {p.name for p in straight.iterdir() if not p.match(EVENT_FILES)}
    assert names == {"checkpoints", "config.json", "metrics.jsonl"}
    assert len(event_files(straight)) == 1  # in the folder that TensorBoard names the run after
    assert {int(p.name) for p in (straight / "checkpoints").iterdir()} >= {8, 10}


def test_the_event_files_hold_the_same_numbers(straight: Path) -> None:
    tags = tags_by_step(straight)
    assert tags[10, "train/loss"] == tags[10, "val/loss"] == 1
    assert tags[3, "train/learning_rate"] == tags[3, "speed/tokens_per_second"] == 1
    assert set(tags.values()) == {1}


@pytest.mark.parametrize("stops", [[4], [3, 7], [1, 8, 9]])
def test_stopping_and_resuming_changes_no_bit(straight: Path, tmp_path: Path, stops) -> None:
    for stop in stops:
        assert train(tmp_path, "--max-iters", str(stop)) == 0
    assert train(tmp_path, "--max-iters", "10") == 0
    resumed, expected = losses(tmp_path), losses(straight)
    assert [train for train, _ in resumed.values()] == [train for train, _ in expected.values()]
    for step in (0, 4, 8, 10):
        assert resumed[step] == expected[step]
    assert last_params(tmp_path) == last_params(straight)


def test_muon_and_a_state_in_bfloat16_are_restored_to_the_bit_too(tmp_path: Path) -> None:
    flags = ("--optimizer", "muon", "--state-dtype", "bfloat16", "--lr-decay-iters", "6")
    for out_dir, ends in ((tmp_path / "straight", "6"), (tmp_path / "stopped", "36")):
        for end in ends:
            assert train(out_dir, *flags, "--max-iters", end) == 0
    assert last_params(tmp_path / "stopped") == last_params(tmp_path / "straight")


def test_a_resumed_run_keeps_the_end_of_its_decay(tmp_path: Path) -> None:
    flags = ("--lr-decay-iters", "None", "--warmup-iters", "1")
    train(tmp_path, *flags, "--max-iters", "4")
    train(tmp_path, *flags, "--max-iters", "6")
    rates = {
        r["step"]: r.get("train/learning_rate") for r in read_metrics(tmp_path / "metrics.jsonl")
    }
    assert rates[5] == rates[6] == pytest.approx(1e-4)


def test_a_run_that_has_decayed_to_zero_is_not_made_longer_without_a_longer_decay(
    tmp_path: Path, capsys
) -> None:
    run = ("--lr-decay-iters", "None", "--min-lr", "0", "--warmup-iters", "1")
    assert train(tmp_path, *run, "--max-iters", "2") == 0
    assert "the learning rate stays at" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, *run, "--max-iters", "4")
    assert "the learning rate is 0 from step 2 on" in capsys.readouterr().err
    assert train(tmp_path, *run, "--max-iters", "4", "--lr-decay-iters", "4") == 0


def test_a_smaller_batch_size_changes_nothing_but_rounding(straight: Path, tmp_path: Path) -> None:
    train(tmp_path, "--max-iters", "10", "--batch-size", "2")
    got, expected = (np.array(list(losses(d).values()), float) for d in (tmp_path, straight))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_finished_run_says_its_result_and_how_to_go_on(straight: Path, capsys) -> None:
    before = sorted(straight.rglob("*"))
    assert train(straight, "--max-iters", "10") == 0
    out = capsys.readouterr().out
    assert "is finished: 10 steps, validation loss" in out
    assert re.search(r"--max-iters 20\n +train longer\n", out)  # it ended in its warm-up
    assert re.search(r"--max-iters 20 --lr-decay-iters 20\n +train longer with a longer decay", out)
    assert "no effect" not in out
    assert re.search(r"--out-dir \S+-2\n +start anew", out)
    assert train(straight, "--max-iters", "10", "--min-lr", "1e-5", "--log-interval", "2") == 0
    assert (
        "so these had no effect: log_interval 1 -> 2, min_lr 0.0001 -> 1e-05"
        in capsys.readouterr().out
    )
    assert sorted(straight.rglob("*")) == before


def test_what_is_printed_at_the_start_and_at_the_end(tmp_path: Path, capsys) -> None:
    assert train(tmp_path, "--max-iters", "2", "--sample-tokens", "8") == 0
    assert tags_by_step(tmp_path)[2, "sample/text_summary"] == 1
    out = capsys.readouterr().out
    for part in (
        "of them padding: n_layer 1",
        "8 sequences = batch_size 4 x 2 accumulated; 128 tokens",
        "byte tokens, 0.00 epochs, seed 1337",
        "256 tokens",
        "cpu (cpu), float32",
        str(tmp_path),
        "step 0  validation loss 5.",
        "Done: 2 steps, validation loss",
        "A sample of what it writes",
        "Next:",
        f"python -m jaxgpt.sample --out-dir {tmp_path} --interactive",
    ):
        assert part in out, part


def test_another_architecture_in_the_same_folder_is_refused(straight: Path, capsys) -> None:
    before = (straight / "config.json").read_bytes()
    with pytest.raises(SystemExit) as left:
        train(straight, "--max-iters", "12", "--n-layer", "2")
    assert left.value.code == 2
    assert re.search(r"n_layer +1 +2", capsys.readouterr().err)
    assert (straight / "config.json").read_bytes() == before


def test_token_files_are_trained_on(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name in ("train_000001", "train_000002", "val_000000"):
        write_shard(tmp_path / f"data/x_{name}.bin", rng.integers(0, 257, 500).astype(np.uint16))
    flags = ("--dataset", "x", "--data-dir", str(tmp_path / "data"), "--max-iters", "2")
    assert train(tmp_path / "run", *flags) == 0
    assert "1,000 byte tokens" in capsys.readouterr().out
    write_shard(tmp_path / "data/x_train_000003.bin", rng.integers(0, 257, 99).astype(np.uint16))
    with pytest.raises(SystemExit) as left:
        train(tmp_path / "run", *flags[:-1], "4")
    assert left.value.code == 2
    assert "train_tokens 1000 -> 1099" in capsys.readouterr().err


def test_missing_data_is_said_in_a_sentence(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        train(tmp_path / "run", "--dataset", "x", "--data-dir", str(tmp_path / "no"))
    assert left.value.code == 2
    assert f"{tmp_path / 'no'}: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_device_is_answered_with_what_would_fit(tmp_path, capsys, monkeypatch) -> None:
    dump = (
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nBufferAssignment:\n"
    )

    def run_out(*_: object) -> float:
        raise RuntimeError(dump + "line\n" * 1000)

    monkeypatch.setattr("jaxgpt.run.evaluator.evaluate", run_out)
    with pytest.raises(SystemExit) as left:
        train(tmp_path)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert "trying to allocate 9 bytes" in err
    assert "--batch-size" in err
    assert "BufferAssignment" not in err


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("jaxgpt.planning.memory.device_limit", lambda _: 500_000)
    with pytest.raises(SystemExit) as left:
        train(tmp_path)
    assert left.value.code == 2
    assert "a step needs" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()


def test_batch_size_auto_is_settled_before_anything_is_printed(tmp_path, capsys) -> None:
    assert train(tmp_path, "--batch-size", "auto", "--max-iters", "2") == 0
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (
        saved["batch_size"] * saved["gradient_accumulation_steps"] == saved["effective_batch_size"]
    )
    assert saved["remat"] == "none"
    assert f"= batch_size {saved['batch_size']} x" in capsys.readouterr().out


def test_no_step_is_logged_twice_after_a_crash(straight: Path, tmp_path: Path) -> None:
    """What lies after the newest checkpoint is taken out, and written again when it happens."""
    train(tmp_path, "--max-iters", "6")
    for line in ('{"step": 7, "train/loss": 1.0}\n', '{"step": 8, "tra'):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(line)
    train(tmp_path, "--max-iters", "10")
    assert list(losses(tmp_path)) == list(range(11))
    assert set(tags_by_step(tmp_path).values()) == {1}
    assert len(event_files(tmp_path)) == 2


def test_a_signal_saves_and_leaves_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, children
) -> None:
    # Enough steps that the signal finds the run at work; their pace does not matter.
    flags = ["--eval-interval", "100000", "--max-iters", "100000", "--log-interval", "100"]
    log = tmp_path / "a" / "metrics.jsonl"
    for number in (signal.SIGTERM, signal.SIGINT):
        logged = len(read_metrics(log)) if log.exists() else 0
        process = started(tmp_path / "a", *flags)
        children.append(process)
        wait_for(lambda had=logged: log.exists() and len(read_metrics(log)) > had + 3)
        process.send_signal(number)
        said = "".join(process.communicate(timeout=60))
        assert process.returncode == 0, said
        stopped = int(re.search(rf"{number.name}: saved step ([\d,]+)", said)[1].replace(",", ""))
        assert (tmp_path / "a" / "checkpoints" / str(stopped)).is_dir()
    last = (*flags, "--max-iters", str(stopped + 5), "--log-interval", "1")
    assert train(tmp_path / "a", *last) == train(tmp_path / "b", *last) == 0
    a, b = (list(losses(tmp_path / name).items())[-5:] for name in "ab")
    assert a == b
    assert last_params(tmp_path / "a") == last_params(tmp_path / "b")


@pytest.mark.parametrize(
    ("step", "requests", "due"),
    [
        (3, StepRequests(), Due(evaluate=False, save=False, stop=False)),
        (4, StepRequests(), Due(evaluate=True, save=True, stop=False)),
        (10, StepRequests(), Due(evaluate=True, save=True, stop=False)),  # the last step
        (3, StepRequests(save=True), Due(evaluate=False, save=True, stop=False)),
        (3, StepRequests(stop="SIGTERM"), Due(evaluate=False, save=True, stop=True)),
        (8, StepRequests(stop="SIGINT", save=True), Due(evaluate=True, save=True, stop=True)),
    ],
)
def test_what_is_due_after_a_step(step: int, requests: StepRequests, due: Due) -> None:
    cfg = resolved(Config(), max_iters=10, eval_interval=4)
    assert due_after(step, cfg, requests) == due
