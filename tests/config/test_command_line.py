import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import configs

import jaxgpt
from jaxgpt import COMMANDS
from jaxgpt.config.architecture import ARCHITECTURES
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, flat_fields, flat_values
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.config.presets import describe_presets
from jaxgpt.planning import local_gpus
from jaxgpt.planning.gpus import GIB
from jaxgpt.planning.local_gpus import LocalCard

HIDDEN = {"n_vocab", "eval_windows", "vram_gb"}
PUBLIC = sorted(flat_fields().keys() - HIDDEN)
ROOT = Path(jaxgpt.__file__).parents[1]


def parse(*argv: str, default: Callable[[], str | None] = lambda: None) -> Config:
    return configs.parse(argv, default)


@pytest.fixture
def shown_help(capsys, monkeypatch):
    """What --help shows, and from it the text of each flag."""
    monkeypatch.setenv("COLUMNS", "100")

    def show(*argv: str) -> tuple[str, dict[str, str]]:
        with pytest.raises(SystemExit) as stop:
            parse(*argv)
        out, err = capsys.readouterr()
        assert (stop.value.code, err) == (0, "")
        words = " ".join(re.sub("[─│╭╮╰╯]|-{3,}", " ", out).split())
        entries = (entry.partition(" ") for entry in words.split(" --")[1:])
        return out, {flag.replace("-", "_"): text for flag, _, text in entries}

    return show


# ---------------------------------------------------------------- flags


def test_every_field_is_a_flag_with_an_explanation_and_nothing_else_is_a_flag(shown_help):
    _, flags = shown_help("--preset=24gb", "--help")
    assert sorted(flags) == sorted(["help", *PUBLIC])
    texts = [re.sub(r"^\S+ | ?\(default: .*?\)", "", flags[name]) for name in PUBLIC]
    assert all(len(text.split()) > 1 for text in texts)
    assert len(set(texts)) == len(texts)


def test_help_explains_each_section_by_what_it_is(shown_help):
    # A comment above a field is also taken for the fields that follow it without a blank line.
    text = " ".join(shown_help("--help")[0].split())
    assert text.count("a name from configs/") == 1
    assert "The architecture: everything the model needs to know" in text


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_the_presets_and_the_values_of_the_one_that_is_given(shown_help, flag):
    text, flags = shown_help("--preset=16gb", flag)
    assert "Defaults are those of preset 16gb." in text
    assert describe_presets() in text
    assert flags["effective_batch_size"].endswith("(default: 384)")
    assert flags["vocab_size"].endswith("(default: 50304)")
    assert "None" not in text


def test_help_needs_neither_preset_nor_card(shown_help):
    assert "batch_size" in shown_help("--help")[1]


@pytest.mark.parametrize(
    "argv",
    [
        *(["--batch-size", "4"], ["--batch_size", "4"], ["--batch-size=4"], ["--batch_size=4"]),
        ["--batch-size=8", "--batch_size", "4"],  # as in most programs, the last one counts
    ],
)
def test_hyphens_and_underscores_spaces_and_equal_signs_mean_the_same(argv):
    assert parse("--preset", "24gb", *argv).batch_size == 4


@pytest.mark.parametrize("argv", [["--preset", "16gb"], ["--preset=16gb"]])
def test_a_preset_is_named_in_either_way(argv):
    cfg = parse(*argv)
    assert (cfg.preset, cfg.model.n_layer) == ("16gb", 8)


def test_booleans_are_given_as_in_nanogpt():
    assert parse("--preset=24gb", "--bias=True").model.bias is True
    assert parse("--preset=gpt2-124m", "--bias=False").model.bias is False
    assert parse("--preset=24gb", "--decay_lr", "False").optimizer.decay_lr is False


@pytest.mark.parametrize("name", [n for n in PUBLIC if isinstance(flat_fields()[n].default, bool)])
def test_every_switch_of_a_run_can_be_thrown(name):
    flag = f"--{name.replace('_', '-')}"
    # What a switch needs, if it is not one of GPT-2's.
    others = ["--arch=qwen3"] if name in ARCHITECTURES["qwen3"].options else []
    others += ["--tied-head=False"] if name == "embedding_norm" else []
    for value in (True, False):
        assert flat_values(parse("--preset=demo", *others, f"{flag}={value}"))[name] is value


def test_flags_reach_every_section_with_their_types():
    cfg = parse(
        *("--preset=24gb", "--n-layer=3", "--beta1=.8", "--max-iters=7", "--min_lr=1e-6"),
        *("--vocab-size=None", "--device=cpu", "--out-dir=x/y", "--lr-decay-iters=9"),
    )
    assert (cfg.model.n_layer, cfg.optimizer.beta1, cfg.max_iters) == (3, 0.8, 7)
    assert (cfg.optimizer.min_lr, cfg.model.vocab_size, cfg.device) == (1e-6, None, "cpu")
    assert (cfg.out_dir, cfg.optimizer.lr_decay_iters) == (Path("x/y"), 9)


def test_without_flags_a_run_is_its_preset():
    cfg = parse("--preset=24gb-plus")
    assert type(cfg) is Config
    assert (cfg.model.n_embd, cfg.vram_gb) == (768, 24)
    assert cfg.optimizer == OptimizerConfig(learning_rate=5e-4, min_lr=5e-5)


# ---------------------------------------------------------------- what follows from other fields


def test_half_the_batch_size_doubles_accumulation_and_nothing_else():
    full, half = parse("--preset=24gb"), parse("--preset=24gb", "--batch-size=16")
    a, b = flat_values(full), flat_values(half)
    assert {name for name in a if a[name] != b[name]} == {"batch_size"}


def test_given_accumulation_sets_the_effective_batch():
    cfg = parse("--preset=24gb", "--gradient_accumulation_steps=8")
    assert (cfg.effective_batch_size, cfg.gradient_accumulation_steps) == (256, None)
    cfg = parse("--preset=24gb", "--gradient-accumulation-steps", "5", "--batch-size", "12")
    assert cfg.effective_batch_size == 60
    cfg = parse("--preset=24gb", "--gradient_accumulation_steps=8", "--effective-batch-size=256")
    assert cfg.effective_batch_size == 256


def test_accumulation_from_a_file_gives_way_to_flags(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("batch_size = 12\ngradient_accumulation_steps = 40")
    assert parse("--preset", str(path)).effective_batch_size == 480
    assert parse("--preset", str(path), "--batch-size=6").effective_batch_size == 480


def test_evaluations_see_the_same_windows_whatever_batch_size_becomes():
    assert parse("--preset=24gb").eval_windows == 200 * 32
    assert parse("--preset=24gb", "--batch-size=8").eval_windows == 200 * 32
    assert parse("--preset=24gb", "--eval-iters=10").eval_windows == 10 * 32


def test_a_run_is_written_to_a_folder_named_after_its_preset(tmp_path):
    assert parse("--preset=24gb").out_dir == Path("runs/24gb")
    (tmp_path / "my.toml").write_text("")
    assert parse("--preset", str(tmp_path / "my.toml")).out_dir == Path("runs/my")
    (tmp_path / "my.toml").write_text("out_dir = 'elsewhere'")
    assert parse("--preset", str(tmp_path / "my.toml")).out_dir == Path("elsewhere")


def test_data_lies_in_a_folder_named_after_the_dataset():
    assert parse("--preset=24gb").data_dir == Path("data/fineweb")
    assert parse("--preset=24gb", "--dataset=mine").data_dir == Path("data/mine")
    assert parse("--preset=24gb", "--data-dir=/x").data_dir == Path("/x")
    assert parse("--preset=demo").data_dir is None


def test_a_tilde_means_the_home_folder_wherever_the_shell_left_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    cfg = parse("--preset=24gb", "--out-dir=~/runs/x", "--data-dir=~/data")
    assert (cfg.out_dir, cfg.data_dir) == (Path("/home/ada/runs/x"), Path("/home/ada/data"))


# ---------------------------------------------------------------- no preset


@pytest.mark.parametrize(
    ("gigabytes", "preset"),
    [(80, "80gb"), (47.99, "48gb"), (23.99, "24gb"), (15.99, "16gb"), (11.99, "12gb")],
)
def test_no_preset_takes_that_of_the_first_card_found(monkeypatch, gigabytes, preset):
    cards = [LocalCard(name=f"card {g}", memory_bytes=int(g * GIB)) for g in (gigabytes, 4)]
    monkeypatch.setattr(local_gpus, "local_cards", lambda: cards)
    cfg = parse("--n-layer=2", default=local_gpus.preset_of_this_machine)
    assert (cfg.preset, cfg.model.n_layer) == (preset, 2)


def test_a_given_preset_asks_no_driver():
    def driver():
        raise AssertionError("asked")

    parse("--preset=demo", default=driver)


def test_a_preset_as_the_value_of_a_flag_is_not_mistaken_for_a_preset_without_one():
    assert parse("--dataset", "demo", default=lambda: "24gb").dataset == "demo"


def test_a_learning_rate_far_above_what_is_usual_is_warned_of(capsys):
    for rate, warned in (("0.1", False), ("6", True)):
        assert parse("--preset=24gb", f"--learning-rate={rate}").optimizer.learning_rate
        assert ("learning_rate 6 is far above what is usual" in capsys.readouterr().err) == warned


def test_a_text_that_would_hold_up_training_is_refused():
    with pytest.raises(ConfigError, match="--sample-tokens 100001 must be at most 100000"):
        parse("--preset=demo", "--sample-tokens=100001")


def test_the_installed_command_runs_each_module(capsys, monkeypatch):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as left:
            jaxgpt.main([name, "--help"])
        assert left.value.code == 0
        assert f"usage: python -m jaxgpt.{name}" in capsys.readouterr().out
    assert jaxgpt.main([]) == 0
    assert "jaxgpt train     train a model" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        jaxgpt.main(["trian"])
    assert left.value.code == 2
    assert "no command 'trian'; did you mean 'train'?" in capsys.readouterr().err
    monkeypatch.setattr("jaxgpt.prepare.main", lambda *given: len(given) + sys.argv.count("a.txt"))
    monkeypatch.setattr(sys, "argv", ["jaxgpt", "prepare", "a.txt"])
    assert jaxgpt.main() == 1, "prepare must know that it is the whole process"
    assert sys.argv[1:] == ["a.txt"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"jaxgpt": "jaxgpt:main"}


def test_hidden_fields_travel_through_the_command_line():
    cfg = parse("--preset=24gb", "--max-iters=5")
    assert (cfg.vram_gb, cfg.eval_windows, cfg.model.n_vocab) == (24, 6400, None)


def test_batch_size_auto_leaves_the_remat_open_unless_it_is_given():
    cfg = parse("--preset=24gb", "--batch-size=auto")
    assert cfg.open_choices == {"batch_size", "remat"}
    assert (cfg.effective_batch_size, cfg.eval_windows) == (512, 6400)
    cfg = parse("--preset=24gb", "--batch-size", "auto", "--remat", "full")
    assert (cfg.open_choices, cfg.remat) == ({"batch_size"}, "full")


def test_batch_size_auto_in_a_file_keeps_the_files_remat(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("batch_size = 'auto'\nremat = 'light'")
    assert parse("--preset", str(path)).open_choices == {"batch_size"}
