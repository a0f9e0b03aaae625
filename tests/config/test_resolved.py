import dataclasses
import json
from pathlib import Path

import pytest
from helpers.configs import resolved

from jaxgpt.config.architecture import padded_vocab_size
from jaxgpt.config.batch import Batch
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, flat_fields, flat_values
from jaxgpt.config.mesh_shape import MeshShape
from jaxgpt.config.mixture import End
from jaxgpt.config.presets import all_presets, load_preset
from jaxgpt.config.resolved import Origin, load_config, resolve

GOLDEN = Path(__file__).parent / "config-0.1.json"


def test_the_tokenizer_and_the_devices_fill_in_what_was_left_open():
    cfg = resolved(load_preset("demo"), n_vocab=257, mesh="data=2", effective_batch_size=24)
    assert (cfg.model.vocab_size, cfg.model.n_vocab) == (320, 257)
    assert cfg.batch == Batch(batch_size=12, devices=2, accumulation=1)
    assert (cfg.mesh, cfg.optimizer.lr_decay_iters, cfg.eval_windows) == (
        MeshShape(2, 1),
        1000,
        600,
    )
    assert (cfg.tokens_per_step, cfg.total_tokens) == (24 * 64, 24 * 64 * 1000)


def test_what_is_left_to_the_memory_there_is_begins_at_its_smallest():
    cfg = resolved(load_preset("24gb"), batch_size="auto", remat="auto")
    assert (cfg.batch.batch_size, cfg.batch.effective, cfg.remat) == (1, 512, "full")
    chosen = cfg.with_choice(64, "none")
    assert (chosen.batch, chosen.remat) == (Batch(64, 1, 8), "none")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size 100 has fewer rows than .* \(50257\)"):
        resolved(Config(), vocab_size=100)


def test_a_resumed_run_keeps_its_decay_its_vocabulary_and_its_windows():
    saved = dataclasses.replace(resolved(load_preset("24gb")), eval_windows=77)
    asked = dataclasses.replace(load_preset("24gb"), max_iters=99_000)
    origin = Origin(model=asked.model, tokenizer="gpt2", saved=saved)
    cfg = resolve(asked, origin, n_vocab=50257, mesh=MeshShape(), dtype="float32")
    assert (cfg.optimizer.lr_decay_iters, cfg.eval_windows) == (50_000, 77)
    assert cfg.asked.max_iters == 99_000


def test_a_run_that_a_source_ends_decays_until_there():
    asked, end = load_preset("demo"), End(700, "mine")
    flags = {"n_vocab": 257, "mesh": MeshShape(), "dtype": "float32"}
    cfg = resolve(asked, Origin.of(asked), **flags, end=end)
    assert (cfg.max_iters, cfg.optimizer.lr_decay_iters) == (700, 700)
    assert cfg.flat()["max_iters"] == 1000


@pytest.mark.parametrize(("ids", "rows"), [(257, 320), (50257, 50304), (64, 64), (65, 128)])
def test_rows_are_padded_to_what_suits_a_gpu(ids, rows):
    assert padded_vocab_size(ids) == rows


# ---------------------------------------------------------------- config.json


def test_a_saved_configuration_reads_back_equal(tmp_path):
    path = tmp_path / "config.json"
    for preset in all_presets():
        cfg = resolved(preset, n_vocab=257, out_dir=tmp_path, lr_decay_iters=77)
        path.write_text(json.dumps(cfg.flat()))
        again = load_config(path)
        assert again.flat() == cfg.flat()
        assert (again.model, again.optimizer, again.batch) == (cfg.model, cfg.optimizer, cfg.batch)


def test_the_flat_values_are_the_fields_as_json():
    cfg = resolved(load_preset("24gb"), "bfloat16", out_dir=Path("runs/x"), mesh="fsdp=2")
    values = cfg.flat()
    assert values.keys() == flat_fields().keys()
    assert json.loads(json.dumps(values)) == values
    assert (values["out_dir"], values["mesh"], values["dtype"]) == (
        "runs/x",
        "data=1,fsdp=2",
        "bfloat16",
    )
    assert (values["batch_size"], values["gradient_accumulation_steps"]) == (32, 8)


def test_a_run_of_an_older_version_is_read():
    """What version 0.1 wrote for `--preset demo --optimizer adamw --max-iters 50`."""
    cfg = load_config(GOLDEN)
    old = json.loads(GOLDEN.read_text())
    assert old.pop("auto_batch_size") is False
    assert cfg.flat() == flat_values(Config()) | old  # newer fields have their defaults
    assert (cfg.model.n_vocab, cfg.eval_windows, cfg.dtype) == (257, 600, "float32")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"3", b"null", b'{"n_layer": "3"}', b'{"n_layers": 3}', b"\xff\xfe"),
        *(b'{"n_layer": null}', b'{"learning_rate": NaN}', b'{"device": null}', b"[" * 100_000),
        *(b'{"n_layer": 1' + b"0" * 5000 + b"}", b"{}", b'{"mesh": "x"}', b'{"n_vocab": 3}'),
    ],
)
def test_a_damaged_saved_configuration_is_answered_with_its_path(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert str(refused.value).startswith(str(path))


def test_a_missing_saved_configuration_is_answered_with_its_path(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path / "config.json")
