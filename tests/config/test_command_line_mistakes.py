"""Mistakes on the command line, and what they are answered with."""

import re

import pytest
from helpers.configs import parse

from jaxgpt.config.fields import flat_fields
from jaxgpt.config.nanogpt import EPOCHS, NANOGPT_SETTINGS, OTHER_NAMES
from jaxgpt.config.presets import describe_presets
from jaxgpt.errors import run_command
from jaxgpt.planning import local_gpus

HIDDEN = ["eval_windows", "n_vocab", "vram_gb"]


@pytest.fixture
def mistake(capsys, monkeypatch):
    """The answer to a command line that is refused, its line breaks and boxes taken out."""
    monkeypatch.setenv("COLUMNS", "300")

    def answer(*argv: str, default: str | None = None) -> str:
        with pytest.raises(SystemExit) as stop:
            run_command("train", lambda: bool(parse(argv, lambda: default)))
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert out == ""
        assert "Traceback" not in err
        return " ".join(re.sub("[─│╭╮╰╯]|-{3,}", " ", err).split())

    return answer


def test_no_preset_and_no_card_lists_the_presets(mistake, monkeypatch):
    monkeypatch.setattr(local_gpus, "local_cards", list)
    assert local_gpus.preset_of_this_machine() is None
    answer = mistake("--n-layer=2")
    assert "--preset NAME" in answer
    assert " ".join(describe_presets().split()) in answer


@pytest.mark.parametrize("argv", [["--preset"], ["--preset="], ["--preset", "--n-layer=3"]])
def test_a_preset_without_a_name_is_not_taken_for_no_preset(mistake, argv):
    assert "--preset needs a value" in mistake(*argv, default="24gb")


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


@pytest.mark.parametrize("name", HIDDEN)
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
    assert {flag.replace("-", "_") for flag in named} <= flat_fields().keys() - {*HIDDEN}


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
        (["--epochs=3"], "--epochs=3 does not exist here; set max_iters = epochs x"),
        (["demo"], "demo: a preset is named with a flag: --preset demo"),
        (["--n-layer=2", "24gb"], "--preset 24gb"),
    ],
)
def test_what_other_programs_call_differently_is_answered_with_its_name(mistake, argv, answer):
    assert answer in mistake(*argv, default="24gb")
    assert {*OTHER_NAMES.values()} <= flat_fields().keys()
    assert not {*OTHER_NAMES, *EPOCHS} & flat_fields().keys()


def test_a_whole_command_line_of_nanogpt_is_answered_at_once(mistake):
    answer = mistake(
        *("--device=cuda", "--compile=False", "--wandb_log=True", "--init_from=resume"),
        default="24gb",
    )
    for part in ("cuda", "--compile", "--wandb_log", "--init_from"):
        assert part in answer
