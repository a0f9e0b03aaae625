"""A TOML file of the user's own."""

import os

import pytest

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, with_fields
from jaxgpt.config.nanogpt import NANOGPT_SETTINGS
from jaxgpt.config.presets import (
    load_preset,
)


@pytest.fixture
def toml(tmp_path):
    """Writes a TOML file of a user's own and returns its path as text."""

    def write(content: str | bytes) -> str:
        path = tmp_path / "my.toml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_preset(name)
    return str(refused.value)


# ---------------------------------------------------------------- a TOML file of the user's own


def test_a_file_of_ones_own_holds_what_differs_from_the_defaults(toml):
    path = toml("n_layer = 3\nbias = true\nmin_lr = 0\nout_dir = 'runs/mine'\nseed = 5  # five")
    cfg = load_preset(path)
    assert cfg == with_fields(
        Config(),
        **dict(preset=path, n_layer=3, bias=True, min_lr=0.0, out_dir=cfg.out_dir, seed=5),
        eval_windows=200 * 32,
    )
    assert str(cfg.out_dir) == "runs/mine"
    assert type(cfg.optimizer.min_lr) is float


def test_a_file_is_found_by_its_relative_path(toml, tmp_path, monkeypatch):
    toml("n_layer = 3")
    monkeypatch.chdir(tmp_path)
    assert load_preset("my.toml").model.n_layer == 3
    assert load_preset("./my.toml").model.n_layer == 3


def test_a_file_written_on_windows_is_read(toml):
    assert load_preset(toml(b"\xef\xbb\xbfn_layer = 3\r\nn_head = 4\r\n")).model.n_layer == 3


def test_a_file_may_give_accumulation_in_place_of_the_effective_batch(toml):
    cfg = load_preset(toml("batch_size = 12\ngradient_accumulation_steps = 40"))
    assert cfg.effective_batch_size == 480
    cfg = load_preset(toml("gradient_accumulation_steps = 8"))
    assert cfg.effective_batch_size == 8 * 32
    both = "gradient_accumulation_steps = 8\neffective_batch_size = "
    assert load_preset(toml(f"{both}256")).effective_batch_size == 256
    assert "is not effective_batch_size 250" in refusal(toml(f"{both}250"))


def test_a_missing_file_is_named(tmp_path):
    path = str(tmp_path / "nothing.toml")
    assert refusal(path) == f"--preset {path}: no such file"
    assert refusal("24gb.toml") == "--preset 24gb.toml: no such file; did you mean '24gb'?"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"n_layer = \n", "line 1"),
        (b"n_layer = 3\nn_layer = 4\n", "line 2"),
        (b"# caf\xe9", "utf-8"),
        (b"max_iters = " + b"9" * 5000, "digits"),
        (b"x = " + b"[" * 100_000, ""),
    ],
)
def test_what_is_not_toml_is_answered_with_file_and_reason(toml, content, reason):
    path = toml(content)
    message = refusal(path)
    assert message.startswith(f"{path} cannot be read as TOML: ")
    assert reason in message


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "my.toml")
    with pytest.raises(ConfigError, match=r"my.toml cannot be read as TOML: .*not a file"):
        load_preset(str(tmp_path / "my.toml"))


def test_a_path_that_cannot_be_read_is_answered_with_the_reason(tmp_path):
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    assert "Is a directory" in refusal(str(folder))
    assert "too long" in refusal("a" * 300 + ".toml")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *(("batch_sise", "batch_size"), ("batch-size", "batch_size"), ("BIAS", "bias")),
        *(("n_layers", "n_layer"), ("lerning_rate", "learning_rate"), ("beta_2", "beta2")),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest(toml, typed, meant):
    path = toml(f"{typed} = 3")
    assert refusal(path) == f"{path}: unknown key '{typed}'; did you mean '{meant}'?"


def test_an_unknown_key_like_no_other_is_answered_without_a_guess(toml):
    path = toml("zzz = 3")
    assert refusal(path) == f"{path}: unknown key 'zzz'"


@pytest.mark.parametrize("key", ["n_vocab", "eval_windows"])
def test_what_a_run_finds_out_cannot_be_set_in_a_file(toml, key):
    assert f"unknown key '{key}'" in refusal(toml(f"{key} = 3"))


def test_a_preset_that_builds_on_another_is_answered_with_what_to_do(toml):
    assert "copy the keys it should share" in refusal(toml("preset = '24gb'"))


def test_tables_are_answered_with_where_keys_stand(toml):
    message = refusal(toml("[model]\nn_layer = 3"))
    assert "unknown table [model]; put its keys at the top level" in message


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("batch_size = true", "batch_size = true: expected a whole number or one of auto"),
        ("max_iters = 3.5", "max_iters = 3.5: expected int"),
        ("batch_size = '3'", 'batch_size = "3": expected a whole number or one of auto'),
        ("batch_size = [1, 2]", "batch_size = [...]: expected a whole number or one of auto"),
        ("batch_size = {a = 1}", "batch_size = {...}: expected a whole number or one of auto"),
        (
            "batch_size = 2020-01-01",
            'batch_size = "2020-01-01": expected a whole number or one of auto',
        ),
        ("batch_size = 0x1" + "0" * 5000, "batch_size = a number of more than 64 bits"),
        ("learning_rate = false", "learning_rate = false: expected float"),
        ("bias = 1", "bias = 1: expected bool"),
        ("bias = 'True'", 'bias = "True": expected bool'),
        ("dataset = 3", "dataset = 3: expected str"),
        ("dataset = ''", 'dataset = "": expected a value'),
        ("out_dir = ''", 'out_dir = "": expected a value'),
        ("out_dir = 3", "out_dir = 3: expected a path in quotes"),
        ("device = 3", "device = 3: expected one of auto, gpu, cpu"),
        ("device = ['gpu']", "device = [...]: expected one of auto, gpu, cpu"),
        ("device = 'CPU'", "device = \"CPU\": expected one of auto, gpu, cpu; did you mean 'cpu'?"),
        (
            "dtype = 'bflot16'",
            'dtype = "bflot16": expected one of auto, bfloat16, float16, float32; did you mean',
        ),
        ("batch_size = -1", "batch_size -1 must be at least 1"),
        ("learning_rate = nan", "learning_rate nan must be finite and above 0"),
        ("weight_decay = inf", "weight_decay inf must be finite and at least 0"),
        ("max_iters = 9223372036854775807", "must be at most 2147483647"),
        ("gradient_accumulation_steps = -8", "gradient_accumulation_steps -8 must be at least 1"),
    ],
)
def test_a_wrong_value_is_answered_with_file_key_value_and_what_is_right(toml, line, answer):
    path = toml(line)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert answer in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("setting", NANOGPT_SETTINGS)
def test_a_setting_of_nanogpt_alone_is_answered_with_what_serves_instead(toml, setting):
    message = refusal(toml(f"{setting} = true"))
    assert f"{setting} = true is nanoGPT's" in message
    assert NANOGPT_SETTINGS[setting] in message


def test_names_that_nanogpt_has_for_devices_are_answered_with_ours(toml):
    message = refusal(toml("device = 'cuda:0'"))
    assert 'device = "cuda:0" is nanoGPT\'s; here it is gpu' in message


def test_every_fault_of_a_file_is_reported_at_once(toml):
    path = toml("batch_sise = 3\nn_head = true\ncompile = true\ndevice = 'tpu'")
    lines = refusal(path).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{path}: ") for line in lines)
    path = toml("n_head = 7\nbeta2 = 1.5\nbatch_size = 48")
    assert [line.split()[1] for line in refusal(path).splitlines()] == [
        *("n_embd", "beta2", "effective_batch_size")
    ]


def test_a_misspelt_key_is_not_blamed_on_its_neighbours(toml):
    # 480 divides by the 48 that was meant, not by the default that stands in its place.
    path = toml("batch_sise = 48\neffective_batch_size = 480")
    assert len(refusal(path).splitlines()) == 1
