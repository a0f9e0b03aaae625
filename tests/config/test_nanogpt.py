import math

import numpy as np
import pytest

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.command_line import RunFlags, parse_run
from jaxgpt.config.fields import Config, flat_values, with_fields
from jaxgpt.config.presets import load_preset
from jaxgpt.training.schedule import make_schedule

# The assignments of nanoGPT's own config files. FACTS is what nanoGPT makes of them: rows of the
# vocabulary, layers, width, context, sequences of a step, steps, and the learning rate's peak, end,
# warm-up and end of the decay.
GPT2 = """
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12  # 491,520 tokens
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
"""
CHARACTERS = """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
"""
FINE_TUNING = """
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
"""
PRESET_24GB = """
'''The preset 24gb in nanoGPT's names.'''
dataset = 'fineweb'
n_layer = n_head = 10
n_embd = 64 * n_head
batch_size = 32
sequences = 512
gradient_accumulation_steps = sequences / batch_size
max_iters = 5e4
lr_decay_iters = max_iters
beta2 = 0.99
eval_interval = 1000
log_interval = 100
"""
FACTS = {
    GPT2: (50304, 12, 768, 1024, 480, 600000, (6e-4, 6e-5, 2000, 600000)),
    CHARACTERS: (65, 6, 384, 256, 64, 5000, (1e-3, 1e-4, 100, 5000)),
    FINE_TUNING: (50304, 12, 768, 1024, 32, 20, (3e-5, 3e-5, None, None)),
    PRESET_24GB: (50304, 10, 640, 1024, 512, 50000, (6e-4, 6e-5, 2000, 50000)),
}


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file and returns its path as text."""

    def write(content: str) -> str:
        path = tmp_path / "train_mine.py"
        path.write_text(content)
        return str(path)

    return write


def parse(*argv: str) -> Config:
    flags = {"prog": "train", "description": "", "default_preset": lambda: None}
    return parse_run(RunFlags, argv, **flags)[0]


def nanogpt_rate(
    step: int, peak: float, end: float, warmup: int | None, decay: int | None
) -> float:
    """The learning rate of nanoGPT's iteration `step`."""
    if warmup is None or decay is None:
        return peak
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    share = min(1.0, (step - warmup) / (decay - warmup))
    return end + 0.5 * (1 + math.cos(math.pi * share)) * (peak - end)


@pytest.mark.parametrize("content", FACTS, ids=["gpt2", "characters", "fine-tuning", "24gb"])
def test_a_config_file_gives_the_model_the_batch_and_the_schedule_of_nanogpt(config_file, content):
    rows, layers, width, context, sequences, steps, rate = FACTS[content]
    cfg = parse(config_file(content))
    model = with_fields(cfg, vocab_size=rows).model
    blocks = layers * (12 * width**2 + 2 * width)
    assert model.parameter_count() == (rows + context) * width + blocks + width
    assert (model.gelu, model.bias) == ("erf", False)
    assert cfg.tokens_per_step == sequences * context
    assert cfg.max_iters == steps
    at = [0, 1, 99, 100, 1999, 2000, 2001, steps // 2, steps - 1]
    schedule = make_schedule(cfg.optimizer, cfg.max_iters)
    ours = [float(schedule(step)) for step in at]
    np.testing.assert_allclose(
        ours, [nanogpt_rate(step, *rate) for step in at], rtol=1e-5, atol=1e-9
    )


def test_the_24_gb_preset_is_the_same_run_as_a_config_file(config_file):
    preset, ours = (
        flat_values(load_preset("24gb")),
        flat_values(load_preset(config_file(PRESET_24GB))),
    )
    assert {name for name in preset if preset[name] != ours[name]} == {
        *("preset", "vram_gb", "vocab_size", "gelu", "lr_decay_iters")
    }


def test_flags_replace_lines_of_the_file_as_in_nanogpt(config_file, capsys):
    path = config_file(GPT2)
    flags = ("--batch_size=24", "--init_from=resume", "--device=cuda", "--compile=False")
    cfg = parse(path, *flags, "--decay_lr", "False", "--tokenizer", "byte")
    assert (cfg.batch_size, cfg.effective_batch_size) == (24, 24 * 40)
    assert (cfg.resume, cfg.device, cfg.optimizer.warmup_iters) == ("must", "gpu", 0)
    assert (cfg.tokenizer, cfg.init_from, cfg.wandb_project) == ("byte", None, "owt")
    assert str(cfg.out_dir) == "runs/train_mine"
    assert "compile is nanoGPT's" in capsys.readouterr().err
    auto = parse("--preset", path, "--batch-size=auto", "--wandb-log=False")
    assert (auto.batch_size, auto.effective_batch_size) == ("auto", 480)
    assert auto.wandb_project is None
    assert parse(path, "--wandb_log=False", "--wandb_project=mine").wandb_project == "mine"


def test_what_means_nothing_here_is_said_and_what_changes_nothing_is_not(config_file, capsys):
    parse(config_file(CHARACTERS))
    said = capsys.readouterr().err.splitlines()
    assert ["always_save_checkpoint is nanoGPT's" in line for line in said] == [True]
    parse(config_file("compile = True\neval_only = False\nbackend = 'nccl'"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("n_layer = 6\nprint(n_layer)", ", line 2: print(n_layer): config files are read, never"),
        ("for x in (1, 2):\n    n_layer = x", ", line 1: for x in (1, 2): n_layer = x: config"),
        ("n_layer = int('6')", ", line 1: int('6'): config files are read"),
        ("n_layer, n_head = 6, 6", ", line 1: n_layer, n_head = (6, 6): config files"),
        ("wandb_log = bool(1)", ", line 1: bool(1): config files are read"),
        ("n_layer = layers", ", line 1: layers: config files are read"),
        ("n_layer = 6 / 0", ", line 1: division by zero"),
        ("n_layer = 9 ** 9 ** 9", ", line 1: 9 ** 9 ** 9: the exponent is above 64"),
        ("out_dir = 'x' * 10", ", line 1: 'x': is not a number"),
        ("n_layer = ", "cannot be read as a config file: invalid syntax"),
        ("batch_sise = 3", ": unknown key 'batch_sise'; did you mean 'batch_size'?"),
        ("n_layer = 6.5", ": n_layer = 6.5: expected int"),
        ("device = 'mps'", ': device = "mps" is nanoGPT\'s; here it is gpu'),
        ("eval_only = True", ": eval_only is nanoGPT's and has no meaning here; use python -m"),
    ],
)
def test_anything_else_in_a_file_is_answered_with_its_place_and_reason(
    config_file, content, answer
):
    path = config_file(content)
    with pytest.raises(ConfigError) as refused:
        load_preset(path)
    assert str(refused.value).startswith(path)
    assert answer in str(refused.value)


def test_a_run_has_one_config_file(config_file):
    path = config_file(GPT2)
    for argv in ((path, path), (path, "--preset=24gb")):
        with pytest.raises(ConfigError, match="name only one"):
            parse(*argv)
