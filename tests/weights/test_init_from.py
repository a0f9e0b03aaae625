import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.runs import last_params
from helpers.trees import random_params

from jaxgpt import export, sample, train
from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import load_config
from jaxgpt.run.metrics_file import read_metrics
from jaxgpt.weights.huggingface import load_params, read_model_config, save_model
from jaxgpt.weights.init_from import find_origin


def val_losses(out_dir: Path) -> dict[int, float]:
    records = read_metrics(out_dir / "metrics.jsonl")
    return {r["step"]: r["val/loss"] for r in records if "val/loss" in r}


def fine_tune(exported: Path, out_dir: Path, *flags: str) -> int:
    shape = ["--batch-size=4", "--effective-batch-size=4", "--eval-iters=5", "--sample-tokens=0"]
    source = ["--preset", "demo", "--init-from", str(exported), "--out-dir", str(out_dir)]
    return train.main([*source, *shape, *flags])


@pytest.fixture(scope="module")
def tuned(exported: Path, tmp_path_factory) -> Path:
    """A run of four steps from the exported weights, with the context cut to 12."""
    out_dir = tmp_path_factory.mktemp("tuned") / "run"
    assert fine_tune(exported, out_dir, "--max-iters=4", "--block-size=12") == 0
    return out_dir


def test_fine_tuning_starts_from_the_weights(exported, tiny_run, tmp_path, capsys) -> None:
    assert fine_tune(exported, tmp_path, "--max-iters=1") == 0
    assert val_losses(tmp_path)[0] == pytest.approx(val_losses(tiny_run)[8], abs=1e-6)
    out = " ".join(capsys.readouterr().out.split())
    assert "n_layer 2, n_head 2, n_embd 16, block_size 16" in out
    assert f"weights {exported}" in out


def test_a_run_folder_gives_the_same_weights_as_its_export(exported, tiny_run, tmp_path) -> None:
    shorter = ("--max-iters=1", "--block-size=12")
    assert fine_tune(tiny_run, tmp_path / "run", *shorter) == 0
    assert fine_tune(exported, tmp_path / "folder", *shorter) == 0
    assert val_losses(tmp_path / "run") == pytest.approx(val_losses(tmp_path / "folder"), abs=1e-6)


def test_a_fine_tuned_run_resumes_bit_for_bit_without_its_source(
    exported, tuned: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(exported, tmp_path / "source"))
    short = ["--block-size=12", "--lr-decay-iters=4", "--max-iters=2"]
    assert fine_tune(source, tmp_path / "run", *short) == 0
    shutil.rmtree(source)
    flags = ["--preset=demo", "--batch-size=4", "--effective-batch-size=4", "--sample-tokens=0"]
    longer = ["--eval-iters=5", "--max-iters=4", "--block-size=12"]
    assert train.main([*flags, *longer, "--out-dir", str(tmp_path / "run")]) == 0
    assert last_params(tmp_path / "run") == last_params(tuned)


def test_the_same_command_resumes_although_its_source_is_gone(tuned: Path) -> None:
    saved = load_config(tuned / "config.json")
    assert saved.model.block_size == 12
    asked = dataclasses.replace(load_preset("demo"), init_from=saved.init_from)
    origin, weights = find_origin(asked, saved, given=["init_from"])
    assert (origin.model, origin.tokenizer, weights) == (saved.model, "byte", None)
    elsewhere = dataclasses.replace(asked, init_from="no/such/folder")
    with pytest.raises(ConfigError, match="no such folder"):
        find_origin(elsewhere, saved, given=["init_from"])


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    """A folder as transformers writes it, of a Qwen3 with 257 ids."""
    folder = tmp_path_factory.mktemp("others") / "qwen3"
    folder.mkdir()
    shape = {"n_layer": 1, "n_head": 4, "n_kv_head": 2, "n_embd": 16, "block_size": 16}
    cfg = ModelConfig(arch="qwen3", **shape, head_dim=8, vocab_size=257, tied_head=False)
    save_model(folder, cfg, random_params(cfg), eot=256)
    return folder


def test_a_qwen3_folder_trains_samples_and_is_exported(qwen3, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert (
        fine_tune(
            qwen3,
            run,
            "--max-iters=1",
            "--optimizer=adamw",
            "--learning-rate=1e-9",
            "--min-lr=1e-9",
        )
        == 0
    )
    model = load_config(run / "config.json").model
    found = (model.arch, model.n_kv_head, model.head_dim, model.tied_head, model.block_size)
    assert found == ("qwen3", 2, 8, False, 16)
    assert export.main(["--out-dir", str(run), "--to", str(tmp_path / "again")]) == 0
    before, after = (load_params(f, read_model_config(qwen3)) for f in (qwen3, tmp_path / "again"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before, after)
    flags = ["--prompt=ab", "--max-new-tokens=20", "--temperature=0"]
    texts = []
    capsys.readouterr()
    for source in ("--init-from", str(qwen3)), ("--out-dir", str(run)):
        assert sample.main([*source, *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_the_context_may_be_longer_where_positions_are_not_learned(qwen3) -> None:
    asked = load_preset("demo")
    for block_size in (12, 64):
        model = dataclasses.replace(asked.model, block_size=block_size)
        wanted = dataclasses.replace(asked, init_from=str(qwen3), model=model)
        origin, _ = find_origin(wanted, None, given=["init_from", "block_size"])
        assert origin.model.block_size == block_size
    origin, _ = find_origin(wanted, None, given=["init_from"])
    assert origin.model.block_size == 16


@pytest.mark.parametrize(
    ("flags", "answers"),
    [
        (["--arch=qwen3"], ["--arch qwen3: the weights of", "have gpt2; drop the flag"]),
        (["--n-layer=3", "--bias=True"], ["--n-layer 3: the weights of", "--bias True"]),
        (
            ["--block-size=32"],
            ["--block-size 32: the weights of", "have 16 positions", "at most 16"],
        ),
        (["--tokenizer=gpt2"], ["--tokenizer gpt2: the weights of", "have byte; drop the flag"]),
        (["--init-from=nowhere"], ["--init-from nowhere: no such folder"]),
        (["--init-from=scratch"], ["a new --out-dir starts from scratch"]),
    ],
)
def test_flags_that_contradict_the_weights_are_refused(
    exported, tmp_path, capsys, flags, answers
) -> None:
    with pytest.raises(SystemExit) as left:
        fine_tune(exported, tmp_path / "run", *flags)
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert [part for part in answers if part not in err] == []
    assert not (tmp_path / "run").exists()


def test_a_run_from_scratch_refuses_init_from(tiny_run, exported, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        fine_tune(exported, tiny_run, "--max-iters=9")
    assert left.value.code == 2
    assert "init_from" in capsys.readouterr().err
