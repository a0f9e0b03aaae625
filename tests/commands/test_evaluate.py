import importlib
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.trees import TINY

from jaxgpt import prepare, train
from jaxgpt.data.loader import first_windows
from jaxgpt.data.shards import TokenStream
from jaxgpt.data.task import perplexity
from jaxgpt.data.token_file import DataError, write_shard
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.evaluate import main
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.network import build_model, init_params
from jaxgpt.run.metrics_file import read_metrics
from jaxgpt.training.evaluation import measure_text
from jaxgpt.training.step import make_score_step


@pytest.fixture
def evaluated(capsys):
    """The output of `evaluate --json`."""

    def run(*flags: object) -> dict:
        capsys.readouterr()
        assert main([*map(str, flags), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def mistake(capsys):
    """The error message of a command."""

    def answer(*flags: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(list(map(str, flags)))
        out, err = capsys.readouterr()
        assert (left.value.code, out) == (2, "")
        assert "Traceback" not in err
        return err

    return answer


@pytest.mark.parametrize("step", [4, 8])
def test_the_loss_equals_the_logged_one_for_the_same_windows(
    evaluated, tiny_run: Path, step: int
) -> None:
    found = evaluated("--out-dir", tiny_run, "--as-in-training", "--checkpoint", step)
    logged = {r["step"]: r.get("val/loss") for r in read_metrics(tiny_run / "metrics.jsonl")}
    assert found["validation"]["loss"] == pytest.approx(logged[step], abs=1e-6)
    assert (found["step"], found["validation"]["tokens"]) == (step, 5 * 12 * 16)


def test_the_loss_is_computed_in_the_run_s_dtype(evaluated, tmp_path: Path) -> None:
    flags = [
        *("--preset", "demo", "--n-layer", "1", "--n-head", "2", "--n-embd", "16"),
        *("--block-size", "16", "--batch-size", "4", "--effective-batch-size", "4"),
        *("--max-iters", "2", "--eval-iters", "1", "--sample-tokens", "0", "--dtype", "bfloat16"),
    ]
    assert train.main([*flags, "--out-dir", str(tmp_path)]) == 0
    logged = read_metrics(tmp_path / "metrics.jsonl")[-1]["val/loss"]
    found = evaluated("--out-dir", tmp_path, "--as-in-training")
    assert found["dtype"] == "bfloat16"
    assert found["validation"]["loss"] == pytest.approx(logged, abs=1e-6)
    other = evaluated("--out-dir", tmp_path, "--as-in-training", "--dtype", "float32")
    assert other["validation"]["loss"] != pytest.approx(logged, abs=1e-6)


def test_a_run_and_its_export_have_the_same_loss(evaluated, tiny_run: Path, exported) -> None:
    small = ("--val-tokens", 5000, "--batch-size", 3)
    run = evaluated("--out-dir", tiny_run, *small)["validation"]
    folder = evaluated("--init-from", exported, "--dataset", "embedded", *small)
    assert folder["validation"] == pytest.approx(run)
    assert run["tokens"] == 5000 // 16 * 16


@pytest.mark.filterwarnings("error")  # of a division by no bytes
def test_the_loss_of_a_text_follows_its_definition() -> None:
    graphdef = build_model(TINY, "float32", plain_attention)
    params = init_params(TINY, jax.random.key(0))
    windows_WT1 = np.random.default_rng(0).integers(0, 50, (7, 9)).astype(np.uint16)
    byte_lengths_V = np.arange(50) % 4  # every fourth id stands for nothing, like end of text
    batches = [windows_WT1[:3], windows_WT1[3:6], windows_WT1[6:]]
    score_step = jax.jit(make_score_step(graphdef))
    got = measure_text(score_step, params, batches, byte_lengths_V)
    log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(windows_WT1[:, :-1]))
    targets = windows_WT1[:, 1:].astype(int)
    losses_WT = -np.take_along_axis(np.asarray(log_p, np.float64), targets[..., None], -1)[..., 0]
    lengths_WT = byte_lengths_V[targets]
    means_W = losses_WT.mean(1)
    assert got.loss == pytest.approx(losses_WT.mean(), rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(got.loss))
    assert got.standard_error == pytest.approx(means_W.std(ddof=1) / math.sqrt(7), rel=1e-4)
    bits = losses_WT[lengths_WT > 0].sum() / math.log(2)
    assert got.bits_per_byte == pytest.approx(bits / lengths_WT.sum(), rel=1e-5)
    assert (got.tokens, got.bytes) == (56, lengths_WT.sum())
    silent = measure_text(score_step, params, batches, np.zeros(50, int))  # nothing but end of text
    assert (silent.loss, silent.bytes) == (got.loss, 0)
    assert math.isnan(silent.bits_per_byte)


@pytest.mark.parametrize(("count", "windows"), [(3, 3), (4, 4), (99, 6)])
def test_the_first_windows_are_consecutive(count: int, windows: int) -> None:
    tokens = TokenStream.from_arrays([np.arange(20), np.arange(20, 32)])
    batches = list(first_windows(tokens, 5, count, n_vocab=50, batch_size=4))
    assert [len(batch) for batch in batches] == ([windows] if windows <= 4 else [4, 2])
    whole = np.concatenate(batches)
    np.testing.assert_array_equal(whole, 5 * np.arange(windows)[:, None] + np.arange(6))
    with pytest.raises(DataError, match="id 30, outside the tokenizer's 30"):
        list(first_windows(tokens, 5, 9, n_vocab=30, batch_size=4))


def test_every_id_has_its_length_in_bytes() -> None:
    tokenizer = load_tokenizer("gpt2")
    text = "It is a truth — universally acknowledged"
    assert tokenizer.byte_lengths()[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.byte_lengths()[tokenizer.eot] == 0


def test_token_files_are_measured_and_named_in_the_table(
    evaluated, tiny_run, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    data_dir = Path("[b]:smile:")  # neither markup nor an emoji
    data_dir.mkdir()
    tokens = np.random.default_rng(0).integers(0, 257, 500).astype(np.uint16)
    write_shard(data_dir / "x_val_000000.bin", tokens)  # and no training split
    found = evaluated("--out-dir", tiny_run, "--data-dir", data_dir, "--val-tokens", 0)
    assert found["validation"]["tokens"] == 499 // 16 * 16
    assert main(["--out-dir", str(tiny_run), "--data-dir", str(data_dir)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert str(data_dir) in out
    counts = "step 8, 11,600 parameters, 1,008 of them padding"
    for part in (counts, "all 31 windows", "nats per token", "bits per byte"):
        assert part in out


@pytest.fixture(scope="module")
def hellaswag_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("hellaswag") / "val.jsonl"
    examples = [
        {"ctx": "He was", "endings": ["so", "not at", "an", "here"], "label": i % 4}
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def test_tasks_need_no_text(evaluated, tiny_run, hellaswag_file, tmp_path) -> None:
    (tmp_path / "lambada.jsonl").write_text('{"text": "and so it was"}\n')
    flags = ("--hellaswag", hellaswag_file, "--lambada", tmp_path / "lambada.jsonl")
    found = evaluated("--out-dir", tiny_run, "--skip-loss", *flags)
    assert "validation" not in found
    # Six times the same question with the answers 0 1 2 3 0 1.
    assert found["hellaswag"]["acc"] in (1 / 6, 2 / 6)
    assert found["hellaswag"]["examples"] == 6
    assert found["lambada"]["perplexity"] > 1


def test_training_scores_tasks_at_each_evaluation(tmp_path, hellaswag_file, capsys) -> None:
    flags = [
        *("--preset", "demo", "--n-layer", "1", "--n-head", "2", "--n-embd", "16"),
        *("--block-size", "16", "--batch-size", "4", "--effective-batch-size", "4"),
        *("--max-iters", "2", "--eval-interval", "1", "--eval-iters", "1", "--sample-tokens", "0"),
    ]
    assert train.main([*flags, "--out-dir", str(tmp_path), "--hellaswag", hellaswag_file]) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    scored = {r["step"]: (r["hellaswag/acc"], r["hellaswag/acc_norm"]) for r in records}
    assert sorted(scored) == [0, 1, 2]
    assert "hellaswag/acc_norm 0." in capsys.readouterr().out
    again = ["--out-dir", str(tmp_path), "--skip-loss", "--hellaswag", hellaswag_file, "--json"]
    assert main(again) == 0
    found = json.loads(capsys.readouterr().out)["hellaswag"]
    assert (found["acc"], found["acc_norm"]) == scored[2]


@pytest.mark.parametrize(
    ("flags", "answers"),
    [
        (["--val-tokens=-1", "--batch-size=0"], ["--val-tokens -1 must", "--batch-size 0 must"]),
        (["--skip-loss"], ["nothing to measure; add --hellaswag or --lambada"]),
        (["--as-in-training", "--val-tokens=9"], ["uses the run's own windows; drop --val-tokens"]),
        (["--as-in-training", "--skip-loss", "--lambada=x"], ["which --skip-loss leaves out"]),
        (["--dataset=embedded", "--data-dir=x"], ["--data-dir is not read"]),
        (["--data-dir=no/such"], ["no/such: no such folder", "val.bin"]),
        (["--hellaswag=no.jsonl"], ["--hellaswag no.jsonl cannot be read"]),
        (["--hellaswaq", "no.jsonl"], ["Perhaps you meant", "--hellaswag FILE"]),
    ],
)
def test_a_user_error_is_one_message(mistake, tiny_run, flags, answers) -> None:
    answer = mistake("--out-dir", tiny_run, *flags)
    assert [part for part in answers if part not in answer] == []


def test_out_of_memory_is_answered_with_a_smaller_setting(mistake, tiny_run, monkeypatch) -> None:
    def run_out(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory, 9 bytes.\nBufferAssignment:\n")

    for command, remedy in (("evaluate", "--batch-size 4"), ("sample", "--num-samples")):
        monkeypatch.setattr(f"jaxgpt.{command}.build_network", run_out)
        monkeypatch.setattr("test_evaluate.main", importlib.import_module(f"jaxgpt.{command}").main)
        answer = mistake("--out-dir", tiny_run)
        assert "memory is full: RESOURCE_EXHAUSTED: Out of memory, 9 bytes." in answer
        assert remedy in answer
        assert "BufferAssignment" not in answer


def test_a_model_folder_needs_a_dataset(mistake, exported) -> None:
    answer = mistake("--init-from", exported)
    assert "is not a run and has no dataset; add --data-dir" in answer
    assert "--as-in-training needs a run" in mistake("--init-from", exported, "--as-in-training")
    assert "is not a run and has no checkpoints" in mistake(
        "--init-from", exported, "--checkpoint", "best"
    )


def test_text_of_another_tokenizer_is_refused(mistake, tiny_run, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"It is truth {i}\n" for i in range(99)))
    flags = ["--out", str(tmp_path / "data"), "--val-fraction", "0.5", "--tokenizer", "gpt2"]
    assert prepare.main([str(tmp_path / "text.txt"), "--sample-by", "line", *flags]) == 0
    answer = mistake("--out-dir", tiny_run, "--data-dir", tmp_path / "data")
    assert "was made with tokenizer 'gpt2', but the model's is 'byte'" in answer


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(1.0) == pytest.approx(math.e)
    assert perplexity(1e4) == math.inf
