import pytest

from jaxgpt.config import presets
from jaxgpt.config.fields import flat_values
from jaxgpt.config.optimizer import GROUP_RATES
from jaxgpt.config.presets import (
    all_presets,
    describe_presets,
    load_preset,
)
from jaxgpt.errors import UserError

COLUMNS = (
    *("n_layer", "n_head", "n_embd", "batch_size", "gradient_accumulation_steps"),
    *("effective_batch_size", "block_size", "learning_rate", "min_lr", "max_iters", "vram_gb"),
)
BY_SIZE = {
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


def refusal(name: str) -> str:
    with pytest.raises(UserError) as refused:
        load_preset(name)
    return str(refused.value)


# ---------------------------------------------------------------- the presets of the package


@pytest.mark.parametrize("name", BY_SIZE)
def test_a_preset_of_a_size_is_what_its_row_of_the_table_says(name):
    values = flat_values(load_preset(name))
    B, effective = values["batch_size"], values["effective_batch_size"]
    values["gradient_accumulation_steps"] = effective // B
    assert tuple(values[column] for column in COLUMNS) == BY_SIZE[name]
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


@pytest.mark.parametrize("preset", ["12gb", "16gb", "24gb", "48gb", "80gb"])
def test_a_preset_of_a_size_has_a_modern_sibling_on_a_fifth_of_its_steps(preset):
    cfg, modern, base = (load_preset(name) for name in (preset, f"{preset}-modern", "124m-modern"))
    values = flat_values(modern)
    assert {key: values[key] for key in MODERN} == MODERN
    for name in ("n_layer", "n_embd"):
        assert getattr(modern.model, name) == getattr(cfg.model, name)
    assert modern.model.head_width == (112 if preset == "48gb" else 128)
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
    names = [cfg.preset for cfg in all_presets()]
    sized = {"80gb-350m", "48gb-280m", "24gb-180m", "16gb-124m", "12gb-82m"}
    sized |= {"24gb-350m", "24gb-774m", "24gb-1558m"}
    modern = {f"{name}-modern" for name in ("12gb", "16gb", "24gb", "48gb", "80gb", "124m", "demo")}
    small = {"10gb", *(f"{name}{kind}" for name in ("8gb", "t4") for kind in ("", "-modern"))}
    assert set(names) == {*BY_SIZE, *sized, *modern, *small, "gpt2-124m", "demo"}
    for name in sized:  # a preset that is named after its size has it
        millions = load_preset(name).model.parameter_count() / 1e6
        assert abs(millions / int(name.rpartition("-")[2][:-1]) - 1) < 0.015
    assert (names[0], names[-2:]) == ("80gb", ["demo", "demo-modern"])
    lines = {line.split()[0]: line for line in describe_presets().splitlines()}
    assert list(lines) == names
    sizes = {name: line.split()[1] for name, line in lines.items()}
    assert [sizes[name] for name in BY_SIZE] == [
        *("124.4M", "99.5M", "82.0M", "124.4M", "51.5M", "30.3M")
    ]
    assert sizes["demo"] == "0.8M"  # with bytes, since it leaves the vocabulary to the tokenizer


def test_presets_are_found_inside_an_installed_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "jaxgpt" / "config" / "presets.py"))
    inside = tmp_path / "jaxgpt" / "configs"
    inside.mkdir(parents=True)
    (inside / "tiny.toml").write_text("n_layer = 3")
    assert [cfg.preset for cfg in all_presets()] == ["tiny"]
    assert load_preset("tiny").model.n_layer == 3


@pytest.mark.parametrize("name", ["own.toml", "own.py"])
def test_a_config_file_in_the_home_folder_is_found(tmp_path, monkeypatch, name):
    """The shell leaves the ~ of --preset=~/own.toml alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / name).write_text("n_layer = 3")
    assert load_preset(f"~/{name}").model.n_layer == 3
    assert "is a URL" in refusal(f"https://example.com/{name}")


@pytest.mark.parametrize("typed", ["24bg", "24GB", "24gb.", "24g"])
def test_a_misspelt_preset_is_answered_with_the_nearest_and_the_list(typed):
    message = refusal(typed)
    assert f"--preset {typed}: no such preset; did you mean '24gb'?" in message
    assert describe_presets() in message


@pytest.mark.parametrize("typed", ["../configs/24gb", "", ".", "a" * 300])
def test_what_is_not_a_name_of_a_preset_is_refused(typed):
    assert f"--preset {typed}: no such preset" in refusal(typed)
