"""A run of several datasets: its losses by source, and resuming it across a stage's border."""

from pathlib import Path

import numpy as np
import pytest
from helpers.runs import assert_same_end, train

from jaxgpt import evaluate
from jaxgpt.data.token_file import write_shard
from jaxgpt.run.metrics_file import read_metrics


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    for number, (name, train_length) in enumerate({"a": 3000, "b": 165}.items()):
        (tmp_path / name).mkdir()
        for split, length in (("train", train_length), ("val", 700)):
            tokens = rng.integers(100 * number, 100 * number + 90, length).astype(np.uint16)
            write_shard(tmp_path / name / f"x_{split}_000000.bin", tokens)
    a, b = tmp_path / "a", tmp_path / "b"
    return [
        *("--dataset", f"{a}:0.75,{b}:0.25"),
        *("--mixture-at", "5", f"{a}:0.25,{b}:0.5,embedded:0.25"),
        *("--lr-decay-iters", "8", "--learning-rate", "1e-2", "--warmup-iters", "1"),
    ]


def refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as left:
        train(*arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


def test_a_mixture_stops_where_a_source_ends_and_resumes_bit_for_bit_across_a_stage(
    tmp_path: Path, flags: list[str], capsys
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train(straight, *flags, "--max-iters", "8") == 0
    assert "share 0.75, 0.25 from step 5" in capsys.readouterr().out
    # b has 9 windows, and a step takes 2 of them.
    assert train(stopped, *flags, "--max-iters", "8", "--at-end", "stop") == 0
    assert "Done: 4 steps (--at-end stop: b ends at step 4), val" in capsys.readouterr().out
    assert train(stopped, *flags, "--max-iters", "8", "--at-end", "stop") == 0
    said = capsys.readouterr().out
    assert "is finished: 4 steps (--at-end stop: b ends at step 4), val" in said
    assert "--at-end repeat --out-dir" in said
    assert train(stopped, *flags, "--max-iters", "8", "--at-end", "repeat") == 0
    assert_same_end(stopped, straight)

    records = {record["step"]: record for record in read_metrics(straight / "metrics.jsonl")}
    last = records[8]
    expected = 0.75 * last["val/loss/a"] + 0.25 * last["val/loss/b"]
    assert last["val/loss"] == pytest.approx(expected)
    assert np.isfinite(last["val/loss/embedded"])
    # Without dropout the losses of the sources, weighted by their windows, are the step's.
    early = records[2]
    expected = 0.75 * early["train/loss/a"] + 0.25 * early["train/loss/b"]
    assert early["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert "train/loss/embedded" in records[6].keys() - early.keys()

    assert evaluate.main(["--out-dir", str(straight), "--as-in-training"]) == 0
    assert f"{last['val/loss']:.4f} nats per token, the sources' weighted mean" in (
        capsys.readouterr().out
    )
    assert "stages before that cannot change" in refusal(
        capsys, straight, *flags[:2], *flags[5:], "--max-iters", "9"
    )

    write_shard(tmp_path / "b" / "x_train_000001.bin", np.arange(99))
    message = refusal(capsys, straight, *flags, "--max-iters", "9")
    assert "b: train_tokens 165 -> 264" in message
    assert "; restore it, or start a new run" in message


def test_sources_of_different_tokenizers_are_refused_in_a_sentence(tmp_path: Path, capsys) -> None:
    from jaxgpt.prepare import main

    text = tmp_path / "text.txt"
    text.write_text("A word, and another one. " * 500)
    for tokenizer in ("byte", "gpt2"):
        command = [str(text), "--tokenizer", tokenizer, "--out", str(tmp_path / tokenizer)]
        assert main([*command, "--workers", "1"]) == 0
    mixture = f"{tmp_path}/byte:1,{tmp_path}/gpt2:1"
    message = refusal(capsys, tmp_path / "run", "--dataset", mixture, "--max-iters", "1")
    assert "was made with tokenizer 'gpt2', but" in message
    assert "a mixture needs one for all" in message


def test_a_source_that_ends_within_a_step_and_one_that_is_missing_are_refused(
    tmp_path: Path, flags: list[str], capsys
) -> None:
    message = refusal(
        capsys, tmp_path / "run", *flags, "--at-end", "stop", "--effective-batch-size", "64"
    )
    assert "at_end stop: b ends within the first step; use --at-end repeat" in message
    gone = ["--dataset", f"{tmp_path}/a:1,{tmp_path}/gone:1"]
    message = refusal(capsys, tmp_path / "run", *gone)
    assert f"{tmp_path}/gone: no such folder" in message
    assert f"jaxgpt.prepare YOUR_TEXT --out {tmp_path}/gone, or take this source out of" in message
    assert "--data-dir" not in message
