import os

import pytest

from jaxgpt.config import presets
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, flat_values, with_fields
from jaxgpt.config.nanogpt import NANOGPT_SETTINGS
from jaxgpt.config.optimizer import GROUP_RATES
from jaxgpt.config.presets import (
    describe_presets,
    load_preset,
    preset_names,
)

COLUMNS = (
    *("n_layer", "n_head", "n_embd", "batch_size", "gradient_accumulation_steps"),
    *("effective_batch_size", "block_size", "learning_rate", "min_lr", "max_iters", "vram_gb"),
)
TIERS = {
    "80gb": (12, 12, 768, 64, 8, 512, 1024, 6e-4, 6e-5, 60000, 80),
    "48gb": (12, 12, 672, 32, 16, 512, 1024, 6e-4, 6e-5, 50000, 48),
    "24gb": (10, 10, 640, 32, 16, 512, 1024, 6e-4, 6e-5, 50000, 24),
    "24gb-plus": (12, 12, 768, 32, 16, 512, 1024, 5e-4, 5e-5, 60000, 24),
    "16gb": (8, 8, 512, 32, 12, 384, 1024, 6e-4, 6e-5, 50000, 16),
    "12gb": (6, 6, 384, 32, 16, 512, 1024, 6e-4, 6e-5, 50000, 12),
}
ALL_TIERS = (
    dict(dataset="fineweb", tokenizer="gpt2", vocab_size=50304, dropout=0.0, bias=False)
    | dict(warmup_iters=2000, lr_decay_iters=None, decay_lr=True, beta1=0.9, beta2=0.99)
    | dict(weight_decay=0.1, grad_clip=1.0, eval_interval=1000, eval_iters=200, log_interval=100)
)
# llm.c, scripts/run_gpt2_124M.sh; the betas are written into its train_gpt2.cu.
LLMC = (
    dict(n_layer=12, n_head=12, n_embd=768, bias=True, vocab_size=50304, block_size=1024)
    | dict(batch_size=64, effective_batch_size=512, max_iters=18865, eval_interval=250)
    | dict(learning_rate=6e-4, min_lr=0.0, warmup_iters=700, lr_decay_iters=None, decay_lr=True)
    | dict(weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0, dropout=0.0)
    | dict(dataset="fineweb", tokenizer="gpt2", vram_gb=80)
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


# ---------------------------------------------------------------- the presets of the package


@pytest.mark.parametrize("name", TIERS)
def test_a_tier_is_what_its_row_of_the_table_says(name):
    values = flat_values(load_preset(name))
    B, effective = values["batch_size"], values["effective_batch_size"]
    values["gradient_accumulation_steps"] = effective // B
    assert tuple(values[column] for column in COLUMNS) == TIERS[name]
    assert {key: values[key] for key in ALL_TIERS} == ALL_TIERS
    assert values["preset"] == name


def test_gpt2_124m_is_the_recipe_of_llmc():
    cfg = load_preset("gpt2-124m")
    values = flat_values(cfg)
    assert {key: values[key] for key in LLMC} == LLMC
    assert cfg.tokens_per_step == 524_288
    # val_max_steps 20 on eight cards of 64 x 1024 tokens
    assert values["eval_iters"] * 64 * 1024 == 10_485_760


# The recipe that 124m-modern explains; its siblings differ in shape, length and rates.
MODERN = (
    dict(arch="qwen3", tied_head=False, embedding_norm=True, zero_init=True, vocab_size=50304)
    | dict(optimizer="muon", schedule="wsd", cooldown_fraction=0.7, min_lr=0.0, warmup_iters=0)
    | dict(momentum_warmup_iters=300, cautious_weight_decay=True, weight_decay_schedule="lr")
    | dict(weight_decay=0.1, beta1=0.8, beta2=0.95, effective_batch_size=512, block_size=1024)
    | dict(dataset="fineweb", tokenizer="gpt2", lr_decay_iters=None, decay_lr=True)
)


@pytest.mark.parametrize("tier", ["12gb", "16gb", "24gb", "48gb", "80gb"])
def test_a_tier_has_a_modern_sibling_on_a_fifth_of_its_steps(tier):
    cfg, modern, base = (load_preset(name) for name in (tier, f"{tier}-modern", "124m-modern"))
    values = flat_values(modern)
    assert {key: values[key] for key in MODERN} == MODERN
    for name in ("n_layer", "n_embd"):
        assert getattr(modern.model, name) == getattr(cfg.model, name)
    assert modern.model.head_width == (112 if tier == "48gb" else 128)
    assert (modern.vram_gb, modern.max_iters) == (cfg.vram_gb, cfg.max_iters // 5)
    by_width = base.optimizer.scaled((768 / modern.model.n_embd) ** 0.5)
    for name in ("learning_rate", *GROUP_RATES):
        assert getattr(modern.optimizer, name) == getattr(by_width, name)


def test_124m_modern_trains_on_as_many_tokens_as_it_says():
    cfg = load_preset("124m-modern")
    assert {key: flat_values(cfg)[key] for key in MODERN} == MODERN
    assert (cfg.tokens_per_step, cfg.max_iters) == (524_288, 3600)
    assert cfg.eval_iters * cfg.batch_size * 1024 == 10_485_760


@pytest.mark.parametrize("name", ["t4", "8gb"])
def test_a_small_cards_modern_sibling_is_124m_moderns_run_in_micro_batches_for_it(name):
    ours, theirs = (flat_values(load_preset(x)) for x in (f"{name}-modern", "124m-modern"))
    differ = {field for field in ours if ours[field] != theirs[field]}
    own = {"preset", "vram_gb", "batch_size"}
    assert own <= differ <= own | {"eval_interval", "eval_iters", "eval_windows"}
    assert ours["vram_gb"] == load_preset(name).vram_gb


@pytest.mark.parametrize("name", ["demo", "demo-modern"])
def test_demos_run_anywhere_and_from_the_package_alone(name):
    cfg = load_preset(name)
    assert (cfg.vram_gb, cfg.dataset, cfg.tokenizer) == (None, "embedded", "byte")


def test_presets_are_listed_largest_card_first_with_true_sizes():
    names = preset_names()
    sized = {"80gb-350m", "48gb-280m", "24gb-180m", "16gb-124m", "12gb-82m"}
    sized |= {"24gb-350m", "24gb-774m", "24gb-1558m"}
    modern = {f"{name}-modern" for name in ("12gb", "16gb", "24gb", "48gb", "80gb", "124m", "demo")}
    small = {"10gb", *(f"{name}{kind}" for name in ("8gb", "t4") for kind in ("", "-modern"))}
    assert set(names) == {*TIERS, *sized, *modern, *small, "gpt2-124m", "demo"}
    for name in sized:  # a preset that is named after its size has it
        millions = load_preset(name).model.parameter_count() / 1e6
        assert abs(millions / int(name.rpartition("-")[2][:-1]) - 1) < 0.015
    assert (names[0], names[-2:]) == ("80gb", ["demo", "demo-modern"])
    lines = {line.split()[0]: line for line in describe_presets().splitlines()}
    assert list(lines) == names
    sizes = {name: line.split()[1] for name, line in lines.items()}
    assert [sizes[name] for name in TIERS] == [
        *("124.4M", "99.5M", "82.0M", "124.4M", "51.5M", "30.3M")
    ]


def test_presets_are_found_inside_an_installed_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "jaxgpt" / "config" / "presets.py"))
    inside = tmp_path / "jaxgpt" / "configs"
    inside.mkdir(parents=True)
    (inside / "tiny.toml").write_text("n_layer = 3")
    assert preset_names() == ["tiny"]
    assert load_preset("tiny").model.n_layer == 3


@pytest.mark.parametrize("typed", ["24bg", "24GB", "24gb.", "24g"])
def test_a_misspelt_preset_is_answered_with_the_nearest_and_the_list(typed):
    message = refusal(typed)
    assert f"--preset {typed}: no such preset; did you mean '24gb'?" in message
    assert describe_presets() in message


@pytest.mark.parametrize("typed", ["../configs/24gb", "", ".", "a" * 300])
def test_what_is_not_a_name_of_a_preset_is_refused(typed):
    assert f"--preset {typed}: no such preset" in refusal(typed)


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
