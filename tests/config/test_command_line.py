import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt import COMMANDS
from jaxgpt.config.architecture import ARCHITECTURES
from jaxgpt.config.command_line import RunFlags, parse_run
from jaxgpt.config.fields import Config, flat_fields, flat_values
from jaxgpt.config.nanogpt import EPOCHS, NANOGPT_SETTINGS, OTHER_NAMES
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.config.presets import describe_presets
from jaxgpt.errors import run_command
from jaxgpt.planning import local_gpus
from jaxgpt.planning.gpus import GIB
from jaxgpt.planning.local_gpus import LocalCard

HIDDEN = {"n_vocab", "eval_windows", "vram_gb"}
PUBLIC = sorted(flat_fields().keys() - HIDDEN)
ROOT = Path(jaxgpt.__file__).parents[1]


def parse(*argv: str, default: Callable[[], str | None] | str | None = None) -> Config:
    asked: list[Config] = []

    def command() -> int:
        choose = default if callable(default) else lambda: default
        flags = {"prog": "train", "description": "Train.", "default_preset": choose}
        asked.append(parse_run(RunFlags, argv, **flags)[0])
        return 0

    run_command("train", command)
    return asked[0]


@pytest.fixture
def mistake(capsys, monkeypatch):
    """The answer to a command line that is refused, its line breaks and boxes taken out."""
    monkeypatch.setenv("COLUMNS", "300")

    def answer(*argv: str, default: str | None = None) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(*argv, default=default)
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert out == ""
        assert "Traceback" not in err
        return " ".join(re.sub("[─│╭╮╰╯]|-{3,}", " ", err).split())

    return answer


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
def test_no_preset_takes_the_tier_of_the_first_card_found(monkeypatch, gigabytes, preset):
    cards = [LocalCard(name=f"card {g}", memory_bytes=int(g * GIB)) for g in (gigabytes, 4)]
    monkeypatch.setattr(local_gpus, "local_cards", lambda: cards)
    cfg = parse("--n-layer=2", default=local_gpus.tier_of_this_machine)
    assert (cfg.preset, cfg.model.n_layer) == (preset, 2)


def test_no_preset_and_no_card_lists_the_presets(mistake, monkeypatch):
    monkeypatch.setattr(local_gpus, "local_cards", list)
    assert local_gpus.tier_of_this_machine() is None
    answer = mistake("--n-layer=2")
    assert "--preset NAME" in answer
    assert " ".join(describe_presets().split()) in answer


def test_a_given_preset_asks_no_driver():
    def driver():
        raise AssertionError("asked")

    parse("--preset=demo", default=driver)


@pytest.mark.parametrize("argv", [["--preset"], ["--preset="], ["--preset", "--n-layer=3"]])
def test_a_preset_without_a_name_is_not_taken_for_no_preset(mistake, argv):
    assert "--preset needs a value" in mistake(*argv, default="24gb")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--batch-sise", "--batch-size"),
        ("--batchsize", "--batch-size"),
        ("--n-layers", "--n-layer"),
        ("--batch-siz", "--batch-size"),  # abbreviations are no flags either
    ],
)
def test_a_misspelt_flag_is_answered_with_similar_ones(mistake, typed, meant):
    for argv in ([f"{typed}=3"], [typed, "3"]):
        answer = mistake("--preset=24gb", *argv)
        assert f"Unrecognized options: {typed}" in answer
        assert f"{meant} " in answer


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_what_a_run_finds_out_is_no_flag(mistake, name):
    assert "Unrecognized options" in mistake("--preset=24gb", f"--{name}=3")


@pytest.mark.parametrize("typed", ["3", "-n", "-batch_size=3"])
def test_what_belongs_to_no_flag_is_refused(mistake, typed):
    assert f"Unrecognized options: {typed}" in mistake("--preset=24gb", typed)


@pytest.mark.parametrize(
    ("argv", "answers"),
    [
        (["--batch-size=x"], ["--batch-size"]),
        (["--max-iters=1e5"], ["--max-iters", "'1e5'"]),
        (["--dropout=much"], ["--dropout", "'much'"]),
        (["--device=tpu"], ["'tpu' for argument '--device'", "'auto', 'gpu', 'cpu'"]),
        (["--bias=true"], ["--bias", "True", "False"]),
        (["--n-layer"], ["--n-layer"]),
        (["--out-dir="], ["--out-dir needs a value"]),
        (["--out-dir", ""], ["--out-dir needs a value"]),
        (["--dataset="], ["--dataset needs a value"]),
        (["--learning_rate=nan"], ["learning_rate nan must be finite and above 0"]),
        (["--grad-clip=1e400"], ["grad_clip inf must be finite and at least 0"]),
        (["--n-layer", "-3"], ["n_layer -3 must be at least 1"]),
        (["--batch-size=" + "9" * 4000], ["must be at most 2147483647"]),
        (["--batch-size=" + "9" * 5000], ["--batch-size"]),
        (["--batch-size=0"], ["batch_size 0 must be at least 1"]),
        (["--effective-batch-size=0"], ["effective_batch_size 0 must be at least 1"]),
        (["--gradient-accumulation-steps=0"], ["gradient_accumulation_steps 0 must be at least"]),
        (["--preset=demo", "--data-dir=x"], ["data_dir x is not read with dataset 'embedded'"]),
    ],
)
def test_a_wrong_value_is_answered_with_flag_and_value(mistake, argv, answers):
    answer = mistake("--preset=24gb", *argv)
    assert [part for part in answers if part not in answer] == []


def test_every_impossible_combination_is_reported_at_once(mistake):
    answer = mistake("--preset=24gb", "--n-head=7", "--beta2=2", "--batch-size=48", "--seed=-1")
    assert "effective_batch_size 512 is not a multiple of batch_size 48" in answer
    for part in ("n_embd 640 is not a multiple of n_head 7", "beta2 2.0", "seed -1"):
        assert part in answer


def test_accumulation_at_odds_with_the_effective_batch_is_refused(mistake):
    answer = mistake(
        "--preset=24gb", "--gradient_accumulation_steps=8", "--effective-batch-size=250"
    )
    assert "8 x batch_size 32 = 256 is not effective_batch_size 250" in answer


def test_a_mistake_in_a_file_is_answered_with_its_path(mistake, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("batch_sise = 3")
    assert f"{path}: unknown key 'batch_sise'; did you mean 'batch_size'?" in mistake(
        f"--preset={path}"
    )


@pytest.mark.parametrize("name", NANOGPT_SETTINGS)
def test_a_flag_of_nanogpt_alone_is_answered_with_what_serves_instead(mistake, name):
    for flag in (name, name.replace("_", "-")):
        for argv in ([f"--{flag}"], [f"--{flag}=True"], [f"--{flag}", "resume"]):
            answer = mistake("--preset=24gb", *argv)
            assert f"--{name}" in answer
            assert NANOGPT_SETTINGS[name] in answer


def test_flags_that_answers_point_to_exist():
    named = {flag for text in NANOGPT_SETTINGS.values() for flag in re.findall(r"--([\w-]+)", text)}
    assert named
    assert {flag.replace("-", "_") for flag in named} <= set(PUBLIC)


@pytest.mark.parametrize(
    ("argv", "instead"),
    [
        (["--device=cuda"], "--device=cuda is nanoGPT's; here it is gpu"),
        (["--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
        (["--device=mps"], "cpu or auto"),
        (["config/train_gpt2.py"], "config/train_gpt2.py: no such file"),
    ],
)
def test_a_value_of_nanogpt_alone_is_answered_with_ours(mistake, argv, instead):
    assert instead in mistake(*argv, default="24gb")


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["--lr", "3e-4"], "--lr=3e-4 is called learning_rate here"),
        (["--bs=4"], "--bs=4 is called batch_size here"),
        (["--grad-accum", "8"], "--grad_accum=8 is called gradient_accumulation_steps here"),
        (["--epochs=3"], "--epochs=3 is counted in optimizer steps here: max_iters = epochs x"),
        (["demo"], "demo: a preset is named with a flag: --preset demo"),
        (["--n-layer=2", "24gb"], "--preset 24gb"),
    ],
)
def test_what_other_programs_call_differently_is_answered_with_its_name(mistake, argv, answer):
    assert answer in mistake(*argv, default="24gb")
    assert {*OTHER_NAMES.values()} <= flat_fields().keys()
    assert not {*OTHER_NAMES, *EPOCHS} & flat_fields().keys()


def test_a_preset_as_the_value_of_a_flag_is_not_mistaken_for_a_preset_without_one():
    assert parse("--dataset", "demo", default="24gb").dataset == "demo"


def test_a_learning_rate_far_above_what_is_usual_is_warned_of(capsys):
    for rate, warned in (("0.1", False), ("6", True)):
        assert parse("--preset=24gb", f"--learning-rate={rate}").optimizer.learning_rate
        assert ("learning_rate 6 is far above what is usual" in capsys.readouterr().err) == warned


def test_the_installed_command_runs_each_module(capsys):
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
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"jaxgpt": "jaxgpt:main"}


def test_a_whole_command_line_of_nanogpt_is_answered_at_once(mistake):
    answer = mistake(
        *("--device=cuda", "--compile=False", "--wandb_log=True", "--init_from=resume"),
        default="24gb",
    )
    for part in ("cuda", "--compile", "--wandb_log", "--init_from"):
        assert part in answer


# ---------------------------------------------------------------- before JAX

WITHOUT_JAX = """
import os, sys
import jaxgpt.run.device as device
from jaxgpt import train
from jaxgpt.planning import local_gpus
device.PLUGINS = ()  # as on a machine without a GPU version of JAX
local_gpus.local_cards = lambda: []
codes = []
for argv in {argvs}:
    try:
        train.main(argv)
    except SystemExit as stop:
        codes.append(stop.code)
slow = {{"jax", "jaxlib", "flax", "optax", "orbax"}} & sys.modules.keys()
print(codes, sorted(slow), file=sys.stderr)
"""


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {name: v for name, v in os.environ.items() if name != "JAX_PLATFORMS"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )


def test_mistakes_and_help_are_answered_before_jax_is_imported(tmp_path):
    (tmp_path / "bad.toml").write_text("n_layers = 3")
    out = ["--out-dir", str(tmp_path / "run")]
    argvs: list[list[str]] = [
        *([], ["--help"], ["--preset=demo", "--help"], ["--preset=nope"], ["--compile"]),
        ["--preset=demo", "--batch-sise=3"],
        ["--preset=demo", "--n-head=3"],
        ["--preset", str(tmp_path / "bad.toml")],
        ["--preset=24gb", *out],  # no GPU
        ["--preset=demo", "--device=gpu", *out],
        ["--preset=demo", "--vocab-size=100", *out],  # too small for the tokenizer
    ]
    done = run_python("-c", WITHOUT_JAX.format(argvs=argvs))
    codes = [2, 0, 0, *[2] * (len(argvs) - 3)]
    assert done.stderr.splitlines()[-1] == f"{codes} []", done.stderr
    assert not (tmp_path / "run").exists()


HEAVY = """
import sys
import jaxgpt
codes = []
for name in {names}:
    for argv in (["--help"], ["--no-such-flag"]):
        try:
            jaxgpt.main([name, *argv])
        except SystemExit as stop:
            codes.append(stop.code)
slow = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorboardX", "torch", "datasets", "pyarrow",
        "huggingface_hub", "tiktoken")
print(codes, [name for name in slow if name in sys.modules], file=sys.stderr)
"""


def test_no_command_imports_what_takes_long_before_it_understands_its_flags():
    """Each of these takes from a tenth of a second to several; the rest takes a third of one."""
    done = run_python("-c", HEAVY.format(names=tuple(COMMANDS)))
    assert done.stderr.splitlines()[-1] == f"{[0, 2] * len(COMMANDS)} []", done.stderr


def test_the_command_itself_explains_its_flags():
    done = run_python("-m", "jaxgpt.train", "--preset=demo", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--batch-size INT" in done.stdout


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
