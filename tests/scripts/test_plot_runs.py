import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.errors import UserError

plot_runs = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "plot_runs.py"))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two folders with the metrics of six steps each."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        records: list[dict] = [{"step": 0, "time": 0.0, "val/loss": 5.0}]
        for step in range(1, 7):
            values = {"train/loss": 5 / step, "train/learning_rate": step * 1e-3}
            records.append({"step": step, "time": 0.0, **values, "speed/tokens_per_second": 9.0})
        records[-1]["val/loss"] = 1.0
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines)
        config = {"effective_batch_size": 4, "block_size": 16}
        (folder / "config.json").write_text(json.dumps(config))
    return folders


def test_a_curve_has_the_steps_and_values_that_were_logged(runs) -> None:
    curve = plot_runs["read_curves"](runs[0], "step")
    x_P, y_P = curve("train/loss")
    assert x_P.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(y_P, 5 / x_P)
    assert [part.tolist() for part in curve("val/loss")] == [[0, 6], [5, 1]]
    assert [part.tolist() for part in curve("never/logged")] == [[], []]
    by_tokens = plot_runs["read_curves"](runs[0], "tokens")
    assert by_tokens("val/loss")[0].tolist() == [0, 6 * 64]


def test_long_curves_are_thinned_by_means() -> None:
    y_P = np.arange(10_000.0)
    thin = plot_runs["thinned"](y_P)
    assert (len(thin), thin[0], thin.mean()) == (1000, 4.5, y_P.mean())


def test_runs_of_the_same_name_are_labelled_by_their_paths() -> None:
    labels_of = plot_runs["labels_of"]
    assert labels_of([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert labels_of([Path("monday/a"), Path("friday/a")]) == ["monday/a", "friday/a"]
    assert labels_of([Path(".")]) == [Path.cwd().name]


@pytest.mark.slow
def test_one_picture_shows_all_runs(runs, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="it draws")
    plot_runs["draw"](runs, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert re.search("<!-- first -->", text)
    assert re.search("<!-- second -->", text)
    for label in ("learning rate", "tokens per second", "loss, nats per token", "step"):
        assert f"<!-- {label} -->" in text, label
    plot_runs["draw"](runs, tmp_path / "x.png", "tokens")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_reported_in_one_sentence(runs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere has no metrics\.jsonl, or an empty one"):
        plot_runs["draw"]([tmp_path / "nowhere"], tmp_path / "x.png")
    with pytest.raises(UserError, match=r"must end in \.png or \.svg"):
        plot_runs["draw"](runs, tmp_path / "x.jpg")
    (runs[0] / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        plot_runs["draw"](runs, tmp_path / "x.png", "tokens")
