"""Folders in which no run may begin."""

import os
from pathlib import Path

import pytest

from jaxgpt.config.checks import ConfigError
from jaxgpt.run.folder import load_saved


def test_a_folder_that_cannot_be_made_or_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    for out_dir in (tmp_path / "taken", tmp_path / "taken" / "run"):
        with pytest.raises(ConfigError, match="taken is a file; choose a folder"):
            load_saved(out_dir)
    with pytest.raises(ConfigError, match="too long"):
        load_saved(Path("x" * 300))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match="cannot be written to"):
        load_saved(tmp_path / "a" / "b")


def test_a_run_within_a_checkpoint_which_would_be_deleted_is_refused(run):
    with pytest.raises(ConfigError, match=r"is a run's checkpoint; choose"):
        load_saved(next((run / "checkpoints").iterdir()) / "mine")
    (run / "integrity.json").write_text("another program's")
    assert load_saved(run / "mine") is None


def test_a_config_json_that_is_not_of_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=r"(?s)config\.json: .* choose another --out-dir"):
        load_saved(tmp_path)
