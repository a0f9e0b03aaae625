import json
import shutil
from pathlib import Path

import jax
import pytest
from helpers.checkpoints import sign

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.resolved import Resolved, load_config
from jaxgpt.run.metrics_file import read_metrics
from jaxgpt.run.restore import CheckpointError
from jaxgpt.weights.source import WeightsFlags, open_weights


def val_losses(out_dir: Path) -> dict[int, float]:
    records = read_metrics(out_dir / "metrics.jsonl")
    return {r["step"]: r["val/loss"] for r in records if "val/loss" in r}


def test_a_checkpoint_is_chosen_by_step_or_by_its_loss(tiny_run: Path) -> None:
    losses = val_losses(tiny_run)
    assert losses[8] < losses[4]
    for which, step in (("latest", 8), ("best", 8), ("4", 4)):
        weights = open_weights(WeightsFlags(out_dir=tiny_run, checkpoint=which))
        assert (weights.step, weights.val_loss) == (step, losses[step])
    with pytest.raises(
        ConfigError, match=r"has no such checkpoint; it has checkpoints of steps 4, "
    ):
        open_weights(WeightsFlags(out_dir=tiny_run, checkpoint="5"))


def test_the_best_checkpoint_need_not_be_the_latest(tiny_run: Path, tmp_path: Path) -> None:
    for step, loss in ((4, 2.0), (8, None)):
        folder = tmp_path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        sign(folder, loss)
    (tmp_path / "config.json").write_bytes((tiny_run / "config.json").read_bytes())
    assert open_weights(WeightsFlags(out_dir=tmp_path, checkpoint="best")).step == 4
    assert open_weights(WeightsFlags(out_dir=tmp_path)).step == 8


def test_reading_a_run_changes_nothing_in_it(tiny_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    weights = open_weights(WeightsFlags(out_dir=tiny_run))
    params = weights.load(jax.devices("cpu")[0])
    assert params["wte"]["embedding"].shape == (320, 16)
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


def test_a_damaged_checkpoint_is_refused_and_the_newest_falls_back_to_an_older_one(
    tiny_run: Path, tmp_path: Path, capsys
) -> None:
    broken = Path(shutil.copytree(tiny_run, tmp_path / "broken"))
    for path in (broken / "checkpoints" / "8" / "state" / "d").iterdir():
        path.write_bytes(b"")
    before = sorted(broken.rglob("*"))
    assert open_weights(WeightsFlags(out_dir=broken)).step == 4
    assert "checkpoint 8 is damaged, so checkpoint 4 is used: " in capsys.readouterr().err
    for which in ("8", "best"):
        with pytest.raises(ConfigError, match=r"checkpoint 8 is damaged: .*--checkpoint"):
            open_weights(WeightsFlags(out_dir=broken, checkpoint=which))
    assert sorted(broken.rglob("*")) == before
    (broken / "checkpoints" / "8" / "integrity.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"checkpoint 8 is damaged: .*--checkpoint"):
        open_weights(WeightsFlags(out_dir=broken, checkpoint="best"))  # which 8 may be
    values = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**values, "n_layer": 3}))
    weights = open_weights(WeightsFlags(out_dir=broken, checkpoint="4"))
    with pytest.raises(CheckpointError, match=r"checkpoints/4 cannot be read .*config.json"):
        weights.load(jax.devices("cpu")[0])


def test_a_checkpoint_or_a_run_deleted_meanwhile_is_named_as_such(tiny_run, tmp_path, monkeypatch):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    weights = open_weights(WeightsFlags(out_dir=run))
    shutil.rmtree(run / "checkpoints" / "8")  # as by a run that trains on
    with pytest.raises(CheckpointError, match=r"checkpoints/8 has been deleted since .* run it"):
        weights.load(jax.devices("cpu")[0])

    def load_and_delete(path: Path) -> Resolved:
        cfg = load_config(path)
        shutil.rmtree(run)
        return cfg

    monkeypatch.setattr("jaxgpt.weights.source.load_config", load_and_delete)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        open_weights(WeightsFlags(out_dir=run))
